"""Lists which parameters have Kronecker factors, and which a diagonal and why."""

import logging

import jax
import optax

from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree
from jdl.optim.kronecker.factors import Options, init, sides, told
from jdl.optim.kronecker.layers import Layers
from jdl.optim.kronecker.moments import find_layers, find_route

_logger = logging.getLogger(__name__)
_logged: set[str] = set()


def describe(
    objective: Objective,
    params: Params,
    *,
    optimizer: optax.GradientTransformation | None = None,
    curvature: str = "fisher",
    max_size: int = 2048,
    factors_dtype: str | None = None,
) -> str:
    """Lists parameters with factors, those with a diagonal and why, and the state's memory.

    A diagonal is exact where the uses of the parameter tell examples apart, else estimated.

    Args:
      objective: the model, the loss and a batch.
      params: of the model; their shapes are enough.
      optimizer: any other than `kfac`, for the memory of its whole state alone.
      curvature: as for `kfac`.
      max_size: as for `kfac`.
      factors_dtype: as for `kfac`.

    >>> import jax.numpy as jnp
    >>> from jdl.core.objective import Objective
    >>> from jdl.losses import squared_error
    >>> batch = {"x": jnp.ones((4, 3)), "label": jnp.ones((4, 2))}
    >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "scale": jnp.ones(2)}
    >>> def predict(p, b):
    ...     return (b["x"] @ p["w"] + p["b"][None]) * p["scale"][None]
    >>> objective = Objective.from_fns(predict, squared_error, batch)
    >>> print(describe(objective, params))
    factored: ['w'] with ['b'] (dense, 4×4 and 2×2)
    diagonal, exact: ['scale'] (used by mul)
    memory: 0.000212 MB of factors and inverses, 5.3 times the parameters
    curvature: fisher, by draws from the loss's output Hessian (diagonal)
    >>> print(describe(objective, params, optimizer=optax.adam(1e-3)))
    memory: 8.4e-05 MB of state, 2.1 times the parameters
    """
    if optimizer is not None:
        with told(objective, params):
            return _memory(jax.eval_shape(optimizer.init, params), "state", params)
    options = Options(curvature, max_size=max_size, dtype=factors_dtype)
    return "\n".join(_account(find_layers(objective, params), objective, params, options))


def _account(found: Layers, objective: Objective, params: Params, options: Options) -> list[str]:
    paths = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path) for path, _ in paths]

    def side(size: int, shape: tuple[int, ...]) -> str:
        return f"{size}×{size}" if len(shape) == 3 else f"diagonal {size}"

    lines = []
    for i, layer in found.known.items():
        n, d, k = layer.shape
        first, last = sides(layer, options)
        joined = "" if layer.bias is None else f" with {names[layer.bias]}"
        count = f", {n} times" if n > 1 else ""
        shapes = f"{side(d + 1, first)} and {side(k, last)}{count}"
        lines.append(f"factored: {names[i]}{joined} ({layer.kind}, {shapes})")
    for i, why in found.unknown.items():
        exact = ", exact" if i in found.separate else ""
        lines.append(f"diagonal{exact}: {names[i]} ({why})")
    how = "the loss's own gradients"
    if options.curvature != "empirical_fisher":
        route = find_route(objective, params)
        way = "draws from" if options.curvature == "fisher" else "every column of"
        how = f"{way} the loss's output Hessian ({route})"
        if route == "gradient":
            how = "the loss's own gradients, as its output Hessian is neither known nor small"
        elif ": gradient" in route:
            how += "; where that is `gradient`, by the loss's own gradients"
    if found.twice is None:
        lines.append("examples: axes of their number, as twice as many could not be traced")
    state = jax.eval_shape(lambda p: init(p, options, found), params)
    memory = _memory(state, "factors and inverses", params)
    return [*lines, memory, f"curvature: {options.curvature}, by {how}"]


def _memory(state: PyTree, what: str, params: Params) -> str:
    size, own = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(x)) for x in (params, state)
    )
    return f"memory: {own / 1e6:.3g} MB of {what}, {own / size:.2g} times the parameters"


def log(found: Layers, objective: Objective, params: Params, options: Options) -> None:
    """Logs the description once; warns where no layer is known."""
    account = ""
    if _logger.isEnabledFor(logging.INFO):
        account = "\n".join(_account(found, objective, params, options))
    elif not found.known:
        account = "; ".join(sorted(set(found.unknown.values())))
    if account in {"", *_logged}:
        return
    _logged.add(account)
    if not found.known:
        _logger.warning(
            "kfac knows none of the parameters' layers and takes all for diagonal: %s", account
        )
    else:
        _logger.info("kfac:\n%s", account)
