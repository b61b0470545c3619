"""A `Model` from an Equinox, Haiku or Keras module; each package is needed only by its adapter."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdl.core import check
from jdl.core.model import Model, keywords
from jdl.core.types import Key, ModelState, Outputs, Params


def _package(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise check.MissingExtraError(name, None, f"jdl.from_{module}") from error


def from_equinox(build: Callable[[Key], Any]) -> Model:
    """A `Model` from an Equinox module, f(x₁), …, f(x_B) under `jax.vmap(axis_name="batch")`.

    Its floating-point arrays are the parameters, other arrays and an `equinox.nn.State` the model
    state, both by path. `__call__` takes one example of each input, then the state if there is one;
    it is passed `key=`, another for each example, if it accepts it. Outside of training the module
    is in `equinox.nn.inference_mode`.

    Args:
      build: `build(key) -> module`, or `(module, state)` as of `equinox.nn.make_with_state`; batch
        normalization needs `axis_name="batch"`.

    Raises:
      MissingExtraError: Equinox is not installed.

    >>> import equinox as eqx
    >>> model = from_equinox(lambda key: eqx.nn.Linear(3, 2, key=key))
    >>> params, state = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> {name: x.shape for name, x in params.items()}
    {'weight': (2, 3), 'bias': (2,)}
    >>> model.apply(params, state, jnp.ones((5, 3)))[0].shape
    (5, 2)
    """
    eqx = _package("equinox", "equinox")

    def both(key: Key) -> tuple[Any, Any]:
        made = build(key)
        return made if isinstance(made, tuple) else (made, None)

    template = eqx.filter_eval_shape(both, jax.random.key(0))
    found, structure = jax.tree.flatten_with_path(template)
    names = [
        "state/" * path[0].idx + jax.tree_util.keystr(path[1:], simple=True, separator="/")
        for path, _ in found
    ]
    kinds = [getattr(leaf, "dtype", None) for _, leaf in found]  # None of what is no array
    learned = {
        name
        for name, kind in zip(names, kinds, strict=True)
        if kind is not None and jnp.issubdtype(kind, jnp.inexact) and not name.startswith("state/")
    }
    takes_key = "key" in keywords(type(template[0]).__call__)

    def init(key: Key, *inputs: Any) -> tuple[Params, ModelState]:
        del inputs  # Equinox modules have their shapes when built
        leaves = dict(zip(names, jax.tree.leaves(both(key)), strict=True))
        arrays = {n: leaves[n] for n, kind in zip(names, kinds, strict=True) if kind is not None}
        params = {name: x for name, x in arrays.items() if name in learned}
        return params, {name: x for name, x in arrays.items() if name not in learned}

    def apply(
        params: Params,
        state: ModelState,
        *inputs: Any,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[Outputs, ModelState]:
        arrays = {**params, **state}
        leaves = [arrays.get(name, leaf) for name, (_, leaf) in zip(names, found, strict=True)]
        module, kept = jax.tree.unflatten(structure, leaves)
        if not train:
            module = eqx.nn.inference_mode(module)
        size = len(jax.tree.leaves(inputs)[0])
        keys = None if key is None or not takes_key else jax.random.split(key, size)

        def one(inputs: Any, key: Key | None) -> tuple[Outputs, Any]:
            options = {"key": key} if takes_key else {}
            if kept is None:
                return module(*inputs, **options), None
            return module(*inputs, kept, **options)

        axes = (0, None if keys is None else 0)
        outputs, new = jax.vmap(one, axes, (0, None), axis_name="batch")(inputs, keys)
        if not train or kept is None:
            return outputs, state
        of_state = [name for name in names if name.startswith("state/")]
        return outputs, {**state, **dict(zip(of_state, jax.tree.leaves(new), strict=True))}

    return Model(init, apply)


def from_haiku(forward: Callable[..., Outputs]) -> Model:
    """A `Model` from a function that calls Haiku modules: `haiku.transform_with_state(forward)`.

    Args:
      forward: `forward(*inputs) -> outputs`; it is passed whether it trains as `is_training=` or
        `train=`, if it has a keyword of that name. Random keys are there only in training.

    Raises:
      MissingExtraError: Haiku is not installed.

    >>> import haiku as hk
    >>> model = from_haiku(lambda x: hk.Linear(2)(x))
    >>> params, state = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> params["linear"]["w"].shape, model.apply(params, state, jnp.ones((5, 3)))[0].shape
    ((3, 2), (5, 2))
    """
    hk = _package("haiku", "dm-haiku")
    accepted = keywords(forward) & {"is_training", "train"}
    pure = hk.transform_with_state(forward)

    def init(key: Key, *inputs: Any) -> tuple[Params, ModelState]:
        # As in training, where Haiku makes the averages of its batch normalization.
        return pure.init(key, *inputs, **dict.fromkeys(accepted, True))

    def apply(
        params: Params,
        state: ModelState,
        *inputs: Any,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[Outputs, ModelState]:
        mode = dict.fromkeys(accepted, train)
        outputs, new = pure.apply(params, state, key if train else None, *inputs, **mode)
        return outputs, new if train else state

    return Model(init, apply)


def from_keras(model: Any) -> Model:
    """A `Model` from a Keras model or layer, on Keras's JAX backend: its `stateless_call`.

    The trainable variables are the parameters, all others but the states of random generators the
    model state, both by number and name. The initial values are those of the Keras model, for every
    seed; `keras.utils.set_random_seed` before it is built gives others. Random generators are
    seeded from the step's key. The Keras model itself keeps its weights.

    Args:
      model: a built `keras.Model` or `keras.Layer`, without regularizers and `add_loss`.

    Raises:
      MissingExtraError: Keras is not installed.
      ArgumentError: another backend, or a model that is not built or has losses of its own.

    >>> import keras
    >>> layers = [keras.Input((3,)), keras.layers.Dense(2, use_bias=False)]
    >>> model = from_keras(keras.Sequential(layers))
    >>> params, state = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> {name: x.shape for name, x in params.items()}
    {'0/kernel': (3, 2)}
    >>> model.apply(params, state, jnp.ones((5, 3)))[0].shape
    (5, 2)
    """
    keras = _package("keras", "keras")
    backend = keras.backend.backend()
    hint = "Set the environment variable KERAS_BACKEND=jax before Keras is imported."
    check.argument(backend == "jax", "keras.backend.backend()", "'jax'", backend, hint)
    check.argument(isinstance(model, keras.Layer), "model", "a Keras model or layer", model)
    hint = "Begin it with keras.Input, or call it once on an example."
    check.argument(model.built, "model", "built", "one without variables", hint)
    hint = "Pass a `regularizer` to the Estimator instead of regularizers and `add_loss`."
    check.argument(not model.losses, "model", "without losses of its own", model.losses, hint)
    # Numbered, since Keras counts the layers it has ever named.
    variables = (*model.trainable_variables, *model.non_trainable_variables)
    names = [f"{i}/{variable.name}" for i, variable in enumerate(variables)]
    count = len(model.trainable_variables)
    learned, others = names[:count], names[count:]
    seeds = [name for name in others if name.endswith("seed_generator_state")]

    def init(key: Key, *inputs: Any) -> tuple[Params, ModelState]:
        del key, inputs
        values = {n: jnp.array(v.value) for n, v in zip(names, variables, strict=True)}
        kept = [name for name in others if name not in seeds]
        return {name: values[name] for name in learned}, {name: values[name] for name in kept}

    def apply(
        params: Params,
        state: ModelState,
        *inputs: Any,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[Outputs, ModelState]:
        key = jax.random.key(0) if key is None else key
        fresh = [jax.random.bits(jax.random.fold_in(key, i), (2,)) for i in range(len(seeds))]
        given = {**state, **dict(zip(seeds, fresh, strict=True))}
        values = [params[name] for name in learned], [given[name] for name in others]
        outputs, new = model.stateless_call(*values, *inputs, training=train)
        found = dict(zip(others, new, strict=True))
        return outputs, {name: found[name] for name in state} if train else state

    return Model(init, apply)
