"""An optimizer's arguments in words, as on the command line, checked against its signature."""

import ast
import collections.abc
import inspect
import types
from collections.abc import Iterable, Mapping
from typing import Any, Union, get_args, get_origin

import jax

from jdl.core import check
from jdl.optim import registry

_WORDS = {"true": True, "false": False, "none": None}
_CALLED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "values separated by commas",
    str: "text",
    type(None): "none",
}


def parsed(name: str, texts: Iterable[str], where: str = "--option") -> dict[str, Any]:
    """The arguments that texts such as "max_cg_iterations=7" give; of several, the last one.

    Args:
      name: the optimizer's, as for `jdl.optim.by_name`.
      texts: NAME=VALUE each.
      where: what the caller calls them, for errors.

    Raises:
      ArgumentError: the optimizer has no such argument, or it cannot have this value.

    >>> parsed("hf", ["max_cg_iterations=7", "trust-region=none", "curvature=fisher"])
    {'max_cg_iterations': 7, 'trust_region': None, 'curvature': 'fisher'}
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        check.argument(bool(key and equals), where, "NAME=VALUE, such as damping=0.1", text)
        key = key.replace("-", "_")
        must = "other than learning_rate, which has a flag of its own"
        check.argument(key != "learning_rate", where, must, key)
        found[key] = _literal(value)
    return checked(name, found, where)


def checked(name: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of an optimizer, if it has each of them, of this type.

    Args:
      name: the optimizer's, as for `jdl.optim.by_name`.
      values: plain ones: numbers, texts, tuples, None.
      where: what the caller calls them, for errors.

    Raises:
      ArgumentError: the optimizer has no such argument, or of another type.

    >>> checked("adam", {"b1": "high"}, "--option")
    Traceback (most recent call last):
        ...
    jdl.core.check.ArgumentError: `--option b1` must be a number, got 'high'.
    """
    known = registry.parameters(name)
    second = registry.REGISTRY[registry.short_name(name)].second_order
    found = {}
    for key, value in values.items():
        if not (second and key in registry.EVERY_FIRST_ORDER):  # `by_name` tells why not
            check.one_of(f"{where} of {name}", key, known)
            value = _of_kind(f"{where} {key}", value, known[key])
        found[key] = value
    return found


def written(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts that `parsed` reads, in the order of their names.

    Args:
      values: what `parsed` returned.

    >>> written({"damping": 1.0, "curvature": "fisher", "betas": (0.9, 0.99)})
    ('betas=(0.9, 0.99)', 'curvature=fisher', 'damping=1.0')
    """
    return tuple(f"{key}={values[key]}" for key in sorted(values))


def _literal(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _of_kind(where: str, value: Any, parameter: inspect.Parameter) -> Any:
    """`value` as the parameter takes it; raises where it does not."""
    kinds = _kinds(parameter)
    must = " or ".join(words for kind, words in _CALLED.items() if kind in kinds)
    check.argument(bool(kinds), where, "left out: it is a function, given in Python", value)
    if type(value) is int and float in kinds:
        return value if type(parameter.default) is int else float(value)
    if tuple in kinds and isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    if tuple in kinds and isinstance(value, list):
        return tuple(value)
    check.argument(type(value) in kinds, where, must, value)
    return value


def _kinds(parameter: inspect.Parameter) -> set[type]:
    """The types that an argument's value may have; none for a function."""
    default, parts = parameter.default, set(_parts(parameter.annotation))
    if isinstance(default, bool):
        return {bool}
    found: set[type] = {type(None)} & parts
    if isinstance(default, str) or str in parts or parameter.name.endswith("dtype"):
        found.add(str)
    elif parts & {float, jax.Array} or isinstance(default, float):
        found.add(float)
    elif int in parts:
        found.add(int)
    elif parts & {tuple, collections.abc.Sequence}:
        found.add(tuple)
    return set() if found <= {type(None)} else found | ({type(None)} if default is None else set())


def _parts(annotation: Any) -> list[Any]:
    """The types of a union, each without its arguments."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for x in get_args(annotation) for part in _parts(x)]
    return [get_origin(annotation) or annotation]
