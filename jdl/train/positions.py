"""A position in the data: the state of its iterator, as JSON in a checkpoint can hold it."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from jdl.core import check

_KIND = "__kind__"


def to_json(state: Any) -> Any:
    """An iterator's state in JSON's types, without loss; JSON's own types stay as they are.

    >>> to_json({"seed": b"ab", "place": (1, 2)})["place"]
    {'__kind__': 'tuple', 'of': [1, 2]}
    """
    if state is None or isinstance(state, str):
        return state
    if isinstance(state, bool | int | float | np.number | np.bool_):
        return state.item() if isinstance(state, np.generic) else state
    if isinstance(state, bytes):
        return {_KIND: "bytes", "of": base64.b64encode(state).decode("ascii")}
    if isinstance(state, list):
        return [to_json(x) for x in state]
    if type(state) is tuple:
        return {_KIND: "tuple", "of": [to_json(x) for x in state]}
    if isinstance(state, np.ndarray) and state.dtype.kind in "biuf":
        of = [state.dtype.str, list(state.shape), to_json(state.tobytes())]
        return {_KIND: "array", "of": of}
    if isinstance(state, Mapping):
        if _KIND not in state and all(isinstance(key, str) for key in state):
            return {key: to_json(x) for key, x in state.items()}
        return {_KIND: "dict", "of": [[to_json(key), to_json(x)] for key, x in state.items()]}
    raise check.DataError(
        f"The data's position holds a {type(state).__name__}, which a checkpoint cannot keep: its "
        "iterator's get_state must give numbers, text, bytes, arrays, lists and dicts of them."
    )


def from_json(plain: Any) -> Any:
    """The state that `to_json` was given.

    >>> from_json(to_json({"seed": b"ab", 3: (1, 2.5)}))
    {'seed': b'ab', 3: (1, 2.5)}
    """
    if isinstance(plain, list):
        return [from_json(x) for x in plain]
    if not isinstance(plain, Mapping):
        return plain
    if _KIND not in plain:
        return {key: from_json(x) for key, x in plain.items()}
    kind, of = plain[_KIND], plain["of"]
    if kind == "bytes":
        return base64.b64decode(of)
    if kind == "tuple":
        return tuple(from_json(x) for x in of)
    if kind == "dict":
        return {from_json(key): from_json(x) for key, x in of}
    dtype, shape, data = of
    return np.frombuffer(from_json(data), dtype).reshape(shape).copy()


def restore(iterator: Any, position: Any) -> None:
    """Sets the iterator to a position.

    Raises:
      DataError: it is the position of other data.
    """
    try:
        iterator.set_state(from_json(position))
    except check.UserError:
        raise
    except Exception as error:  # another library's iterator may raise anything
        raise check.DataError(
            "The saved position belongs to other data than this "
            f"{type(iterator).__name__}: {check.reason(error)}"
        ) from error


def record_names(data: Any, position: Any) -> list[str]:
    """The names of the records in the batch at that position; [] for data without names."""
    source, order, plan = (getattr(data, name, None) for name in ("source", "order", "plan"))
    if source is None or order is None or plan is None or position is None:
        return []
    span = plan.span(position["epoch"], position["record"], 0)
    return [source.name(record) for record in order.records(*span)]
