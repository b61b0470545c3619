r"""Pictures of a loss: planes through the space of parameters, and curves between two minima."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from jdl.core.objective import Objective
from jdl.core.types import Params
from jdl.curvature.landscape import Landscape, landscape_of


def loss_plane(
    of: Landscape | Objective,
    directions: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    params: Params | None = None,
) -> np.ndarray:
    """f(θ + x d₁ + y d₂), [len(y), len(x)], as `plt.contour` takes it.

    Args:
      of: a `Landscape`, which has its own parameters, or a `jdl.Objective`.
      directions: d₁ and d₂, [2, n]: eigenvectors, or two of `filter_normalized`.
      x: steps along d₁.
      y: steps along d₂.
      params: θ.

    >>> f = Objective.from_fns(lambda w, b: b["x"] @ w, lambda out, _: out**2, {"x": jnp.eye(2)})
    >>> loss_plane(f, np.eye(2), np.array([0.0, 2.0]), np.array([0.0]), jnp.zeros(2)).tolist()
    [[0.0, 2.0]]
    """
    land = landscape_of(of, params)

    def value(at: Any) -> float:
        return land.value(land.unravel(jnp.asarray(land.flat + at @ directions, land.flat.dtype)))

    return np.array([[value(np.array([a, b])) for a in x] for b in y])


def filter_normalized(params: Params, seed: int = 0) -> np.ndarray:
    """A random direction, [n], whose filters are as long as those of `params` (Li et al. 2018).

    Filters are the slices along an array's last axis. Arrays of one axis do not move.

    >>> filter_normalized({"w": jnp.array([[3.0]]), "b": jnp.ones(1)}, seed=1).tolist()
    [0.0, 3.0]
    """
    rng = np.random.default_rng(seed)

    def direction(x: jax.Array) -> np.ndarray:
        d, zero = rng.standard_normal(x.shape).astype(x.dtype), np.zeros(x.shape, x.dtype)
        own, drawn = (np.sqrt(np.sum(v * v, tuple(range(x.ndim - 1)))) for v in (np.asarray(x), d))
        return d * (own / drawn) if x.ndim > 1 else zero

    return np.asarray(ravel_pytree(jax.tree.map(direction, params))[0])


def connect(
    objective: Objective,
    first: Params,
    second: Params,
    *,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """The bend c, [n], of the curve of least mean loss between two minima.

        φ(t) = (1 − t)² θ₁ + 2 t (1 − t) c + t² θ₂

    Args:
      objective: the loss.
      first: θ₁.
      second: θ₂, of the same structure.
      optimizer: for c, which starts halfway; None for Adam at 0.01.
      steps: each at a random t.
      seed: for t.

    >>> ring = lambda w, b: b["x"] @ jnp.array([jnp.sum(w * w) - 1.0])
    >>> f = Objective.from_fns(ring, lambda out, _: out**2, {"x": jnp.ones((1, 1))})
    >>> bend = connect(f, jnp.array([1.0, 0.1]), jnp.array([-1.0, 0.1]))
    >>> float(f.value(jnp.zeros(2))), float(f.value(jnp.asarray(0.5 * bend))) < 0.2
    (1.0, True)

    References:
      Garipov et al., Loss surfaces, mode connectivity, and fast ensembling of DNNs (2018).
    """
    (start, unravel), end = ravel_pytree(first), ravel_pytree(second)[0]
    method = optimizer or optax.adam(1e-2)

    def loss(c: jax.Array, objective: Objective, t: jax.Array) -> jax.Array:
        at = (1 - t) ** 2 * start + 2 * t * (1 - t) * c + t**2 * end
        return objective.value(unravel(at))

    @jax.jit
    def trained(objective: Objective, c: jax.Array, ts: jax.Array) -> jax.Array:
        def step(carry: Any, t: jax.Array) -> Any:
            c, state = carry
            with jax.numpy_dtype_promotion("standard"):
                updates, state = method.update(jax.grad(loss)(c, objective, t), state, c)
            return (c + updates, state), ()

        return jax.lax.scan(step, (c, method.init(c)), ts)[0][0]

    ts = jax.random.uniform(jax.random.key(seed), (steps,), start.dtype)
    return np.asarray(trained(objective, 0.5 * (start + end), ts))
