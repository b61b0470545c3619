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

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from jdl.core import check
from jdl.core.model import Model, with_compute_dtype
from jdl.core.objective import fisher_loss
from jdl.core.types import Batch, Key, Loss, Mode, ModelState, Outputs, Params
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
      loss: float[B], one value per example; or, with `outputs`, a function
        `loss(outputs, labels)` that returns it. Required to train and evaluate.
      optimizer: any optax transformation, or a name; required to train.
      metrics: name -> float[B], or a function of (outputs, labels) that returns it, and that may
        declare its `jdl.metrics.direction`.
      outputs: the first argument of a loss that is a function: floating-point arrays. Second-order
        methods by Gauss-Newton products or Kronecker factors (hf, kfac …) need such a loss, convex
        in the outputs or with an attribute `fisher`, as `jdl.losses.gaussian_nll` has.

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
    check.argument(callable(fn), "fn", "a function of (features, labels, mode)", fn)
    model_fn = _ModelFn(fn, features, labels, options.pop("compute_dtype", None))
    estimator = Estimator(
        Model(model_fn.init, model_fn.apply),
        _Loss(model_fn),
        model_fn.optimizer(),
        metrics=direction(model_fn.directions)(lambda *given: model_fn.metrics(*given)),
        inputs=(),
        **options,
    )
    return estimator.predict_by(model_fn.predict, inputs=model_fn.names)


class _ModelFn:
    """A model function as the pure functions that an Estimator takes.

    Arrays of its Spec are the model's outputs; functions stay in `spec`, the Spec of the latest
    trace.

    Args:
      fn, features, labels: as for `from_model_fn`.
      compute_dtype: as for `Estimator`; features are scaled first, and cast then.
    """

    def __init__(
        self, fn: ModelFn, features: str | Sequence[str], labels: str, compute_dtype: str | None
    ):
        from jdl.models.function import Function

        self._module, self._features, self._labels = Function(fn), features, labels
        self._compute_dtype = compute_dtype
        self.names = (features,) if isinstance(features, str) else tuple(features)
        self.spec = Spec()
        self.directions: dict[str, str] = {}  # of its metrics
        self._in_dtype(self.apply)  # raises for a wrong compute_dtype

    def init(self, key: Key, batch: Batch) -> tuple[Params, ModelState]:
        params_key, dropout_key = jax.random.split(key)
        rngs = {"params": params_key, "dropout": dropout_key}
        given = (self._features_of(batch), self._labels_of(batch), Mode.TRAIN)
        spec, variables = self._module.init_with_output(rngs, *given)
        self._take(spec, Mode.TRAIN)
        variables = dict(variables)
        return variables.pop("params", {}), variables

    def apply(
        self,
        params: Params,
        state: ModelState,
        batch: Batch,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[Outputs, ModelState]:
        mode = Mode.TRAIN if train else Mode.EVALUATE
        rngs = {} if key is None else {"dropout": key}

        def call(
            params: Params, state: ModelState, features: Any, **_: Any
        ) -> tuple[Outputs, ModelState]:
            given = ({"params": params, **state}, features, self._labels_of(batch), mode)
            if train and state:
                spec, state = self._module.apply(*given, rngs=rngs, mutable=list(state))
            else:
                spec = self._module.apply(*given, rngs=rngs)
            return self._take(spec, mode), state

        return self._in_dtype(call)(params, state, self._features_of(batch))

    def predict(self, params: Params, state: ModelState, batch: Batch) -> Outputs:
        def call(
            params: Params, state: ModelState, features: Any, **_: Any
        ) -> tuple[Outputs, ModelState]:
            variables = {"params": params, **state}
            spec: Any = self._module.apply(variables, features, None, Mode.PREDICT)
            check.argument(
                isinstance(spec, Spec) and spec.predictions is not None,
                "fn",
                "a function that returns a Spec with predictions in Mode.PREDICT",
                spec,
            )
            return spec.predictions, state

        return self._in_dtype(call)(params, state, self._features_of(batch))[0]

    def loss(self, outputs: Outputs, batch: Batch, fisher: bool = False) -> jax.Array:
        if callable(self.spec.loss):
            of = fisher_loss(self.spec.loss) if fisher else self.spec.loss
            return of(outputs["outputs"], self._labels_of(batch))
        loss = outputs["loss"]
        check.argument(
            loss.ndim == 1,
            "loss",
            "one value per example, float[B]",
            loss.shape,
            "Leave out the mean.",
        )
        return loss

    def metrics(self, outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
        return {
            name: metric(outputs["outputs"], self._labels_of(batch))
            if callable(metric)
            else outputs["metrics"][name]
            for name, metric in (self.spec.metrics or {}).items()
        }

    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer of the Spec, which is known once a step is traced."""

        def named() -> optax.GradientTransformationExtraArgs:
            optimizer = self.spec.optimizer
            if isinstance(optimizer, str):
                optimizer = registry.by_name(optimizer)
            assert optimizer is not None
            return optax.with_extra_args_support(optimizer)

        return optax.GradientTransformationExtraArgs(
            lambda params: named().init(params),
            lambda grads, state, params=None, **extra: named().update(
                grads, state, params, **extra
            ),
        )

    def _in_dtype(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        if self._compute_dtype is None:
            return apply
        return with_compute_dtype(Model(self.init, apply), self._compute_dtype).apply

    def _features_of(self, batch: Batch) -> Any:
        for name in self.names:
            check.argument(name in batch, "features", f"among the batch's {sorted(batch)}", name)
        found = scale_images(batch, self.names)
        if isinstance(self._features, str):
            return found[self._features]
        return {name: found[name] for name in self.names}

    def _labels_of(self, batch: Batch) -> Labels:
        if self._labels not in batch:
            raise check.DataError(
                f"The data has no entry {self._labels!r} among {sorted(batch)}: `labels` names the "
                "entry for the model function. To predict in a new process, first call "
                "`initialize` with training data."
            )
        return batch[self._labels]

    def _take(self, spec: Any, mode: Mode) -> Outputs:
        """The Spec's arrays, as a model's outputs; its functions stay here."""
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
            check.argument(
                not any(isinstance(x, jax.core.Tracer) for x in _captured(function)),
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
    """The loss of a model function, as `Objective` takes it."""

    def __init__(self, model_fn: _ModelFn):
        self._model_fn = model_fn

    @property
    def of_outputs(self) -> bool:
        """Whether it is a function of the model's outputs, as Gauss-Newton products need."""
        return callable(self._model_fn.spec.loss)

    @property
    def fisher(self) -> Loss:
        """What Gauss-Newton products differentiate."""
        return functools.partial(self._model_fn.loss, fisher=True)

    def __call__(self, outputs: Outputs, batch: Batch) -> jax.Array:
        return self._model_fn.loss(outputs, batch)


def _captured(function: Callable[..., Any]) -> Iterator[Any]:
    """What a function captures from around it."""
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # the cell is empty
            yield cell.cell_contents
