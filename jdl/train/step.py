"""The training step, the same for every optimizer of first or second order.

    value, grads, aux = objective.value_and_grad(params)
    updates, opt_state = optimizer.update(grads, opt_state, params,
        value=value, grad=grads, value_fn=objective.value, obj_fn=objective.value,
        objective=objective, whole_params=params)
    params = optax.apply_updates(params, updates)

All functions here are pure and not compiled; `jdl.train.parallel` compiles them.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdl.core import check, tree
from jdl.core.model import Model
from jdl.core.objective import Objective, asked, batch_size, check_mask
from jdl.core.types import Batch, Key, Loss, Metric, ModelState, Outputs, Params
from jdl.optim import diagnostics
from jdl.optim.kronecker import told
from jdl.train.parallel import own_examples

logger = logging.getLogger("jdl.train")

Logs = dict[str, jax.Array]
Metrics = Callable[[Outputs, Batch], Mapping[str, jax.Array]]  # several, float[B] each

_OF_BATCHES = 1 << 30  # folded into a step's key; the objective folds in devices and microbatches

Names = str | tuple[str, ...]

ROW_FIELDS = ("step", "seconds", "epoch", "split")  # of every row of the log

# The diagnostics of every second-order optimizer, which training logs.
UNIFORM_FIELDS = (
    "iterations",
    "evaluations",
    "gradient_equivalents",
    "step_size",
    "damping",
    "reduction_ratio",
    "linear_iterations",
    "termination",
)


def as_floats(logs: Mapping[str, jax.Array | np.ndarray], number: int = 1) -> dict[str, float]:
    """The logs of a step, or of the `number`th of several in one dispatch, as Python numbers."""
    return {name: float(np.ravel(x)[number - 1]) for name, x in jax.device_get(logs).items()}


class TrainState(NamedTuple):
    """All state that a step changes."""

    step: jax.Array  # int32, steps done
    params: Params
    model_state: ModelState
    opt_state: Any
    key: Key  # never changes: step k draws from fold_in(key, k)


class Program(NamedTuple):
    """The pure functions of one experiment.

    Attributes:
      init: `(key, batch) -> TrainState`.
      train: `(state, batch) -> (state, logs)`; logs are scalars of the step, with loss and metrics
        of the parameters before it.
      evaluate: `(params, model_state, batch) -> (sums, count)` over the batch's examples.
      predict: `(params, model_state, batch) -> outputs`.
      refuse: `(state, batch)` raises what the model or the loss raise outside of `jit`, where they
        know the numbers of the batch.
    """

    init: Callable[[Key, Batch], TrainState]
    train: Callable[[TrainState, Batch], tuple[TrainState, Logs]]
    evaluate: Callable[[Params, ModelState, Batch], tuple[Logs, jax.Array]]
    predict: Callable[[Params, ModelState, Batch], Outputs]
    refuse: Callable[[TrainState, Batch], None]


def build(
    model: Model,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    metrics: Mapping[str, Metric] | Metrics | None = None,
    inputs: Names = "image",
    regularizer: Callable[[Params], jax.Array] | None = None,
    batch_transform: Callable[[Batch, Key], Batch] | None = None,
    microbatches: int = 1,
    curvature_batch_size: int | None = None,
    axis_name: str | None = None,
    skip_nonfinite: bool = False,
    log_norms: bool = False,
) -> Program:
    """The program of a model, a loss and an optimizer.

    Args:
      model: the pure functions.
      loss: `loss(outputs, batch) -> float[B]`.
      optimizer: any optax transformation.
      metrics: name -> `metric(outputs, batch) -> float[B]`, logged beside the loss; or one function
        that gives a dict of them.
      inputs: the batch's entry that the model takes, or a tuple of several; () for the batch.
      regularizer: a scalar function of the parameters, added to the loss in training.
      batch_transform: `transform(batch, key) -> batch`, applied to each training batch.
      microbatches: slices a batch is cut into, to bound memory.
      curvature_batch_size: examples for curvature products, spread evenly over the batch; None for
        all of them.
      axis_name: the axis to reduce over, inside `jax.shard_map` only.
      skip_nonfinite: whether to drop a step whose loss or new parameters are not finite.
      log_norms: whether to log the norms of gradient and update.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    measured, model_inputs = _measures(metrics), _model_inputs(inputs)

    def init(key: Key, batch: Batch) -> TrainState:
        batch = scale_images(batch, inputs)
        init_key, step_key = jax.random.split(key)
        params, model_state = model.init(init_key, *model_inputs(batch))
        zero = jnp.zeros((), jnp.int32)
        objective = Objective(model, loss, model_state, batch, key=step_key, inputs=inputs)
        with told(objective, params):
            opt_state = _strongly_typed(optimizer.init(params))
        _refuse_more_than_gradients(loss, optimizer, opt_state, params)
        return TrainState(zero, params, model_state, opt_state, step_key)

    def train(state: TrainState, batch: Batch) -> tuple[TrainState, Logs]:
        batch, key = scale_images(batch, inputs), jax.random.fold_in(state.key, state.step)
        model_inputs(batch)
        if batch_transform is not None:
            batch = _transformed(batch_transform, batch, key)
        objective = Objective(
            model,
            loss,
            state.model_state,
            batch,
            curvature_batch=_subsample(batch, curvature_batch_size, inputs),
            key=key,
            inputs=inputs,
            regularizer=regularizer,
            microbatches=microbatches,
            axis_name=axis_name,
        )
        value, grads, aux = objective.value_and_grad(state.params)
        # optax mixes Python floats with integer counters, which strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(
                grads,
                state.opt_state,
                state.params,
                value=value,
                grad=grads,
                value_fn=objective.value,
                obj_fn=objective.value,
                objective=objective,
                whole_params=state.params,  # for optimizers inside optax.masked
            )
            params = optax.apply_updates(state.params, updates)
        sums, count = _sums(measured(aux.outputs, batch), batch, inputs)
        if axis_name is not None:
            sums, count = jax.lax.psum((sums, count), axis_name)
        logs = {"loss": value, **{k: v / jnp.maximum(count, 1.0) for k, v in sums.items()}}
        logs |= _optimizer_logs(opt_state, state.step)
        if log_norms:
            logs |= {"gradient_norm": tree.norm(grads), "update_norm": tree.norm(updates)}
        opt_state = _strongly_typed(opt_state)
        new = TrainState(state.step + 1, params, aux.model_state, opt_state, state.key)
        if skip_nonfinite:
            ok = jnp.isfinite(value) & tree.all_finite(params)
            new = tree.where(ok, new, state)._replace(step=new.step)
            logs["step_skipped"] = 1.0 - ok.astype(jnp.float32)
        return new, logs

    def forward(params: Params, model_state: ModelState, batch: Batch) -> Outputs:
        return model.apply(params, model_state, *model_inputs(batch), key=None, train=False)[0]

    def evaluate(params: Params, model_state: ModelState, batch: Batch) -> tuple[Logs, jax.Array]:
        batch = scale_images(batch, inputs)
        outputs = forward(params, model_state, batch)
        values = {"loss": asked(loss, "loss", outputs, batch), **measured(outputs, batch)}
        return _sums(values, batch, inputs)

    def predict(params: Params, model_state: ModelState, batch: Batch) -> Outputs:
        return forward(params, model_state, scale_images(batch, inputs))

    def refuse(state: TrainState, batch: Batch) -> None:
        batch, key = own_examples(dict(batch)), jax.random.key(0)
        if "mask" in batch:  # what is filled up counts nothing
            check_mask(batch["mask"], batch_size(batch, inputs))
            batch = jax.tree.map(lambda x, rows=batch["mask"] > 0: x[rows], batch)
        batch = scale_images(jax.tree.map(jnp.asarray, batch), inputs)
        if batch_transform is not None:
            batch = jax.jit(lambda batch: _transformed(batch_transform, batch, key))(batch)

        def value(params: Params, state: ModelState) -> jax.Array:
            return Objective(model, loss, state, batch, key=key, inputs=inputs).value(params)

        jax.eval_shape(value, state.params, state.model_state)  # nothing but the batch is known

    return Program(init, train, evaluate, predict, refuse)


def _refuse_more_than_gradients(loss: Loss, optimizer: Any, state: Any, params: Params) -> None:
    """Raises where a loss has a gradient alone and the optimizer asks for more."""
    why = getattr(loss, "gradient_only", None)
    if why is None:
        return
    try:
        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(optimizer.update, params, state, params)
    except Exception as error:
        hint = "Choose an optimizer that uses the gradient alone, such as adam."
        raise check.UserError(f"{why} {hint}") from error


def _transformed(transform: Any, batch: Batch, key: Key) -> Batch:
    """The batch after `batch_transform`, which must keep its entries, the mask among them."""
    check.argument(callable(transform), "batch_transform", "a function of (batch, key)", transform)
    new: Batch = transform(batch, jax.random.fold_in(key, _OF_BATCHES))
    ok = isinstance(new, Mapping) and {*batch} <= {*new}
    must = f"a function that returns a batch with the entries {sorted(batch)}"
    check.argument(ok, "batch_transform", must, new)
    return new


def _measures(metrics: Any) -> Metrics:
    """All metrics as one function."""
    if callable(metrics):
        function = metrics
        return lambda outputs, batch: _own_names(dict(asked(function, "metrics", outputs, batch)))
    named = {} if metrics is None else metrics
    must = "a dict of functions, or a function"
    check.argument(isinstance(named, Mapping), "metrics", must, metrics)
    _own_names(named)
    return lambda outputs, batch: {
        name: asked(metric, f"metrics[{name!r}]", outputs, batch) for name, metric in named.items()
    }


def _model_inputs(inputs: Names) -> Callable[[Batch], tuple[Any, ...]]:
    """The function of a batch that gives the model's inputs; warns of uint8 once."""
    names = (inputs,) if isinstance(inputs, str) else inputs
    warned: set[str] = set()

    def model_inputs(batch: Batch) -> tuple[Any, ...]:
        if not names:
            return (batch,)
        for name in names:
            check.argument(
                name in batch,
                "inputs",
                f"among the batch's entries {sorted(batch)}",
                name,
                "Name the entry that the model takes.",
            )
            if _is_bytes(batch[name]) and name not in warned:
                warned.add(name)
                logger.warning(
                    "%r is uint8%s: the model takes it as numbers of 0 to 255. Images, uint8 "
                    "[B, H, W, C] with C of 1, 3 or 4, are scaled to [0, 1]; give other pixels as "
                    "float32, class numbers and tokens as int32.",
                    name,
                    list(batch[name].shape),
                )
        return tuple(batch[name] for name in names)

    return model_inputs


def _own_names(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics; raises where one has the name of another column of the log."""
    taken = sorted({"loss", *ROW_FIELDS, *UNIFORM_FIELDS} & {*metrics})
    check.argument(
        not taken, "metrics", f"named other than {', '.join(map(repr, taken))}", list(metrics)
    )
    return dict(metrics)


def scale_images(batch: Batch, inputs: Names) -> dict[str, Any]:
    """The batch with the images among its inputs as float32 in [0, 1].

    Images are uint8 [B, H, W, C] with C of 1, 3 or 4. Other uint8 arrays, such as tokens [B, T],
    and entries that are not inputs stay as they are.

    >>> import numpy as np
    >>> batch = {"image": np.full((1, 1, 1, 3), 255, np.uint8), "word": np.ones((1, 2), np.uint8)}
    >>> scaled = scale_images(batch, ("image", "word"))
    >>> scaled["image"].tolist(), scaled["word"].tolist()
    ([[[[1.0, 1.0, 1.0]]]], [[1, 1]])
    """
    names = (inputs,) if isinstance(inputs, str) else inputs

    def scaled(name: str, x: Any) -> Any:
        is_image = name in names and _is_bytes(x) and x.ndim == 4 and x.shape[3] in (1, 3, 4)
        return jnp.asarray(x, jnp.float32) / 255.0 if is_image else x

    return {name: scaled(name, x) for name, x in batch.items()}


def _is_bytes(x: Any) -> bool:
    return getattr(x, "dtype", None) == jnp.uint8


def _sums(values: Mapping[str, jax.Array], batch: Batch, inputs: Names) -> tuple[Logs, jax.Array]:
    """The sum of each metric over the examples that the mask keeps, and their number."""
    mask = batch.get("mask")
    size = batch_size(batch, inputs)
    if mask is not None:
        check_mask(mask, size)
    kept = jnp.ones(size) if mask is None else mask.astype(jnp.float32)

    def total(name: str, values: jax.Array) -> jax.Array:
        check.argument(
            values.shape == (size,),
            f"metrics[{name!r}]",
            f"a function that returns one value per example, shape ({size},)",
            values.shape,
        )
        return jnp.sum(jnp.where(kept > 0, values.astype(jnp.float32) * kept, 0.0))

    return {name: total(name, x) for name, x in values.items()}, jnp.sum(kept)


def _optimizer_logs(opt_state: Any, step: jax.Array) -> Logs:
    """The optimizer's diagnostics; one gradient per step for an optimizer without."""
    found = diagnostics.read(opt_state)
    if found is None:
        return {"gradient_equivalents": (step + 1).astype(jnp.float32)}
    return {name: getattr(found, name) for name in UNIFORM_FIELDS}


def _strongly_typed(opt_state: Any) -> Any:
    """The same numbers without weak types, which change after a step and would compile twice."""

    def strong(x: Any) -> Any:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return x if is_key else jax.lax.convert_element_type(x, x.dtype)

    return jax.tree.map(strong, opt_state)


def _subsample(batch: Batch, size: int | None, inputs: Names) -> Batch | None:
    """`size` examples spread evenly over the batch, and so over the devices that share it."""
    if size is None:
        return None
    total = batch_size(batch, inputs)
    check.argument(
        1 <= size <= total, "curvature_batch_size", f"between 1 and the batch's {total}", size
    )
    stride = total // size
    return jax.tree.map(lambda x: x[: size * stride : stride], dict(batch))
