r"""Residuals of independent examples, whose Jacobian is taken example by example.

    r(θ) = (√w r(θ, x) for x in X),    J = (√w ∂r/∂θ(θ, x) for x in X)

A row of J takes the derivatives of one example's residual, not of all of them: J costs about as
much as a gradient for each residual of an example, and is [m, n] for m residuals, n parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jdl.core import check, tree
from jdl.core.derivatives import hvp
from jdl.core.objective import Objective, fisher_loss
from jdl.core.types import Batch, Params, PyTree

CHUNK = 1024  # examples whose rows are computed at once
MOST_OUTPUTS = 64  # of an example, whose Hessian of the loss is decomposed


class Linearized(NamedTuple):
    """Residuals around θ, in place of a function of θ.

    Attributes:
      jacobian: J, [m, n], its columns in `ravel_pytree`'s order.
      residual: r, [m]; None for a J reduced to a square factor, whose steps do not need it.
      products: what J cost, in Gauss-Newton products.
    """

    jacobian: jax.Array
    residual: jax.Array | None
    products: float

    def __call__(self, params: Params) -> jax.Array | None:
        """r."""
        del params
        return self.residual


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["examples", "weights"],
    meta_fields=["functions"],
)
@dataclass(frozen=True, eq=False)
class Residuals:
    """Residuals r(θ) of one or several families of examples, as a function of the parameters.

    Pass it as `residual_fn` to `jdl.optim.levenberg_marquardt` or `gauss_newton`, or as the
    function of a solver of `jdl.solvers`. It is a pytree, and so can be an argument of a jitted
    function. `+` joins families: those of an equation inside a region and of its border, say.

    Attributes:
      functions: of each family, `function(params, example) -> residuals`, a pytree of arrays.
      examples: of each family, a pytree of arrays with one leading axis.
      weights: of each family, the factor w > 0 on its squared residuals.

    >>> line = Residuals.of(lambda p, x: p[0] + p[1] * x["t"] - x["y"],
    ...                     {"t": jnp.arange(3.0), "y": jnp.array([1.0, 3.0, 5.0])})
    >>> prior = Residuals.of(lambda p, _: p, jnp.zeros(1), weight=4.0)
    >>> r = line + prior
    >>> r(jnp.array([1.0, 1.0])).tolist()
    [0.0, -1.0, -2.0, 2.0, 2.0]
    >>> r.jacobian(jnp.zeros(2)).tolist()
    [[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [2.0, 0.0], [0.0, 2.0]]
    """

    functions: tuple[Callable[[Params, Any], PyTree], ...]
    examples: tuple[PyTree, ...]
    weights: tuple[Any, ...]

    @classmethod
    def of(
        cls, function: Callable[[Params, Any], PyTree], examples: PyTree, weight: Any = 1.0
    ) -> "Residuals":
        """One family.

        Args:
          function: `function(params, example) -> residuals`, of a single example.
          examples: a pytree of arrays with one leading axis.
          weight: the factor w > 0 on the squared residuals; 1 / len(examples) for their mean.
        """
        sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(examples)}
        ok = len(sizes) == 1 and () not in sizes and (0,) not in sizes
        check.argument(ok, "examples", "arrays of one leading axis, of at least 1 example", sizes)
        return cls((function,), (examples,), (weight,))

    def __add__(self, other: "Residuals") -> "Residuals":
        return Residuals(
            self.functions + other.functions,
            self.examples + other.examples,
            self.weights + other.weights,
        )

    def __call__(self, params: Params) -> jax.Array:
        """r(θ), [m]: family by family, example by example."""
        return jnp.concatenate(
            [jax.vmap(partial(one, params))(x).ravel() for one, x in self._families()]
        )

    def jacobian(self, params: Params) -> jax.Array:
        """∂r/∂θ, [m, n], its columns in `ravel_pytree`'s order."""
        flat, unravel = ravel_pytree(params)
        parts = []
        with jax.default_matmul_precision("highest"):
            for one, examples in self._families():

                def of(v: jax.Array, x: Any, one: Any = one) -> jax.Array:
                    return one(unravel(v), x)

                parts.append(by_example(partial(_rows, of, flat), examples))
        return jnp.concatenate([x.reshape(-1, flat.size) for x in parts])

    def linearized(self, params: Params) -> Linearized:
        """r and J at θ."""
        residual = self(params)
        examples = sum(len(jax.tree.leaves(x)[0]) for x in self.examples)
        return Linearized(self.jacobian(params), residual, 0.75 * residual.size / examples)

    def _families(self) -> list[tuple[Callable[[Params, Any], jax.Array], PyTree]]:
        def weighted(function: Any, weight: Any, params: Params, example: Any) -> jax.Array:
            flat = ravel_pytree(function(params, example))[0]
            return flat * jnp.sqrt(jnp.asarray(weight, flat.dtype))

        return [
            (partial(weighted, function, weight), examples)
            for function, examples, weight in zip(
                self.functions, self.examples, self.weights, strict=True
            )
        ]


def by_example(function: Callable[[Any], Any], examples: PyTree) -> Any:
    """The function of every example, `CHUNK` of them at once."""
    size = len(jax.tree.leaves(examples)[0])
    if size <= CHUNK:
        return jax.vmap(function)(examples)
    return jax.lax.map(function, examples, batch_size=CHUNK)


def _rows(function: Callable[[jax.Array, Any], jax.Array], flat: jax.Array, example: Any) -> Any:
    """∂function/∂θ of one example, [k, n], by the mode with fewer passes."""
    k = jax.eval_shape(function, flat, example).size
    mode: Any = jax.jacrev if k <= flat.size else jax.jacfwd
    return mode(function)(flat, example)


def of_objective(objective: Objective, params: Params, dtype: Any) -> Linearized | None:
    """The rows √Λ Uᵀ J of each example's outputs, for ∇²ℓ = U Λ Uᵀ in the outputs.

    None where the rows would not save time or memory, and where the batch's rows are not
    independent examples, or not with the same randomness: with dropout, batch statistics, a
    regularizer, several devices or slices of the batch.
    """
    batch = objective.batch_for_curvature
    loss = fisher_loss(objective.loss)
    convex = replace(objective, loss=loss, curvature_batch=None)
    outputs = jax.eval_shape(lambda p: objective.apply(p, batch, objective.key)[0], params)
    examples = objective.num_examples(batch)
    k = tree.size(outputs) // examples
    size = tree.size(params)
    plain = objective.key is None and not jax.tree.leaves(objective.model_state)
    plain &= objective.regularizer is None
    plain &= objective.microbatches == 1 and objective.axis_name is None
    few = k <= MOST_OUTPUTS and k * examples <= 4 * size
    if not (plain and few and getattr(loss, "of_outputs", True)):
        return None
    if not _are_independent(convex, params, batch):
        return None
    flat, unravel = ravel_pytree(params)
    total = objective.total_weight(batch)

    def rows(example: Batch) -> tuple[jax.Array, jax.Array]:
        one = jax.tree.map(lambda x: x[None], example)
        z, unravel_z = ravel_pytree(objective.apply(params, one, None)[0])
        f = lambda z: convex.mean_loss(unravel_z(z), one, total)  # noqa: E731
        hessian = jax.vmap(lambda v: hvp(f, z, v))(jnp.eye(k, dtype=z.dtype)).astype(dtype)
        values, vectors = jnp.linalg.eigh(hessian)
        kept = values > jnp.finfo(dtype).eps * k * jnp.max(values)
        roots = jnp.sqrt(jnp.where(kept, values, 0.0))
        slopes = vectors.T @ jax.grad(f)(z).astype(dtype)
        predict = lambda v, b: ravel_pytree(objective.apply(unravel(v), b, None)[0])[0]  # noqa: E731
        jacobian = _rows(predict, flat, one).astype(dtype)
        return roots[:, None] * (vectors.T @ jacobian), jnp.where(
            kept, slopes / jnp.where(kept, roots, 1.0), 0.0
        )

    with jax.default_matmul_precision("highest"):
        jacobian, residual = by_example(rows, dict(batch))
    share = objective.curvature_share()
    return Linearized(jacobian.reshape(-1, size), residual.ravel(), 0.75 * k * share)


def _are_independent(objective: Objective, params: Params, batch: Batch) -> bool:
    """Whether outputs and loss of three random examples are those of each alone."""
    random = np.random.default_rng(0)

    def some(x: Any, shape: tuple[int, ...]) -> Any:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.asarray(random.normal(size=shape), x.dtype)
        return jnp.asarray(random.integers(0, 2, shape), x.dtype)

    def tried(params: Params, batch: Batch) -> tuple[Any, Any]:
        z = objective.apply(params, batch, None)[0]
        return z, objective.loss(z, batch)

    @jax.jit
    def equal(params: Params, batch: Batch) -> jax.Array:
        ones = jax.vmap(lambda b: tried(params, jax.tree.map(lambda x: x[None], b)))(batch)
        close = jax.tree.map(
            lambda x, y: jnp.allclose(x, y.reshape(x.shape), 1e-2, 1e-3, equal_nan=True),
            tried(params, batch),
            ones,
        )
        return jnp.all(jnp.stack(jax.tree.leaves(close)))

    try:
        with jax.ensure_compile_time_eval():
            own = jax.tree.map(lambda x: some(x, x.shape), params)
            three = jax.tree.map(lambda x: some(x, (3, *x.shape[1:])), dict(batch))
            return bool(equal(own, three))
    except (jax.errors.JAXTypeError, TypeError):  # the model closes over values being traced
        return False
