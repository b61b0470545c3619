"""For the documentation site: the notebooks' TeX becomes MathML, which browsers draw by themselves.

A page then needs no script from elsewhere, and no network.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_CODE = re.compile(r"(<(pre|code|script|style)\b.*?</\2>)", re.S)
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\$([^\s$](?:[^$\n]*[^\s$])?)\$|\\\((.+?)\\\)", re.S
)
_MATHJAX = re.compile(r"<script data-mkdocs-jupyter-mathjax=.*?</script>\s*", re.S)


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
    dollars, brackets, dollar, parentheses = match.groups()
    display = "block" if dollars or brackets else "inline"
    source = html.unescape(dollars or brackets or dollar or parentheses)
    return str(convert(source, display=display))


def on_page_content(text: str, *, page: Any, **_: Any) -> str:
    """MkDocs' hook: draws the formulas of notebooks."""
    return as_mathml(text) if page.file.src_uri.endswith(".ipynb") else text


def on_post_page(text: str, **_: Any) -> str:
    """MkDocs' hook: takes out the script that would fetch MathJax."""
    return _MATHJAX.sub("", text)
