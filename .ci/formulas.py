"""For the documentation site: the notebooks' TeX becomes MathML, which browsers draw by themselves.

A page then needs no script from elsewhere, and no network.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_CODE = re.compile(r"(<(pre|code|script|style)\b.*?</\2>)", re.S)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^\s$](?:[^$\n]*[^\s$])?)\$", re.S)


def as_mathml(text: str) -> str:
    """HTML with its formulas drawn, those in code left as they are."""
    parts = _CODE.split(text)
    # What is split at comes along, and after it the element's name.
    return "".join(
        _FORMULA.sub(_drawn, part) if i % 3 == 0 else part
        for i, part in enumerate(parts)
        if i % 3 != 2
    )


def _drawn(match: re.Match[str]) -> str:
    display, inline = match.groups()
    source = html.unescape(display or inline)
    return str(convert(source, display="block" if display else "inline"))


def on_page_content(text: str, *, page: Any, **_: Any) -> str:
    """MkDocs' hook: draws the formulas of notebooks."""
    return as_mathml(text) if page.file.src_uri.endswith(".ipynb") else text
