"""Part of the parameters, as optax.masked and optax.partition hand it over.

A function of all parameters becomes one of the part, the others held where they are. A part has the
structure of the whole, with `optax.MaskedNode()` for each leaf or branch that it lacks.
"""

import contextlib
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from jdl.core import check
from jdl.core.types import Params, PyTree


class Part:
    """Which leaves of `whole` are in `part`, and how to go from one to the other.

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
        # A masked node may stand for a whole branch; how many arrays each leaf of the part covers.
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
            "all parameters, of which the optimizer is handed some",
            jax.tree.structure(whole),
        )
        self.lacking = [
            _is_masked(x)
            for x, branch in zip(leaves, branches, strict=True)
            for _ in jax.tree.leaves(branch)
        ]
        self._covered = [len(jax.tree.leaves(branch)) for branch in branches]

    def of(self, whole: PyTree) -> PyTree:
        """The part of a tree shaped as the whole."""
        leaves = iter(zip(jax.tree.leaves(whole), self.lacking, strict=True))
        groups = [[next(leaves) for _ in range(number)] for number in self._covered]
        return self.structure.unflatten(
            [group[0][0] if group and not group[0][1] else optax.MaskedNode() for group in groups]
        )

    def filled(self, part: PyTree, others: Params | None = None) -> PyTree:
        """The whole with this part in it, and `others` (the held values) elsewhere."""
        others = self.whole if others is None else others
        leaves = jax.tree.leaves(others)
        structure: Any = jax.tree.structure(others)
        given = iter(jax.tree.leaves(part))
        pairs = zip(leaves, self.lacking, strict=True)
        return structure.unflatten([x if out else next(given) for x, out in pairs])

    def padded(self, part: PyTree) -> PyTree:
        """The part among zeros."""
        return self.filled(part, jax.tree.map(jnp.zeros_like, self.whole))

    def function(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the whole as one of the part."""
        return lambda part: fn(self.filled(part))


class PartialObjective:
    """A `jdl.Objective` as a function of part of the parameters."""

    def __init__(self, objective: Any, part: Part):
        self.objective, self.part = objective, part

    def __getattr__(self, name: str) -> Any:
        # batch, key, axis_name, curvature_share: what has nothing to do with parameters
        return getattr(self.objective, name)

    def value(self, params: Params, **_: Any) -> jax.Array:
        """f(θ)."""
        return self.objective.value(self.part.filled(params))

    def value_and_grad(self, params: Params, **_: Any) -> tuple[jax.Array, Params, Any]:
        """f(θ), its gradient in the part, and the evaluation's `Aux`."""
        value, grad, aux = self.objective.value_and_grad(self.part.filled(params))
        return value, self.part.of(grad), aux

    def _product(self, product: Any, params: Params, vector: PyTree) -> PyTree:
        return self.part.of(product(self.part.filled(params), self.part.padded(vector)))

    def hvp(self, params: Params, vector: PyTree) -> PyTree:
        """The part's block of the Hessian times v."""
        return self._product(self.objective.hvp, params, vector)

    def gnvp(self, params: Params, vector: PyTree) -> PyTree:
        """The part's block of the Gauss-Newton matrix times v."""
        return self._product(self.objective.gnvp, params, vector)

    def efvp(self, params: Params, vector: PyTree) -> PyTree:
        """The part's block of the empirical Fisher matrix times v."""
        return self._product(self.objective.efvp, params, vector)

    def gram_product(self, fn: Any, params: Params, vector: PyTree) -> PyTree:
        """The part's block of Jᵀ J, J the Jacobian of `fn`, times v."""
        product = lambda p, v: self.objective.gram_product(fn, p, v)  # noqa: E731
        return self._product(product, params, vector)

    def fisher_diagonal(self, params: Params, key: Any) -> Params:
        """The part of the Fisher diagonal."""
        return self.part.of(self.objective.fisher_diagonal(self.part.filled(params), key))


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
