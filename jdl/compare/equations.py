"""Problems of least squares: differential equations solved by networks, and a curve to fit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdl import metrics
from jdl.compare.problems import Problem, arrays_problem
from jdl.compare.results import Target
from jdl.core.model import from_fns
from jdl.core.types import Batch
from jdl.models.mlp import MLP

Field = Callable[[jax.Array], jax.Array]  # points [n, 2] -> values [n, 1]


def derivative(u: Field, *axes: int) -> Field:
    """∂u/∂xᵢ∂xⱼ… along the axes given.

    >>> u = lambda x: x[:, :1] ** 3 * x[:, 1:]
    >>> derivative(u, 0, 0)(jnp.array([[2.0, 5.0]])).tolist()
    [[60.0]]
    """
    for axis in axes:
        u = _along(u, axis)
    return u


def _along(u: Field, axis: int) -> Field:
    def slope(points: jax.Array) -> jax.Array:
        way = jnp.broadcast_to(jnp.eye(2)[axis], points.shape)
        return jax.jvp(u, (points,), (way,))[1]

    return slope


def pinn_poisson() -> Problem:
    """A network that solves Poisson's equation on the unit square: −Δu = f, u = 0 on its border.

        u(x, y) = 16 x (1 − x) y (1 − y) net(x, y),  net: 2-32-32-1 with tanh
        f = 2 π² sin πx sin πy,  whose solution is sin πx sin πy

    The outputs are the residuals Δu + f, scaled by 1 / 2π², and u; half the squared residual is
    the loss, and the squared relative error of u a metric: 10⁻⁹ is a relative L2 error of 3·10⁻⁵.

    References:
      Raissi, Perdikaris and Karniadakis, Physics-informed neural networks, Journal of Computational
      Physics 378, 2019.
    """

    def solution(points: Any) -> Any:
        return jnp.prod(jnp.sin(jnp.pi * points), axis=1, keepdims=True)

    def ansatz(net: Field, points: jax.Array) -> jax.Array:
        return jnp.prod(4.0 * points * (1.0 - points), axis=1, keepdims=True) * net(points)

    def residual(u: Field, points: jax.Array) -> jax.Array:
        curvature = derivative(u, 0, 0)(points) + derivative(u, 1, 1)(points)
        return curvature / (2 * jnp.pi**2) + solution(points)

    return _network("pinn-poisson", ansatz, residual, solution, 0.25, 1e-9)


def pinn_burgers() -> Problem:
    """A network that solves Burgers' equation, uₜ + u uₓ = ν uₓₓ, on −1 ≤ x ≤ 1, 0 ≤ t ≤ 1.

        u(x, t) = the values at t = 0 and x = ±1 + t (1 − x²) net(x, t)
        solution: the travelling front ½ − ½ tanh((x − t/2) / 4ν),  ν = 1/20

    Loss and metric are as for `pinn_poisson`; the mean square of the solution is taken over the
    points.

    References:
      Raissi, Perdikaris and Karniadakis, 2019, see `pinn_poisson`, section 2.1.
    """
    viscosity = 0.05

    def front(x: Any, t: Any) -> Any:
        return 0.5 - 0.5 * jnp.tanh((x - 0.5 * t) / (4 * viscosity))

    def split(points: Any) -> tuple[Any, Any]:
        return 2.0 * points[:, :1] - 1.0, points[:, 1:]

    def solution(points: Any) -> Any:
        return front(*split(points))

    def ansatz(net: Field, points: jax.Array) -> jax.Array:
        x, t = split(points)
        left, right = (front(end, t) - front(end, 0.0) for end in (-1.0, 1.0))
        known = front(x, 0.0) + 0.5 * (1.0 - x) * left + 0.5 * (1.0 + x) * right
        return known + t * (1.0 - x * x) * net(points)

    def residual(u: Field, points: jax.Array) -> jax.Array:
        # x runs twice as fast as the first coordinate.
        along, bend = 0.5 * derivative(u, 0)(points), 0.25 * derivative(u, 0, 0)(points)
        return derivative(u, 1)(points) + u(points) * along - viscosity * bend

    points = np.random.default_rng(0).random((100_000, 2)).astype(np.float32)
    mean_square = float(jnp.mean(jnp.square(solution(points))))
    return _network("pinn-burgers", ansatz, residual, solution, mean_square, 1e-8)


def _network(
    name: str,
    ansatz: Callable[[Field, jax.Array], jax.Array],
    residual: Callable[[Field, jax.Array], jax.Array],
    solution: Callable[[Any], Any],
    mean_square: float,
    target: float,
) -> Problem:
    """A network 2-32-32-1 whose outputs are an equation's residual and u at points of [0, 1]²."""
    net = MLP(widths=(32, 32), num_outputs=1, activation="tanh", kernel_init="glorot")

    def outputs(params: Any, points: jax.Array) -> dict[str, jax.Array]:
        def u(points: jax.Array) -> jax.Array:
            return ansatz(lambda x: jnp.asarray(net.apply({"params": params}, x)), points)

        return {"residual": residual(u, points), "u": u(points)}

    def loss(outputs: Any, batch: Batch) -> jax.Array:
        return 0.5 * jnp.square(outputs["residual"][:, 0])

    @metrics.direction("min")
    def relative_squared_error(outputs: Any, batch: Batch) -> jax.Array:
        error = outputs["u"] - solution(batch["image"])
        return jnp.square(error[:, 0]) / mean_square

    points = np.random.default_rng(0).random((1280, 2)).astype(np.float32)
    return arrays_problem(
        name,
        lambda: from_fns(lambda key, x: net.init(key, x)["params"], outputs),
        loss,
        {"image": points[:1024]},
        {"image": points[1024:]},
        target=Target("test_relative_squared_error", "at most", target),
        metrics={"relative_squared_error": relative_squared_error},
        about={"data": "1,024 random points for training, 256 for the test", "model": "2-32-32-1"},
    )


def curve_fit() -> Problem:
    """A sum of three exponentials, 24 points: Lanczos' problem, nearly the same for other numbers.

        y(t) = .0951 e⁻ᵗ + .8607 e⁻³ᵗ + 1.5576 e⁻⁵ᵗ,  t = 0, .05 … 1.15

    from (1.2, .3, 5.6, 5.5, 6.5, 7.6), each number times a random factor between .9 and 1.1. The
    target is a mean of ½ r² of at most 10⁻¹⁰.

    References:
      Lanczos, Applied analysis (1956), page 272; NIST, Statistical reference datasets, Lanczos1.
    """
    t = 0.05 * np.arange(24.0)
    amplitudes, rates = np.array([0.0951, 0.8607, 1.5576]), np.array([1.0, 3.0, 5.0])
    y = np.exp(-np.outer(t, rates)) @ amplitudes

    def init(key: Any, x: Any) -> Any:
        del x
        factors = jax.random.uniform(key, (2, 3), minval=0.9, maxval=1.1)
        start = factors * jnp.array([[1.2, 5.6, 6.5], [0.3, 5.5, 7.6]])
        return {"amplitude": start[0], "rate": start[1]}

    def fitted(params: Any, t: jax.Array) -> jax.Array:
        return jnp.exp(-t * params["rate"][None]) @ params["amplitude"][:, None]

    def loss(outputs: jax.Array, batch: Batch) -> jax.Array:
        return 0.5 * jnp.square(outputs[:, 0] - batch["label"])

    return arrays_problem(
        "curve-fit",
        lambda: from_fns(init, fitted),
        loss,
        {"image": t[:, None].astype(np.float32), "label": y.astype(np.float32)},
        target=Target("train_loss", "at most", 1e-10),
        validation=0.0,
        metrics={},
        about={"data": "Lanczos1 of NIST's reference datasets", "model": "3 exponentials"},
    )
