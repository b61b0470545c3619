r"""Gauss-Newton and Levenberg-Marquardt run to convergence.

f(x) = ½ ‖r(x)‖²,    ∇f = Jᵀ r,    J = ∂r/∂x
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import check, tree
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree
from jdl.optim.gauss_newton import gauss_newton
from jdl.optim.least_squares import by_columns
from jdl.optim.levenberg_marquardt import levenberg_marquardt
from jdl.optim.residuals import Residuals
from jdl.solvers import implicit
from jdl.solvers.iterative import Iterative
from jdl.solvers.madsen_nielsen import Solver, conjugate_gradients, madsen_nielsen
from jdl.solvers.options import split
from jdl.solvers.problem import Problem
from jdl.solvers.state import SolverState

CHUNK = 64  # columns of J computed at once
SMALL = 2**15  # entries of a J that is not worth reducing


class LeastSquaresExtra(NamedTuple):
    """Additional fields of a least-squares solver's state: `state.residual`, `state.delta`."""

    residual: PyTree  # r at the current parameters
    delta: Params  # the last step


class LeastSquares(Iterative):
    """Solvers for residuals r in place of a function: f = ½ ‖r‖²."""

    jac_fun: Callable[..., Any] | None = None

    def __init__(self, residual_fun: Any, *rest: Any, **options: Any):
        ok = not isinstance(residual_fun, Objective)
        must = "a function that returns residuals"
        hint = 'For Gauss-Newton steps on an objective use HessianFree, method="hessian_free".'
        check.argument(ok, "residual_fun", must, f"a {type(residual_fun).__name__}", hint)
        self.default_solve = implicit.dense
        self.searches_lines = False
        super().__init__(residual_fun, *rest, **options)
        self.residual_fun, self.plain = residual_fun, self.unrolled  # decomposes no J, has no loop
        self.searches_lines = not self.plain

    def _problem(self, fun: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Problem:
        def residual_and_aux(params: Params) -> tuple[PyTree, Any]:
            out = fun(params, *args, **kwargs)
            return out if self.has_aux else (out, None)

        def residual(params: Params) -> PyTree:
            return residual_and_aux(params)[0]

        def value(params: Params, **_: Any) -> jax.Array:
            r = residual(params)
            return 0.5 * tree.vdot(r, r)

        def evaluate(params: Params) -> tuple[jax.Array, Params, Any]:
            r, pull, aux = jax.vjp(residual_and_aux, params, has_aux=True)
            return 0.5 * tree.vdot(r, r), pull(r)[0], (r, aux)

        own = fun if isinstance(fun, Residuals) else residual
        return Problem(value, evaluate, arguments=(args, kwargs), residual_fn=own)

    def _check(self, problem: Problem, params: Params) -> None:
        assert problem.residual_fn is not None
        for leaf in jax.tree.leaves(jax.eval_shape(problem.residual_fn, params)):
            ok = jnp.issubdtype(leaf.dtype, jnp.floating)
            must = "a function that returns real floating-point residuals"
            check.argument(ok, "residual_fun", must, f"{leaf.dtype}{list(leaf.shape)}")

    def _extras(self, problem: Problem, params: Params) -> dict[str, Any]:
        """r and J; a tall J reduced to its triangular factor R, which gives the same steps."""
        fn = problem.residual_fn
        assert fn is not None
        if self.plain:
            args, kwargs = problem.arguments
            own = self.jac_fun
            jac_fn = None if own is None else lambda p: own(p, *args, **kwargs)
            return {"residual_fn": fn, "jac_fn": jac_fn}
        if isinstance(fn, Residuals):
            found = fn.linearized(params)
        else:
            found = by_columns(fn, params, CHUNK)
        m, n = found.jacobian.shape
        if m > 4 * n and m * n > SMALL:
            with jax.default_matmul_precision("highest"):
                factor = _triangular_factor(found.jacobian.T)
            found = found._replace(jacobian=factor, residual=None)
        return {"residual_fn": found}

    def _extra(self, aux: Any, delta: PyTree) -> tuple[Any, Any]:
        residual, own = aux
        return LeastSquaresExtra(residual, delta), own


class GaussNewton(LeastSquares):
    """Gauss-Newton with a line search, for up to some thousands of parameters.

    Args:
      residual_fun: `residual_fun(params, *args, **kwargs) -> r`, a pytree of arrays; or
        `jdl.optim.Residuals`, whose Jacobian is taken example by example.
      maxiter: maximum number of updates.
      tol: on the norm of the gradient Jᵀ r, and on the length of the last step.
      has_aux: whether residuals come as `(r, aux)`.
      **options: `jdl.solvers.options.SolverOptions`, and the arguments of `jdl.optim.gauss_newton`:
        rcond, max_parameters …

    >>> a = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    >>> solver = GaussNewton(lambda x, b: a @ x - b)
    >>> params, state = solver.run(jnp.zeros(2), jnp.array([6.0, 0.0, 0.0]))
    >>> [round(float(x), 3) for x in params], round(float(state.value), 3)
    ([5.0, -3.0], 3.0)
    """

    def __init__(
        self,
        residual_fun: Any,
        maxiter: int = 30,
        tol: float = 1e-5,
        *,
        has_aux: bool = False,
        **options: Any,
    ):
        own, of_optimizer = split(options)
        super().__init__(residual_fun, False, has_aux, maxiter, tol, **own)
        if self.plain:
            self.optimizer = madsen_nielsen(0.0, solver=conjugate_gradients)
        else:
            self.optimizer = gauss_newton(**of_optimizer)

    def _converged(self, params: Params, state: SolverState) -> jax.Array:
        rounding = 4 * jnp.finfo(state.error.dtype).eps * tree.norm(params)
        short = (state.iter_num == 0) | (tree.norm(state.delta) <= self.tol + rounding)
        return super()._converged(params, state) & short


class LevenbergMarquardt(LeastSquares):
    """Levenberg-Marquardt, for up to some thousands of parameters.

    Args:
      residual_fun: `residual_fun(params, *args, **kwargs) -> r`, a pytree of arrays; or
        `jdl.optim.Residuals`, whose Jacobian is taken example by example.
      maxiter: maximum number of updates.
      damping_parameter: the first λ in units of the largest entry of Jᵀ J's diagonal; None for 1e-3
        in units of each one's.
      stop_criterion: "grad-l2-norm", or "madsen-nielsen": ‖∇f‖∞ ≤ gtol or ‖δ‖ ≤ xtol (‖x‖ + xtol).
      tol: on the norm of the gradient Jᵀ r.
      xtol: on the step, for "madsen-nielsen".
      gtol: on the largest entry of the gradient, for "madsen-nielsen".
      solver: see `jdl.solvers.madsen_nielsen.madsen_nielsen`, which runs where this, `geodesic`,
        `jac_fun`, `damping_parameter` or `materialize_jac` is given.
      geodesic: likewise.
      jac_fun: `jac_fun(params, *args, **kwargs) -> J`.
      contribution_ratio_threshold: `largest_ratio` of `madsen_nielsen`.
      materialize_jac: accepted; only a function as `solver` does without J.
      has_aux: whether residuals come as `(r, aux)`.
      **options: `jdl.solvers.options.SolverOptions`, and the arguments of
        `jdl.optim.levenberg_marquardt`, which runs then: scaled, trust_region, max_parameters …

    >>> def residuals(x):  # Rosenbrock's
    ...     return jnp.stack([10.0 * (x[1] - x[0] ** 2), 1.0 - x[0]])
    >>> LevenbergMarquardt(residuals).run(jnp.array([-1.2, 1.0])).params.round(3).tolist()
    [1.0, 1.0]
    """

    def __init__(
        self,
        residual_fun: Any,
        maxiter: int = 30,
        damping_parameter: float | None = None,
        stop_criterion: str = "grad-l2-norm",
        tol: float = 1e-3,
        xtol: float = 1e-3,
        gtol: float = 1e-3,
        solver: Solver | None = None,
        geodesic: bool = False,
        *,
        jac_fun: Callable[..., Any] | None = None,
        materialize_jac: bool | None = None,
        contribution_ratio_threshold: float = 0.75,
        has_aux: bool = False,
        **options: Any,
    ):
        own, of_optimizer = split(options)
        super().__init__(residual_fun, False, has_aux, maxiter, tol, **own)
        check.one_of("stop_criterion", stop_criterion, ["grad-l2-norm", "madsen-nielsen"])
        check.in_range("xtol", xtol, 0.0)
        check.in_range("gtol", gtol, 0.0)
        self.stop_criterion, self.xtol, self.gtol = stop_criterion, xtol, gtol
        self.damping_parameter = 1e-3 if damping_parameter is None else damping_parameter
        self.solver, self.geodesic, self.materialize_jac = solver, geodesic, materialize_jac
        self.jac_fun = jac_fun
        self.plain |= geodesic or any(
            given is not None for given in (damping_parameter, solver, jac_fun, materialize_jac)
        )
        self.plain &= not of_optimizer
        if not self.plain:
            self.optimizer = levenberg_marquardt(damping=self.damping_parameter, **of_optimizer)
            return
        ok = solver != "qr" or materialize_jac is not False
        check.argument(ok, "materialize_jac", "True for solver='qr'", materialize_jac)
        self.searches_lines, self.patience = False, maxiter + 1  # many tries may fail
        self.optimizer = madsen_nielsen(
            self.damping_parameter,
            solver="cholesky" if solver is None else solver,
            geodesic=geodesic,
            largest_ratio=contribution_ratio_threshold,
        )

    def _converged(self, params: Params, state: SolverState) -> jax.Array:
        if self.stop_criterion == "grad-l2-norm":
            return super()._converged(params, state)
        largest = [jnp.max(jnp.abs(g)) for g in jax.tree.leaves(state.grad)]
        flat = jnp.max(jnp.stack(largest)) <= self.gtol
        short = tree.norm(state.delta) <= self.xtol * (tree.norm(params) + self.xtol)
        return flat | (short & (state.stepsize > 0))


def _triangular_factor(rows: jax.Array) -> jax.Array:
    """R [n, n] with Rᵀ R = A Aᵀ for `rows` A [n, m], as accurate as QR but by matrix products.

    Three passes of shifted Cholesky-QR (Fukaya et al. 2020): each factors the Gram matrix of the
    columns that the last pass orthogonalized, so that squaring loses no digits. LAPACK's QR of a
    tall matrix is bound by memory, and slow where other threads occupy the cores. The columns of Aᵀ
    are scaled to length 1 meanwhile: the shift must be small against the short ones too.
    """
    n = rows.shape[0]
    lengths = jnp.linalg.norm(rows, axis=1)
    rows = rows / jnp.where(lengths > 0, lengths, 1.0)[:, None]
    identity = jnp.eye(n, dtype=rows.dtype)
    r = identity
    for _ in range(3):
        gram = rows @ rows.T
        shift = 4 * jnp.finfo(rows.dtype).eps * jnp.trace(gram)
        lower = jnp.linalg.cholesky(gram + shift * identity)
        rows = jax.scipy.linalg.solve_triangular(lower, identity, lower=True) @ rows
        r = lower.T @ r
    return r * lengths[None]
