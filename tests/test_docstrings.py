"""What is public says what it does, what it takes, and shows it: the reference is made of that.

Public are the rooms' names, and whatever else the reference pages document. That the examples are
true is seen by pytest, which runs every doctest (`--doctest-modules`).
"""

import enum
import functools
import importlib
import inspect
import re
import runpy
import typing
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "optim", "solvers", "curvature", "data", "compare", "vision")
NO_EXAMPLE = {  # where one would need what is not at hand in a docstring
    "jdl.compare.Split": "a part of what `arrays_problem` gives",
    "jdl.compare.table": "needs a study that has run: `jdl.compare.load_results` shows one",
    "jdl.compare.write_report": "likewise",
    "jdl.data.standard_input": "reads a process's standard input",
    "jdl.models.scores.calibration": "needs a network that has been trained",
    "jdl.train.boltzmann.pretrain": "seconds of training: the notebook on them shows it",
    "jdl.train.boltzmann.rbm": "likewise",
    "jdl.train.distributed.initialize": "needs other processes: the page on them has it",
    "jdl.train.step.build": "the Estimator is its example",
    "jdl.train.export.load_exported": "`save` shows it",
    "jdl.vision.load_trunk": "needs weights that are an extra",
    "jdl.vision.painter.load_painter": "needs a style network that has been trained",
    "jdl.vision.reverse.of_class": "as `preferred`, for a classifier's logits",
    "jdl.vision.style.transfer": "needs a network that has been trained",
}


def reference():
    """The names that the reference documents, by page."""
    pages = sorted((ROOT / "notebooks" / "reference").glob("*.md"))
    return [n for page in pages for n in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)]


def found(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def home(thing):
    return f"{thing.__module__}.{thing.__qualname__}"


def exported():
    """Every function and class that a room exports, by the name of where it lives."""
    import jdl

    rooms = [jdl, *(importlib.import_module(f"jdl.{room}") for room in ROOMS)]
    things = [getattr(room, name) for room in rooms for name in room.__all__]
    things = [x for x in things if inspect.isfunction(x) or inspect.isclass(x)]
    for room in ("losses", "metrics"):
        module = importlib.import_module(f"jdl.{room}")
        own = [x for x in vars(module).values() if getattr(x, "__module__", "") == module.__name__]
        things += [x for x in own if not x.__name__.startswith("_")]
    return {home(x) for x in things}


OPTIMIZERS = {f"jdl.optim.{x}" for x in importlib.import_module("jdl.optim").__all__}
public = pytest.mark.parametrize("name", reference())


def parameters(thing):
    """What a caller may name or must know, with the docstrings it may be told in."""
    if inspect.isclass(thing) and issubclass(thing, enum.Enum | BaseException):
        return []
    if inspect.isclass(thing) and getattr(thing, "_is_protocol", False):
        return []
    if typing.is_typeddict(thing):
        return [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
            for name in thing.__annotations__
        ]
    known = {"self", "cls", "parent", "name"} if hasattr(thing, "__linen_post_init__") else set()
    if any(base.__name__ == "Module" for base in getattr(thing, "__mro__", ())):
        known = {"parent", "name"}
    return [p for p in inspect.signature(thing).parameters.values() if p.name not in known]


def texts(thing):
    """The docstring, and those of the classes it inherits its arguments from."""
    classes = [c for c in getattr(thing, "__mro__", (thing,)) if c.__module__.startswith("jdl")]
    return "\n".join(c.__doc__ or "" for c in classes or [thing])


def test_the_reference_leaves_nothing_out():
    assert exported() <= {home(found(name)) for name in reference()}


def test_the_page_on_stability_lists_what_is_public():
    """Its rule: what the reference documents, by its shortest name; the parts; `jdl`'s own."""
    import jdl

    public_name = runpy.run_path(str(ROOT / ".ci" / "names.py"))["public_name"]

    page = (ROOT / "notebooks" / "stability.md").read_text()
    section = page.split("## Public names")[1].split("\n## ")[0]
    listed = set(re.findall(r"`([\w.]+)`", section)) - {"jdl", "config.toml", "metrics.jsonl"}
    modules = {f"jdl.{room}" for room in jdl.__all__ if inspect.ismodule(getattr(jdl, room))}
    modules |= {public_name(name).rpartition(".")[0] for name in reference()}
    own = {x for x in jdl.__all__ if f"jdl.{x}" not in modules and not x.startswith("_")}
    assert listed == own | modules - {"jdl"} | {"jdl.core.check"}
    assert {f"jdl.{x}" for x in own} <= {public_name(name) for name in reference()}


@public
def test_it_says_what_it_does(name):
    summary = (found(name).__doc__ or "").strip().split("\n\n")[0]
    assert summary
    assert not summary.startswith(f"{found(name).__name__}("), "made by a decorator"
    assert summary.rstrip(" `*")[-1] in ".:?", summary


@public
def test_it_says_what_it_takes(name):
    thing = found(name)
    told = texts(thing)
    left = [p.name for p in parameters(thing) if not re.search(rf"(?<!\w){p.name}(?!\w)", told)]
    assert not left


def shown(thing):
    """Whether a doctest is in the docstring, or in a class's methods'."""
    own = [thing.__doc__ or ""]
    if inspect.isclass(thing):
        own += [getattr(x, "__doc__", None) or "" for x in vars(thing).values()]
    return any(">>>" in text for text in own)


@functools.cache
def results():
    """The names of the types that functions with an example give: shown where they are made."""
    functions = [x for x in map(found, reference()) if inspect.isfunction(x) and shown(x)]
    given = [str(inspect.signature(f).return_annotation) for f in functions]
    return {word for text in given for word in re.findall(r"\w+", text)}


@public
def test_it_shows_an_example(name):
    if name in NO_EXAMPLE:
        pytest.skip(NO_EXAMPLE[name])
    thing = found(name)
    assert shown(thing) or (inspect.isclass(thing) and thing.__name__ in results())


@public
def test_its_methods_say_what_they_do(name):
    thing = found(name)
    if not inspect.isclass(thing):
        return
    silent = [
        attribute
        for attribute, x in vars(thing).items()
        if not attribute.startswith("_")
        and (inspect.isfunction(x) or isinstance(x, property | classmethod))
        and not getattr(x, "__qualname__", thing.__qualname__).startswith("_")
        and thing.__qualname__ in getattr(x, "__qualname__", thing.__qualname__)
        and not (x.fget if isinstance(x, property) else x).__doc__
    ]
    assert not silent


@pytest.mark.parametrize("name", [n for n in reference() if found(n).__module__ in OPTIMIZERS])
def test_an_optimizer_says_what_it_refuses_and_where_it_is_from(name):
    told = found(name).__doc__
    assert "Raises:" in told
    assert "References:" in told
