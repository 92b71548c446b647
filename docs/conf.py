"""Configuration of the documentation: Markdown pages, and the reference from docstrings."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import nio_hf
from nio_hf.trainer.arguments import NIOSettings

SECTIONS = {"Args:", "Attributes:", "Raises:", "Returns:", "Yields:"}
project = "nio_hf"
author = "The nio_hf developers"
release = nio_hf.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_show_copyright = False
html_title = f"nio_hf {release}"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
napoleon_google_docstring = True
autodoc_typehints = "description"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
default_role = "code"
copybutton_prompt_text = "$ "


def write_settings(app: Any) -> None:
    """Write the table of the settings of NIO, from the fields of the arguments."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(NIOSettings):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
        shown = "none" if default is None else str(default).lower() if isinstance(default, bool) else f"{default}"
        lines.append(f"| `{field.name}` | {shown} | {field.metadata['help'].replace('|', '/')} |")
    folder = Path(app.srcdir) / "_generated"
    folder.mkdir(exist_ok=True)
    (folder / "settings.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def mark_equations(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Let indented lines of a docstring's text be shown as they stand, and drop the brackets around names."""
    marked: list[str] = []
    for number, line in enumerate(lines):
        before = lines[:number]
        in_text = not any(other.rstrip() in SECTIONS for other in before)
        if in_text and line.startswith("    ") and before and not before[-1].strip():
            marked += ["::", ""]
        marked.append(re.sub(r"\[(`[^`]+`)\]", r"\1", line))
    lines[:] = marked


def setup(app: Any) -> None:
    """Register the table and the equations."""
    app.connect("builder-inited", write_settings)
    app.connect("autodoc-process-docstring", mark_equations, priority=400)
