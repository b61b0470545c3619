"""Dead ReLU units of a model, found in its jaxpr, for models of any library."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdl.core.jaxpr import Evaluator, Site, bind
from jdl.core.model import Model


def dead_shares(model: Model, params: Any, state: Any, *inputs: Any) -> list[jax.Array]:
    """For each ReLU, the share of units that are 0 for every example and at every loop iteration.

    All units of a branch that is not taken are dead. ReLUs within `jax.custom_batching.custom_vmap`
    or `jax.shard_map`, and in a while loop under `jax.vmap`, are not found.

    Args:
      model: its `apply` is traced in evaluation mode.
      params: its parameters.
      state: its state.
      *inputs: its inputs, leading axis B.

    >>> from jdl.core.model import from_fns
    >>> model = from_fns(lambda key, x: (), lambda _, x: jax.nn.relu(x))
    >>> [float(s) for s in dead_shares(model, (), {}, jnp.array([[1.0, -1.0], [2.0, 0.0]]))]
    [0.5]
    """
    alive = _alive(model, params, state, *inputs)
    return [1.0 - jnp.mean(x.astype(jnp.float32)) for x in alive]


@partial(jax.jit, static_argnums=0)
def _alive(model: Model, params: Any, state: Any, *inputs: Any) -> list[jax.Array]:
    """For each ReLU, whether each unit is ever above 0; compiled once for a model."""

    def forward(params: Any, state: Any, *inputs: Any) -> Any:
        return model.apply(params, state, *inputs, key=None, train=False)[0]

    units: dict[tuple[int, ...], tuple[int, ...]] = {}

    def find(site: Site, inputs: list[Any], _: Any) -> None:
        if site.name == "max" and any(map(_is_zero, inputs)):
            units[site.place] = site.eqn.outvars[0].aval.shape[-1:]

    def gather(site: Site, inputs: list[Any], alive: Any) -> Any:
        if site.place not in alive:
            return None
        (y,) = bind(site.eqn, inputs)
        now = jnp.any(y > 0, axis=tuple(range(y.ndim - 1)))
        return [y], alive | {site.place: alive[site.place] | now}

    program = jax.make_jaxpr(forward)(params, state, *inputs)
    arguments = jax.tree.leaves((params, state, *inputs))
    jax.eval_shape(lambda *args: Evaluator(find, custom=True).run(program, args)[0], *arguments)
    alive = {place: jnp.zeros(shape, bool) for place, shape in units.items()}
    _, alive = Evaluator(gather, custom=True).run(program, arguments, alive)
    return [x for _, x in sorted(alive.items())]


def _is_zero(x: Any) -> bool:
    return not isinstance(x, jax.Array) and jnp.ndim(x) == 0 and bool(x == 0)
