"""Updates of part of the parameters, inside optax.masked and optax.partition, or of a flat array.

A function of all parameters becomes one of the part, the others kept constant. A part has the
structure of the whole, with `optax.MaskedNode()` for each leaf or branch that is not in it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.flatten_util import ravel_pytree

from jdl.core import check, tree
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree


class Part:
    """Which leaves of `whole` are in `part`, and the conversions between them.

    >>> import jax.numpy as jnp
    >>> whole = {"a": jnp.ones(2), "b": jnp.ones(1)}
    >>> part = Part({"a": jnp.zeros(2), "b": optax.MaskedNode()}, whole)
    >>> part.of({"a": 1, "b": 2})["a"]
    1
    >>> part.filled({"a": jnp.zeros(2), "b": optax.MaskedNode()})["b"].tolist()
    [1.0]
    """

    def __init__(self, part: PyTree, whole: Params):
        self.part, self.whole = part, whole
        try:
            fits = _map(lambda branch: len(jax.tree.leaves(branch)) == 1, part, whole)
        except (ValueError, TypeError):
            fits = False
        check.argument(
            all(jax.tree.leaves(fits)),
            "whole_params",
            "all parameters, of which the optimizer is passed some",
            jax.tree.structure(whole),
        )

    def of(self, whole: PyTree) -> PyTree:
        """The part of a tree of the whole's structure."""
        return _map(lambda branch: branch, self.part, whole)

    def filled(self, part: PyTree) -> PyTree:
        """The whole with this part in it, and its own values elsewhere."""
        return jax.tree.map(
            lambda x, branch: branch if _is_masked(x) else x, part, self.whole, is_leaf=_is_masked
        )

    def function(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the whole as one of the part."""
        return lambda part: fn(self.filled(part))


class Flat(Part):
    """The conversions between parameters and the one array that optax.flatten makes of them.

    >>> import jax.numpy as jnp
    >>> flat = Flat.of_gradient(jnp.zeros(3), {"a": jnp.ones(2), "b": jnp.ones(1)})
    >>> flat.filled(jnp.arange(3.0))["b"].tolist()
    [2.0]
    """

    def __init__(self, like: PyTree):
        self.like = like

    @classmethod
    def of_gradient(cls, params: PyTree, grad: PyTree) -> "Flat | None":
        """The conversions, where `params` are the array of a tree like `grad`; else None."""
        flat = isinstance(params, jax.Array) and params.ndim == 1
        return cls(grad) if flat and tree.size(grad) == params.size else None

    def filled(self, part: PyTree) -> PyTree:
        """The array as a tree."""
        return ravel_pytree(self.like)[1](part)

    def of(self, whole: PyTree) -> PyTree:
        """A tree as the array."""
        return ravel_pytree(whole)[0]


def restricted(objective: Objective, part: Part) -> Objective:
    """The objective as a function of the part, the other parameters kept constant."""

    def apply(params: Params, *args: Any, **options: Any) -> Any:
        return objective.model.apply(part.filled(params), *args, **options)

    regularizer = objective.regularizer
    return dataclasses.replace(
        objective,
        model=objective.model._replace(apply=apply),
        regularizer=None if regularizer is None else part.function(regularizer),
    )


def _map(fn: Callable[[PyTree], Any], part: PyTree, whole: PyTree) -> PyTree:
    """`fn` of the whole's branches at the part's leaves; masked nodes stay."""
    return jax.tree.map(
        lambda x, branch: x if _is_masked(x) else fn(branch), part, whole, is_leaf=_is_masked
    )


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
