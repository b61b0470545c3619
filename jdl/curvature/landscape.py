r"""A loss averaged over all batches of a data set, around given parameters.

    f(θ) = Σ_b w_b f_b(θ) / Σ_b w_b,    w_b the examples of batch b

and likewise its gradient and its curvature products. The curvature of a single batch is noisy and,
at the top of the spectrum, biased upward: `rayleigh_by_batch` shows how much batches differ.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jdl.core import check, tree
from jdl.core.objective import Objective, batch_size
from jdl.core.types import Batch, Params, PyTree

METHODS = {"hessian": "hvp", "gauss_newton": "gnvp", "empirical_fisher": "efvp"}  # kind -> method


class Landscape:
    """A data set's loss around parameters; vectors are flat, in `ravel_pytree`'s order.

    Args:
      make: `make(batch) -> jdl.Objective`. Give it train=False: dropout's noise is not curvature.
      batches: an iterable of batches that can be iterated again (a list, or a data set of
        `jdl.data` with finite epochs); each product iterates over it once.
      params: where to evaluate, a pytree of floating-point arrays.
      max_batches: use only the first so many; None for all.
      kept_bytes: batches stay on the device after the first pass if they take no more than this.

    >>> predict = lambda w, batch: batch["x"] @ w
    >>> loss = lambda outputs, batch: 0.5 * jnp.square(outputs - batch["y"])
    >>> rows = [{"x": jnp.eye(2)[i : i + 1] * (i + 1.0), "y": jnp.ones(1)} for i in range(2)]
    >>> land = Landscape(lambda b: Objective.from_fns(predict, loss, b), rows, jnp.zeros(2))
    >>> land.value(), land.product("hessian", np.ones(2, np.float32)).tolist()
    (0.5, [0.5, 2.0])
    """

    def __init__(
        self,
        make: Callable[[Batch], Objective],
        batches: Iterable[Batch],
        params: Params,
        *,
        max_batches: int | None = None,
        kept_bytes: int = 2**30,
    ):
        ok = not isinstance(batches, Iterator)
        must = "an iterable that can be iterated again"
        check.argument(ok, "batches", must, type(batches).__name__, "Make a list of it.")
        flat, self.unravel = ravel_pytree(params)
        ok = flat.size > 0 and jnp.issubdtype(flat.dtype, jnp.floating)
        check.argument(ok, "params", "a pytree of floating-point arrays", str(flat.dtype))
        self.params = params
        self.flat = np.asarray(flat)
        if max_batches is not None:
            check.positive_int("max_batches", max_batches)
        self.objective, self._batches, self._kept_bytes = make, batches, kept_bytes
        self._max_batches = max_batches
        self._kept: list[Objective] | None = None

    @property
    def size(self) -> int:
        """The number of parameters, n."""
        return self.flat.size

    def objectives(self) -> Iterator[Objective]:
        """The objective of each batch, in order."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Objective] | None = []
        total = 0
        for batch in itertools.islice(self._batches, self._max_batches):
            objective = self.objective(batch)
            if kept is not None:
                total += sum(x.nbytes for x in jax.tree.leaves(objective.batch))
                if total > self._kept_bytes:
                    kept = None
                else:
                    objective = jax.tree.map(jnp.asarray, objective)
                    kept.append(objective)
            yield objective
        if kept == []:
            raise check.DataError("The data set gives no batch.")
        self._kept = kept

    def examples(self) -> tuple[int, int]:
        """The numbers of batches and of examples."""
        sizes = [_examples(objective) for objective in self.objectives()]
        return len(sizes), round(sum(sizes))

    def value(self, params: Params | None = None) -> float:
        """f(θ), at the landscape's own parameters or others."""
        at = self.params if params is None else params
        return float(self.mean(lambda o: _value(o, at)))

    def gradient(self, params: Params | None = None) -> np.ndarray:
        """∇f(θ), [n]."""
        at = self.params if params is None else params
        return np.asarray(self.mean(lambda o: _gradient(o, at)))

    def gradients(self) -> Iterator[tuple[np.ndarray, float]]:
        """∇f_b(θ) and w_b of each batch."""
        for objective in self.objectives():
            yield np.asarray(_gradient(objective, self.params)), _examples(objective)

    def product(self, kind: str, vector: Any) -> np.ndarray:
        """M v, [n], for the matrix M of that kind (see `operator`)."""
        of_batch = batch_product(kind)
        v = jnp.asarray(vector, self.flat.dtype)
        return np.asarray(self.mean(lambda o: of_batch(o, self.params, v)))

    def rayleigh_by_batch(self, kind: str, vectors: np.ndarray) -> np.ndarray:
        """⟨v, M_b v⟩ / ⟨v, v⟩ for each batch b and vector v, [batches, k]."""
        of_batch = batch_product(kind)

        def quotient(objective: Objective, v: jax.Array) -> float:
            product = of_batch(objective, self.params, v)
            return float(jnp.vdot(v, product) / jnp.vdot(v, v))

        flats = [jnp.asarray(vector, self.flat.dtype) for vector in vectors]
        return np.asarray([[quotient(o, v) for v in flats] for o in self.objectives()])

    def mean(self, part: Callable[[Objective], PyTree]) -> Any:
        """Σ_b w_b part(f_b) / Σ_b w_b, leaf by leaf."""
        total: Any = None
        weight = 0.0
        for objective in self.objectives():
            w = _examples(objective)
            scaled = jax.tree.map(lambda x, w=w: w * _wide(x), part(objective))
            total = scaled if total is None else jax.tree.map(jnp.add, total, scaled)
            weight += w
        return jax.tree.map(lambda x: x / max(weight, 1.0), total)


def landscape_of(of: Landscape | Objective, params: Params | None) -> Landscape:
    """The landscape itself, or that of one objective at these parameters."""
    params = params_of(of, params)
    return of if isinstance(of, Landscape) else Landscape(lambda _: of, [{}], params)


def params_of(of: object, params: Params | None) -> Params:
    """The parameters to evaluate at: a `Landscape`'s own, or `params` for anything else."""
    if isinstance(of, Landscape):
        check.argument(params is None, "params", "left out: the Landscape has its own", params)
        return of.params
    check.argument(params is not None, "params", "given unless `of` is a Landscape", None)
    return params


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(tree.accumulator(x.dtype))


def _examples(objective: Objective) -> float:
    mask = objective.batch.get("mask")
    if mask is not None:
        return float(np.sum(np.asarray(mask)))
    return float(batch_size(objective.batch, objective.inputs))


@jax.jit
def _value(objective: Objective, params: Params) -> jax.Array:
    return objective.value(params)


@jax.jit
def _gradient(objective: Objective, params: Params) -> jax.Array:
    return ravel_pytree(objective.grad(params))[0]


@functools.cache
def batch_product(kind: str) -> Callable[[Objective, Params, jax.Array], jax.Array]:
    """The compiled function (objective, params, vector) -> product, [n]."""
    method = METHODS[check.one_of("kind", kind, METHODS)]

    @jax.jit
    def product(objective: Objective, params: Params, vector: jax.Array) -> jax.Array:
        v = ravel_pytree(params)[1](vector)
        return ravel_pytree(getattr(objective, method)(params, v))[0]

    return product
