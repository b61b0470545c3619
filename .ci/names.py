"""For the documentation site: names in the reference's headings are those that users import.

`jdl.optim.kfac.kfac` is written where a page needs the function, since `jdl.optim.kfac` is a module
as well; users import `jdl.optim.kfac`.
"""

import importlib
import re
from typing import Any

import jdl


def public_name(name: str) -> str:
    """The shortest name under which `jdl` or one of its parts exports the thing of that name."""
    module, _, last = name.rpartition(".")
    thing = getattr(importlib.import_module(module), last)
    for parent in (jdl, *(getattr(jdl, part) for part in jdl.__all__)):
        if last in getattr(parent, "__all__", ()) and getattr(parent, last) is thing:
            return f"{parent.__name__}.{last}"
    return name


def _headed(match: re.Match[str]) -> str:
    name = match.group(1)
    short = public_name(name)
    if short == name:
        return match.group()
    options = f"heading: {short}, toc_label: {short.rpartition('.')[2]}"
    return f"{match.group()}\n    options: {{{options}}}"


def on_page_markdown(text: str, *, page: Any, **_: Any) -> str:
    """MkDocs' hook: gives such names their heading; a search finds the reference first."""
    if page.file.src_uri.startswith("reference/"):
        page.meta["search"] = {"boost": 4}
    return re.sub(r"^::: ([\w.]+)$", _headed, text, flags=re.M)
