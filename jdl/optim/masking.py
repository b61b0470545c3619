"""Updates of part of the parameters, inside optax.masked and optax.partition.

A function of all parameters becomes one of the part, the others kept constant. A part has the
structure of the whole, with `optax.MaskedNode()` for each leaf or branch that is not in it.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import optax

from jdl.core import check
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree


class Part:
    """Which leaves of `whole` are in `part`, and the conversions between them.

    >>> whole = {"a": jnp.ones(2), "b": jnp.ones(1)}
    >>> part = Part({"a": jnp.zeros(2), "b": optax.MaskedNode()}, whole)
    >>> part.of({"a": 1, "b": 2})["a"]
    1
    >>> part.filled({"a": jnp.zeros(2), "b": optax.MaskedNode()})["b"].tolist()
    [1.0]
    """

    def __init__(self, part: PyTree, whole: Params):
        self.whole = whole
        leaves, structure = jax.tree.flatten(part, is_leaf=_is_masked)
        self.structure: Any = structure
        # A masked node may replace a whole branch: each leaf of the part covers several arrays.
        branches: list[Any] = []
        with contextlib.suppress(ValueError, TypeError):
            branches = cast(Any, structure).flatten_up_to(whole)
        check.argument(
            len(branches) == len(leaves)
            and all(
                _is_masked(x) or len(jax.tree.leaves(branch)) == 1
                for x, branch in zip(leaves, branches, strict=False)
            ),
            "whole_params",
            "all parameters, of which the optimizer is passed some",
            jax.tree.structure(whole),
        )
        self.lacking = [
            _is_masked(x)
            for x, branch in zip(leaves, branches, strict=True)
            for _ in jax.tree.leaves(branch)
        ]
        self._covered = [len(jax.tree.leaves(branch)) for branch in branches]

    def of(self, whole: PyTree) -> PyTree:
        """The part of a tree of the whole's structure."""
        leaves = iter(zip(jax.tree.leaves(whole), self.lacking, strict=True))
        groups = [[next(leaves) for _ in range(number)] for number in self._covered]
        return self.structure.unflatten(
            [group[0][0] if group and not group[0][1] else optax.MaskedNode() for group in groups]
        )

    def filled(self, part: PyTree) -> PyTree:
        """The whole with this part in it, and its own values elsewhere."""
        leaves = jax.tree.leaves(self.whole)
        structure: Any = jax.tree.structure(self.whole)
        given = iter(jax.tree.leaves(part))
        pairs = zip(leaves, self.lacking, strict=True)
        return structure.unflatten([x if out else next(given) for x, out in pairs])

    def function(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the whole as one of the part."""
        return lambda part: fn(self.filled(part))


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


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
