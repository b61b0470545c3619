"""What defines a trial, as plain values: two trials are the same if these are equal.

Numbers, text and lists are themselves. A function is its name with the values in its closure and of
its defaults; one that is not jdl's, JAX's or optax's, also a fingerprint of its code. An array is
its numbers or their fingerprint; other objects are their type with its fields.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import math
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LIBRARIES = ("jdl", "jax", "jaxlib", "optax", "flax", "numpy")  # versions of these are recorded
STEPS = (0, *(int(f * 10**power) for power in range(6) for f in (1, 2, 5)), 10**6)
SMALL = 16  # numbers of an array that are listed
LONG = 160  # characters of a fingerprint


def as_label(text: str) -> str:
    """A text as a problem's name, which is also that of a directory.

    >>> as_label("my photos (2)-cnn")
    'my_photos_2_-cnn'
    """
    return re.sub(r"[^A-Za-z0-9._+=-]+", "_", text)


def plain(value: Any) -> Any:
    """`value` as TOML can store it, the same in every process.

    >>> import optax
    >>> plain((1, 2.5, None)), plain(optax.sgd)
    ([1, 2.5, 'none'], 'sgd')
    >>> plain(optax.linear_schedule(0.1, 0.0, 50))
    'polynomial_schedule(end_value=0.0, init_value=0.1, power=1, transition_begin=0, \
transition_steps=50)'
    """
    return _plain(value, frozenset())


def setting(value: Any) -> Any:
    """`plain`; of a schedule, also its values at steps 0, 1, 2, 5, 10, …, 10⁶.

    >>> setting(lambda step: 0.5 ** step)["values"][:4]
    [1.0, 0.5, 0.25, 0.03125]
    """
    shown = plain(value)
    values = _values(value) if callable(value) and not isinstance(value, type) else []
    return {"function": shown, "values": values} if values else shown


def _values(function: Callable[..., Any]) -> list[float]:
    """A schedule's values, finite ones only, to five digits; none of another function."""
    found = []
    with contextlib.suppress(Exception), jax.numpy_dtype_promotion("standard"):
        for step in STEPS:
            value = float(f"{float(function(jnp.asarray(step, jnp.int32))):.5g}")
            found += [value] if math.isfinite(value) else []
    return found


def fingerprint(value: Any) -> str:
    """`plain` as text of moderate length, for what is compared rather than read."""
    text = str(plain(value))
    if len(text) <= LONG:
        return text
    return f"{text[:LONG]}… {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _plain(value: Any, seen: frozenset[int]) -> Any:
    """`value`, found inside of the objects `seen`, which may hold each other."""
    if isinstance(value, str | int | float):
        return value
    if value is None:
        return "none"
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _array(value)
    if isinstance(value, type | types.ModuleType):
        return value.__name__
    if id(value) in seen:
        return type(value).__name__
    seen |= {id(value)}
    within = lambda x: _plain(x, seen)  # noqa: E731
    if isinstance(value, Mapping):
        return {str(key): within(x) for key, x in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((within(x) for x in value), key=str)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return [within(x) for x in value]
    if callable(value) and not dataclasses.is_dataclass(value):
        return _function(value, within)
    return _call(type(value).__name__, _fields(value), within)


def _array(value: Any) -> Any:
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    x = np.asarray(value)
    if x.size <= SMALL and x.dtype.kind in "biuf":
        return x.tolist()
    digest = hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:12]
    return f"{x.dtype}{list(x.shape)} {digest}"


def _fields(value: Any) -> dict[str, Any]:
    """An object's fields, as its type declares or as it has them."""
    if isinstance(value, tuple):
        return value._asdict()  # type: ignore[attr-defined]
    if dataclasses.is_dataclass(value):  # a Linen module's parent and name say where it is used
        fields = [f.name for f in dataclasses.fields(value) if f.name not in ("parent", "name")]
        return {name: getattr(value, name) for name in fields}
    shown = repr(value)
    return vars(value) if " at 0x" in shown and hasattr(value, "__dict__") else {"": shown}


def _function(value: Any, within: Callable[[Any], Any]) -> str:
    if isinstance(value, functools.partial):
        names = {str(i): x for i, x in enumerate(value.args)} | value.keywords
        return _call(str(within(value.func)), names, within)
    if isinstance(value, types.MethodType):
        return _call(value.__name__, {"self": value.__self__}, within)
    while not isinstance(value, types.FunctionType) and hasattr(value, "__wrapped__"):
        value = value.__wrapped__  # compiled by jax.jit
    if not isinstance(value, types.FunctionType):
        name = getattr(value, "__name__", None)
        return name or _call(type(value).__name__, _fields(value), within)
    name = value.__qualname__.split(".<locals>")[0]
    used = inspect.getclosurevars(value)
    given: dict[Any, Any] = dict(used.nonlocals)
    if not is_known(value):
        name = (
            f"{value.__name__.strip('<>')}:{hashlib.sha256(_code(value.__code__)).hexdigest()[:8]}"
        )
        given |= dict(enumerate(value.__defaults__ or ())) | (value.__kwdefaults__ or {})
        given |= {key: x for key, x in used.globals.items() if not is_known(x)}
    return _call(name, given, within)


def is_known(value: Any) -> bool:
    """Whether it is a module, or of a library whose version is recorded."""
    module = getattr(value, "__module__", None) or ""
    return isinstance(value, types.ModuleType) or module.split(".")[0] in LIBRARIES


def _call(name: str, fields: Mapping[Any, Any], within: Callable[[Any], Any]) -> str:
    """A name with arguments, by name; an address differs in every process, and is left out."""
    listed = {str(key): within(x) for key, x in sorted(fields.items(), key=lambda x: str(x[0]))}
    shown = [f"{key}={x}" if key else f"{x}" for key, x in listed.items() if " at 0x" not in str(x)]
    return f"{name}({', '.join(shown)})" if shown else name


def _code(code: types.CodeType) -> bytes:
    """What a function does, without the lines it is on."""
    parts = [code.co_code, *map(str.encode, code.co_names)]
    for x in code.co_consts:
        ordered = sorted(map(repr, x)) if isinstance(x, frozenset) else x
        parts.append(_code(x) if isinstance(x, types.CodeType) else repr(ordered).encode())
    return b"\0".join(parts)
