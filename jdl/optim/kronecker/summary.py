"""Lists which parameters have Kronecker factors, and which a diagonal and why."""

import logging

import jax

from jdl.core.objective import Objective
from jdl.core.types import Params
from jdl.optim.kronecker.layers import Layers
from jdl.optim.kronecker.moments import find_layers, find_route

_logger = logging.getLogger(__name__)
_logged: set[str] = set()


def describe(
    objective: Objective, params: Params, *, max_size: int = 4096, curvature: str = "fisher"
) -> str:
    """Lists parameters with factors, those with a diagonal and why, and how curvature is sampled.

    Args:
      objective: the model, the loss and a batch.
      params: of the model; their shapes are enough.
      max_size: as for `kfac`.
      curvature: as for `kfac`.

    >>> import jax.numpy as jnp
    >>> from jdl.core.objective import Objective
    >>> from jdl.losses import squared_error
    >>> batch = {"x": jnp.ones((4, 3)), "label": jnp.ones((4, 2))}
    >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "scale": jnp.ones(2)}
    >>> def predict(p, b):
    ...     return (b["x"] @ p["w"] + p["b"][None]) * p["scale"][None]
    >>> print(describe(Objective.from_fns(predict, squared_error, batch), params))
    factored: ['w'] with ['b'] (dense, 4×4 and 2×2)
    diagonal: ['scale'] (used by mul)
    curvature: fisher, by draws from the loss's output Hessian (diagonal)
    """
    found = find_layers(objective, params)
    return "\n".join(_account(found, objective, params, max_size, curvature))


def _account(
    found: Layers, objective: Objective, params: Params, max_size: int, curvature: str
) -> list[str]:
    paths = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path) for path, _ in paths]

    def side(size: int) -> str:
        return f"{size}×{size}" if size <= max_size else f"diagonal {size}"

    lines = []
    for i, layer in found.known.items():
        leaf = paths[i][1]
        sides = side(leaf.size // leaf.shape[-1] + 1), side(leaf.shape[-1])
        joined = "" if layer.bias is None else f" with {names[layer.bias]}"
        lines.append(f"factored: {names[i]}{joined} ({layer.kind}, {sides[0]} and {sides[1]})")
    lines += [f"diagonal: {names[i]} ({why})" for i, why in found.unknown.items()]
    how = "the loss's own gradients"
    if curvature != "empirical_fisher":
        route = find_route(objective, params)
        way = "draws from" if curvature == "fisher" else "every column of"
        how = f"{way} the loss's output Hessian ({route})"
        if route == "gradient":
            how = "the loss's own gradients, as its output Hessian is neither known nor small"
    return [*lines, f"curvature: {curvature}, by {how}"]


def log(found: Layers, objective: Objective, params: Params, max_size: int, curvature: str) -> None:
    """Logs the description once."""
    if _logger.isEnabledFor(logging.INFO):
        account = "\n".join(_account(found, objective, params, max_size, curvature))
        if account not in _logged:
            _logged.add(account)
            _logger.info("kfac:\n%s", account)
