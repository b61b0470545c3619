"""Estimators of one function that serves three modes, as in TensorFlow's Estimator.

    def model_fn(features, labels, mode):
        logits = CNN()(features, train=mode == Mode.TRAIN)
        if mode == Mode.PREDICT:
            return Spec(predictions={"class": jnp.argmax(logits, -1)})
        return Spec(
            outputs=logits,
            loss=optax.softmax_cross_entropy_with_integer_labels,
            optimizer="hf",
            metrics={"accuracy": (jnp.argmax(logits, -1) == labels).astype(jnp.float32)},
        )

    estimator = jdl.from_model_fn(model_fn, workdir="runs/photos")

It is called when a mode is compiled, not at every step. The page `migration/estimator.md` has a
table of TensorFlow's names and those here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from jdl.core import check
from jdl.core.model import Model, with_compute_dtype
from jdl.core.types import Batch, Key, Mode, ModelState, Outputs, Params
from jdl.metrics import direction
from jdl.optim import registry
from jdl.train.estimator import Estimator
from jdl.train.step import scale_images
from jdl.train.writers import directions

Labels = Any
ModelFn = Callable[[Any, Labels, Mode], "Spec"]


class Spec(NamedTuple):
    """What a model function returns for one mode.

    Attributes:
      predictions: what `predict` returns: an array or a pytree, leading axis B. Required to
        predict.
      loss: float[B], one value an example; or, with `outputs`, a function `loss(outputs, labels)`
        that returns it. Required to train and evaluate.
      optimizer: any optax transformation, or a name; required to train.
      metrics: name -> float[B], or a function of (outputs, labels) that returns it, and that may
        declare its `jdl.metrics.direction`.
      outputs: the first argument of a loss that is a function: floating-point arrays. Second-order
        methods by Gauss-Newton products or Kronecker factors (hf, kfac …) need such a loss, convex
        in the outputs.

    >>> import jax.numpy as jnp
    >>> Spec(loss=jnp.zeros(3), optimizer="adam").optimizer
    'adam'
    """

    predictions: Any = None
    loss: Any = None
    optimizer: str | optax.GradientTransformation | None = None
    metrics: Mapping[str, Any] | None = None
    outputs: Any = None


def from_model_fn(
    fn: ModelFn,
    *,
    features: str | Sequence[str] = "image",
    labels: str = "label",
    **options: Any,
) -> Estimator:
    """The Estimator of a model function.

    Args:
      fn: `fn(features, labels, mode) -> Spec`, with Linen modules and `jdl.models.param` inside.
        In `Mode.PREDICT` labels are None.
      features: the batch's entry that it takes, uint8 images scaled to [0, 1] as by `Estimator`;
        several names for a dict of them.
      labels: the entry with the labels.
      **options: as for `Estimator`: workdir, seed, hooks, ….

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax
      >>> from jdl.data import from_arrays
      >>> from jdl.models import param
      >>> def line(x, y, mode):
      ...     predicted = x @ param("slope", jax.nn.initializers.zeros, (1, 1))
      ...     if mode == Mode.PREDICT:
      ...         return Spec(predictions=predicted)
      ...     return Spec(loss=jnp.square(predicted - y)[:, 0], optimizer=optax.sgd(0.25))
      >>> x = np.linspace(-1, 1, 32, dtype=np.float32)[:, None]
      >>> data = from_arrays(x, 3 * x, batch_size=32)
      >>> estimator = from_model_fn(line).train(data, steps=60)
      >>> estimator.predict(data).round(2)[0].tolist()
      [-3.0]
    """
    from jdl.models.function import Function

    check.argument(callable(fn), "fn", "a function of (features, labels, mode)", fn)
    names = (features,) if isinstance(features, str) else tuple(features)
    module, latest = Function(fn), _Latest()
    compute_dtype = options.pop("compute_dtype", None)

    def in_dtype(model: Model) -> Model:  # casts the features, which are scaled before
        return model if compute_dtype is None else with_compute_dtype(model, compute_dtype)

    def inputs(batch: Batch) -> Any:
        for name in names:
            check.argument(name in batch, "features", f"among the batch's {sorted(batch)}", name)
        found = scale_images(batch, names)
        return found[features] if isinstance(features, str) else {n: found[n] for n in names}

    def labels_of(batch: Batch) -> Labels:
        if labels not in batch:
            raise check.DataError(
                f"The data has no entry {labels!r} among {sorted(batch)}: `labels` names the "
                "entry for the model function. To predict in a new process, first call "
                "`initialize` with training data."
            )
        return batch[labels]

    def init(key: Key, batch: Batch) -> tuple[Params, ModelState]:
        params_key, dropout_key = jax.random.split(key)
        rngs = {"params": params_key, "dropout": dropout_key}
        spec, variables = module.init_with_output(rngs, inputs(batch), labels_of(batch), Mode.TRAIN)
        latest.take(spec, Mode.TRAIN)
        variables = dict(variables)
        return variables.pop("params", {}), variables

    def apply(
        params: Params,
        state: ModelState,
        batch: Batch,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[Outputs, ModelState]:
        mode = Mode.TRAIN if train else Mode.EVALUATE

        def apply_to(
            params: Params, state: ModelState, x: Any, key: Key | None, train: bool
        ) -> tuple[Outputs, ModelState]:
            rngs = {} if key is None else {"dropout": key}
            arguments = ({"params": params, **state}, x, labels_of(batch), mode)
            if train and state:
                spec, state = module.apply(*arguments, rngs=rngs, mutable=list(state))
            else:
                spec = module.apply(*arguments, rngs=rngs)
            return latest.take(spec, mode), state

        model = in_dtype(Model(init, apply_to))
        return model.apply(params, state, inputs(batch), key=key, train=train)

    def predict(params: Params, state: ModelState, batch: Batch) -> Outputs:
        def apply_to(
            params: Params, state: ModelState, x: Any, key: Key | None, train: bool
        ) -> tuple[Outputs, ModelState]:
            del key, train
            spec: Any = module.apply({"params": params, **state}, x, None, Mode.PREDICT)
            check.argument(
                isinstance(spec, Spec) and spec.predictions is not None,
                "fn",
                "a function that returns a Spec with predictions in Mode.PREDICT",
                spec,
            )
            return spec.predictions, state

        model = in_dtype(Model(init, apply_to))
        return model.apply(params, state, inputs(batch), key=None, train=False)[0]

    @direction(latest.directions)
    def metrics(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
        return {
            name: metric(outputs["outputs"], labels_of(batch))
            if callable(metric)
            else outputs["metrics"][name]
            for name, metric in (latest.spec.metrics or {}).items()
        }

    in_dtype(Model(init, apply))  # raises for a wrong compute_dtype
    estimator = Estimator(
        Model(init, apply),
        _Loss(latest, labels_of),
        latest.optimizer,
        metrics=metrics,
        inputs=(),
        **options,
    )
    return estimator.predict_by(predict, inputs=names)


class _Latest:
    """The Spec of the latest trace of the model function."""

    def __init__(self) -> None:
        self.spec = Spec()
        self.directions: dict[str, str] = {}  # of its metrics
        self.optimizer = optax.GradientTransformationExtraArgs(
            lambda params: self._optimizer().init(params),
            lambda grads, state, params=None, **extra: self._optimizer().update(
                grads, state, params, **extra
            ),
        )

    def _optimizer(self) -> optax.GradientTransformationExtraArgs:
        optimizer = self.spec.optimizer
        if isinstance(optimizer, str):
            optimizer = registry.by_name(optimizer)
        assert optimizer is not None
        return optax.with_extra_args_support(optimizer)

    def take(self, spec: Any, mode: Mode) -> Outputs:
        """The Spec's arrays, as a model's outputs; functions stay here."""
        check.argument(
            isinstance(spec, Spec), "fn", f"a function that returns a Spec in {mode}", spec
        )
        check.argument(spec.loss is not None, "loss", f"in the Spec of mode {mode}", None)
        if mode == Mode.TRAIN:
            check.argument(
                spec.optimizer is not None, "optimizer", f"in the Spec of mode {mode}", None
            )
        metrics = dict(spec.metrics or {})
        check.argument("loss" not in metrics, "metrics", "named other than 'loss'", list(metrics))
        functions = [f for f in (spec.loss, *metrics.values()) if callable(f)]
        check.argument(
            not functions or spec.outputs is not None,
            "outputs",
            "in a Spec whose loss or metrics are functions of them",
            None,
        )
        for function in functions:
            cells = getattr(function, "__closure__", None) or ()
            check.argument(
                not any(isinstance(_content(cell), jax.core.Tracer) for cell in cells),
                "loss and metrics",
                "functions of (outputs, labels) alone, where they are functions",
                function,
                "This one captures an array of the model function: pass it in `outputs`.",
            )
        self.spec = spec
        self.directions |= directions(metrics)
        outputs: dict[str, Any] = {} if spec.outputs is None else {"outputs": spec.outputs}
        if not callable(spec.loss):
            outputs["loss"] = spec.loss
        arrays = {name: x for name, x in metrics.items() if not callable(x)}
        return outputs | ({"metrics": arrays} if arrays else {})


class _Loss:
    """The loss of the latest Spec, as `Objective` takes it."""

    def __init__(self, latest: _Latest, labels_of: Callable[[Batch], Labels]):
        self._latest, self._labels_of = latest, labels_of

    @property
    def of_outputs(self) -> bool:
        """Whether it is a function of the model's outputs, as Gauss-Newton products need."""
        return callable(self._latest.spec.loss)

    def __call__(self, outputs: Outputs, batch: Batch) -> jax.Array:
        if self.of_outputs:
            return self._latest.spec.loss(outputs["outputs"], self._labels_of(batch))
        loss = outputs["loss"]
        check.argument(
            loss.ndim == 1,
            "loss",
            "one value an example, float[B]",
            loss.shape,
            "Leave out the mean.",
        )
        return loss


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None
