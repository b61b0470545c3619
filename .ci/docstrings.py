"""For the documentation site: docstrings as Markdown has to have them.

Doctests stand in fences, wherever they are written: MkDocs' parser knows them under the heading
"Examples" alone, and would take results such as [1, 2] for links elsewhere. A line that begins with
"> 0" is no quotation.
"""

import re
from typing import Any

import griffe

_FENCED = "```pycon\n{}\n```"


def as_markdown(text: str) -> str:
    """The docstring with a fence around each doctest; the word `Example:` above one goes."""
    paragraphs = re.split(r"(\n\s*\n)", text)
    found = [_paragraph(x) if ">>>" in x else x for x in paragraphs]
    return re.sub(r"^(\s*(?:\*{0,2}\w+: )?)> (?=\S)", r"\1&gt; ", "".join(found), flags=re.M)


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    first = next(i for i, line in enumerate(lines) if line.lstrip().startswith(">>>"))
    above, example = lines[:first], lines[first:]
    indent = len(example[0]) - len(example[0].lstrip())
    body = "\n".join(line[indent:] for line in example)
    above = [line for line in above if line.strip() not in ("Example:", "Examples:")]
    return "\n".join([*above, *([""] if above else []), _FENCED.format(body)])


class Docstrings(griffe.Extension):
    """Rewrites each docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the object's."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
