"""A model as two pure functions, from Flax Linen, Flax NNX, or plain functions.

    params, state   = model.init(key, *inputs)
    outputs, state' = model.apply(params, state, *inputs, key=key, train=True)

`params` is what an optimizer changes, `state` the model's other arrays (batch statistics,
persistent Markov chains), or `{}`. Of the core only this file uses Flax, and imports it in the
adapters.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jdl.core import check
from jdl.core.types import Key, ModelState, Outputs, Params


class Model(NamedTuple):
    """A pair of pure functions.

    Attributes:
      init: `init(key, *inputs) -> (params, state)`.
      apply: `apply(params, state, *inputs, key=None, train=False) -> (outputs, state)`; `key`
        is for dropout and other randomness, and is needed only in training.
    """

    init: Callable[..., tuple[Params, ModelState]]
    apply: Callable[..., tuple[Outputs, ModelState]]


@runtime_checkable
class ModelLike(Protocol):
    """A `Model` or a Flax Linen module: all that `as_model` takes."""

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the parameters."""

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the outputs."""


def from_fns(init: Callable[..., Params], apply: Callable[..., Outputs]) -> Model:
    """A stateless `Model` from two plain functions.

    Args:
      init: `init(key, *inputs) -> params`.
      apply: `apply(params, *inputs) -> outputs`; it is passed `key` and `train` if it has keywords
        of these names.

    >>> line = from_fns(lambda key, x: {"slope": jnp.ones(())}, lambda p, x: p["slope"] * x)
    >>> params, state = line.init(jax.random.key(0), jnp.ones(3))
    >>> line.apply(params, state, jnp.ones(3))[0].tolist()
    [1.0, 1.0, 1.0]
    """
    accepted = keywords(apply) & {"key", "train"}

    def model_init(key: Key, *inputs: Any) -> tuple[Params, ModelState]:
        return init(key, *inputs), {}

    def model_apply(
        params: Params,
        state: ModelState,
        *inputs: Any,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[Outputs, ModelState]:
        offered = {"key": key, "train": train}
        return apply(params, *inputs, **{k: offered[k] for k in accepted}), state

    return Model(model_init, model_apply)


def from_linen(module: Any) -> Model:
    """A `Model` from a Flax Linen module.

    The collection `params` becomes the parameters, every other collection the state.
    `__call__` is passed `train=` or `deterministic=`, whichever it accepts, if any. Randomness
    after initialization comes from one key under the name `dropout`.

    >>> import flax.linen as nn
    >>> model = from_linen(nn.Dense(2))
    >>> params, state = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> model.apply(params, state, jnp.ones((5, 3)))[0].shape
    (5, 2)
    """
    accepted = keywords(type(module).__call__)

    def mode(train: bool) -> dict[str, Any]:
        if "train" in accepted:
            return {"train": train}
        return {"deterministic": not train} if "deterministic" in accepted else {}

    def init(key: Key, *inputs: Any) -> tuple[Params, ModelState]:
        params_key, dropout_key = jax.random.split(key)
        rngs = {"params": params_key, "dropout": dropout_key}
        with bytes_refused():
            variables = dict(module.init(rngs, *inputs, **mode(False)))
        params = variables.pop("params", {})
        return params, variables

    def apply(
        params: Params,
        state: ModelState,
        *inputs: Any,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[Outputs, ModelState]:
        variables = {"params": params, **state}
        rngs = {} if key is None else {"dropout": key}
        options = mode(train) | ({"mutable": list(state)} if train and state else {})
        with bytes_refused():
            found = module.apply(variables, *inputs, rngs=rngs, **options)
        return found if train and state else (found, state)

    return Model(init, apply)


def bytes_refused() -> Any:
    """A context in which Linen's dense and convolutional layers refuse uint8.

    They would use it as numbers of 0 to 255, whether it is unscaled pixels or class numbers.
    """
    import flax.linen as nn

    layers = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose)

    def refuse(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        given = args[0] if args else None
        check.argument(
            not (isinstance(context.module, layers) and getattr(given, "dtype", None) == jnp.uint8),
            "inputs",
            f"floating-point numbers for {type(context.module).__name__}",
            f"uint8{[*getattr(given, 'shape', ())]}",
            "Images are scaled to [0, 1] where they are uint8 [B, H, W, C] with C of 1, 3 or 4; "
            "give other pixels as float32, and pass class numbers to an Embed.",
        )
        return method(*args, **kwargs)

    return nn.intercept_methods(refuse)


def from_nnx(build: Callable[[Any], Any]) -> Model:
    """A `Model` from a Flax NNX module.

    `nnx.Param` variables become the parameters, all others except random-number state the model
    state. At each call random streams are seeded from the step's key, so that a step is a pure
    function of its arguments.

    Args:
      build: `build(rngs) -> nnx.Module`, with `rngs: nnx.Rngs`.

    >>> from flax import nnx
    >>> model = from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
    >>> params, state = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> model.apply(params, state, jnp.ones((5, 3)))[0].shape
    (5, 2)
    """
    from flax import nnx

    def split(module: Any) -> Any:
        return nnx.split(module, nnx.Param, nnx.RngState, ...)

    def graph(train: bool) -> tuple[Any, Any]:
        module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        (module.train if train else module.eval)()
        graphdef, _, streams, _ = split(module)
        return graphdef, nnx.to_pure_dict(streams)

    graphs = {train: graph(train) for train in (False, True)}

    def reseeded(streams: Any, key: Key | None) -> Any:
        key = jax.random.key(0) if key is None else key
        leaves, structure = jax.tree.flatten(streams)
        fresh = [
            jax.random.fold_in(key, i)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, fresh)

    def init(key: Key, *inputs: Any) -> tuple[Params, ModelState]:
        del inputs  # NNX modules have their shapes when built
        _, params, _, state = split(build(nnx.Rngs(key)))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def apply(
        params: Params,
        state: ModelState,
        *inputs: Any,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[Outputs, ModelState]:
        graphdef, streams = graphs[train]
        module = nnx.merge(graphdef, params, reseeded(streams, key), state)
        outputs = module(*inputs)
        return outputs, nnx.to_pure_dict(split(module)[3])

    return Model(init, apply)


def with_compute_dtype(model: Model, dtype: Any) -> Model:
    """The same model, computing in `dtype`; parameters, state and outputs stay float32.

    Losses, gradients and optimizers' arithmetic are float32 too, since parameters are cast inside
    the function that is differentiated.

    Args:
      model: any model.
      dtype: such as "bfloat16".

    >>> line = from_fns(lambda key, x: jnp.ones(()), lambda slope, x: slope * x)
    >>> half = with_compute_dtype(line, "bfloat16")
    >>> half.apply(jnp.float32(1 / 3), {}, jnp.ones(1))[0].tolist(), round(1 / 3, 8)
    ([0.333984375], 0.33333333)
    """
    try:
        narrow = jnp.dtype(dtype)
    except TypeError:
        narrow = jnp.dtype(bool)  # refused just below
    floating = jnp.issubdtype(narrow, jnp.floating)
    check.argument(floating, "compute_dtype", "a floating type such as 'bfloat16'", dtype)

    def cast(x: Any, to: Any) -> Any:
        floating = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.asarray(x, to) if floating else x

    def apply(
        params: Params, state: ModelState, *inputs: Any, **options: Any
    ) -> tuple[Outputs, ModelState]:
        params, inputs = jax.tree.map(lambda x: cast(x, narrow), (params, inputs))
        with jax.numpy_dtype_promotion("standard"):  # float32 state meets narrow activations
            outputs, new_state = model.apply(params, state, *inputs, **options)
        new_state = jax.tree.map(lambda x, old: cast(x, old.dtype), new_state, state)
        return jax.tree.map(lambda x: cast(x, jnp.float32), outputs), new_state

    return Model(model.init, apply)


def with_remat(model: Model) -> Model:
    """The same model, whose gradient computes the activations again instead of storing them.

    >>> line = from_fns(lambda key, x: jnp.ones(()), lambda slope, x: jnp.sin(slope * x))
    >>> spared = with_remat(line)
    >>> float(jax.grad(lambda s: spared.apply(s, {}, jnp.ones(()))[0])(0.0))
    1.0
    """

    def apply(
        params: Params, state: ModelState, *inputs: Any, key: Key | None = None, **options: Any
    ) -> tuple[Outputs, ModelState]:
        again = jax.checkpoint(functools.partial(model.apply, **options))
        return again(params, state, *inputs, key=key)

    return Model(model.init, apply)


def as_model(model: Any) -> Model:
    """`model` itself, or the `Model` from a Linen module."""
    if isinstance(model, Model):
        return model
    is_linen = callable(getattr(model, "init", None)) and callable(getattr(model, "apply", None))
    check.argument(
        is_linen and not isinstance(model, type),
        "model",
        "a jdl.Model or a Flax Linen module",
        model,
        f"It is a class: call it, {model.__name__}(…)."
        if isinstance(model, type)
        else "Wrap it with jdl.from_nnx, from_equinox, from_haiku or from_keras, or functions with "
        "jdl.from_fns.",
    )
    return from_linen(model)


def keywords(function: Callable[..., Any]) -> set[str]:
    """The names of arguments that `function` accepts as keywords."""
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(function).parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name for name, p in parameters.items() if p.kind in kinds}
