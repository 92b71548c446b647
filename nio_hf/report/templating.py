"""Text from the templates that come with the package."""

from __future__ import annotations

import importlib.resources
from typing import Any


def render(template: str, **context: Any) -> str:
    """Fill in a template; what is missing in the context is an error, and HTML is escaped.

    Args:
        template: name of a file in `nio_hf/templates`.
        context: what its names stand for.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=jinja2.select_autoescape(["html.j2"], default_for_string=False),
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.loader = jinja2.FunctionLoader(_source)
    return environment.get_template(template).render(**context)


def _source(template: str) -> str:
    folder = importlib.resources.files("nio_hf").joinpath("templates")
    return folder.joinpath(template).read_text(encoding="utf-8")
