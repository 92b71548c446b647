"""Texts from the templates of the package."""

from __future__ import annotations

from typing import Any


def render(template: str, **context: Any) -> str:
    """Fill in a template. A variable without a value is an error, and HTML is escaped.

    Args:
        template: Name of a file in `nio_hf/templates`.
        context: Values of the variables.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nio_hf"),
        autoescape=jinja2.select_autoescape(["html.j2"], default_for_string=False),
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**context)
