"""The site: the pages of this folder and the public docstrings. `make docs` builds it into build/docs; warnings are errors.
Docstrings are plain text, with formulas and shapes that reStructuredText would take for markup: they are escaped here."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lejepa_scale

project = "lejepa_scale"
author = "The lejepa_scale authors"
project_copyright = "The lejepa_scale authors"
version = release = lejepa_scale.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
highlight_language = "text"  # for what is not said to be in a language
myst_heading_anchors = 3  # benchmarks.md#sigreg, as on GitHub
html_theme = "furo"
html_title = f"lejepa_scale {release}"
html_show_sourcelink = html_copy_source = False
autodoc_inherit_docstrings = smartquotes = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100

_SETTING = re.compile(r"[a-z_]\w*(, [a-z_]\w*)*: ")  # a line that says what a parameter is


def as_restructured_text(lines: list[str]) -> Iterator[str]:
    """A docstring as it reads: prose as paragraphs, a line of its own for each parameter and each entry of a list, what is
    indented as it stands, and `names` in code."""
    for blank, group in groupby(lines, lambda line: not line.strip()):
        if blank:
            continue
        paragraph = list(group)
        if all(line.startswith("  ") for line in paragraph):
            yield from ["::", "", *(f"    {line}" for line in paragraph), ""]
            continue
        entries: list[str] = []
        for line in paragraph:
            if entries and not (line.startswith("- ") or _SETTING.match(line)):
                entries[-1] += f" {line.strip()}"
            else:
                entries.append(line)
        for entry in entries:
            text, bullet = entry.removeprefix("- "), "- " * entry.startswith("- ")
            yield from [bullet + "".join(_escaped(part) for part in re.split(r"(`[^`]+`)", text)), ""]


def _escaped(part: str) -> str:
    return f"`{part}`" if part.startswith("`") else re.sub(r"([\\*`|_])", r"\\\1", part)


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = list(as_restructured_text(lines))


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _process)
