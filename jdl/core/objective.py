r"""A model and a loss on one batch, as a function of the parameters alone.

    f(θ) = Σᵢ mᵢ ℓ(net(θ, xᵢ), yᵢ) / Σᵢ mᵢ + r(θ)

with an optional 0/1 mask m (`batch["mask"]`) and an optional regularizer r. Within a step every
evaluation is of the same f: random key, batch and incoming model state are fixed, so that a line
search sees the same dropout masks, and batch statistics change once a step.

Data parallelism and memory limits are handled here, so optimizers need not handle them: with
`microbatches` every evaluation and every product is a scan over slices of the batch, and with
`axis_name` every reduction is over the devices of that axis.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import check, tree
from jdl.core.derivatives import hvp, linearize
from jdl.core.model import Model
from jdl.core.types import Batch, Key, Loss, ModelState, Outputs, Params, PyTree


class Aux(NamedTuple):
    """What an evaluation gives besides value and gradient."""

    model_state: ModelState  # for the next step
    outputs: Outputs  # the model's outputs, leading axis B


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["model_state", "batch", "curvature_batch", "key"],
    meta_fields=["model", "loss", "inputs", "regularizer", "train", "microbatches", "axis_name"],
)
@dataclass(frozen=True, eq=False)
class Objective:
    """One step's function of the parameters.

    It is a pytree, and so can be an argument of a jitted function.

    Attributes:
      model: the pure functions.
      loss: `loss(outputs, batch) -> float[B]`, one value per example. For Gauss-Newton products it
        must be convex in `outputs`, or have an attribute `fisher`: see `fisher_loss`.
      model_state: the state that every evaluation starts from.
      batch: name -> array[B, ...]; `batch["mask"]`, if present, weights the examples.
      curvature_batch: the examples for curvature products; None for the whole batch.
      key: the key that every evaluation uses; None for a model without randomness.
      inputs: the entry of `batch` that is the model's input, or a tuple of several.
      regularizer: r(θ), a scalar function of the parameters, or None.
      train: whether the model runs in training mode.
      microbatches: how many slices each batch is cut into, to bound memory.
      axis_name: the mapped axis to reduce over, inside `pmap` or `shard_map` only.
    """

    model: Model
    loss: Loss
    model_state: ModelState
    batch: Batch
    curvature_batch: Batch | None = None
    key: Key | None = None
    inputs: str | tuple[str, ...] = "image"
    regularizer: Callable[[Params], jax.Array] | None = None
    train: bool = True
    microbatches: int = 1
    axis_name: str | None = None

    @classmethod
    def from_fns(
        cls,
        predict: Callable[[Params, Batch], Outputs],
        loss: Loss,
        batch: Batch,
        key: Key | None = None,
        **options: Any,
    ) -> "Objective":
        """An objective from two pure functions, for a bare optax loop.

        Args:
          predict: `predict(params, batch) -> outputs`, or `predict(params, batch, key)`.
          loss: `loss(outputs, batch) -> float[B]`.
          batch: a dict of arrays with one leading axis B.
          key: passed to `predict` where it is not None.
          **options: further attributes of `Objective`.

        >>> def predict(w, batch):
        ...     return batch["x"] @ w
        >>> def loss(outputs, batch):
        ...     return 0.5 * jnp.square(outputs - batch["y"])
        >>> batch = {"x": jnp.eye(2), "y": jnp.ones(2)}
        >>> objective = Objective.from_fns(predict, loss, batch)
        >>> float(objective.value(jnp.zeros(2)))
        0.5
        >>> objective.gnvp(jnp.zeros(2), jnp.array([1.0, 2.0])).tolist()
        [0.5, 1.0]
        """
        model = Model(_no_init, _Predict(predict))
        return cls(model, loss, {}, batch, key=key, inputs=(), **options)

    # ------------------------------------------------------------------ evaluations

    def value(
        self,
        params: Params,
        *,
        obj_fn: Any = None,
        objective: Any = None,
        whole_params: Any = None,
        reused: Any = None,
        **_: Any,
    ) -> jax.Array:
        """f(θ). Keywords are ignored.

        optax's line searches pass all extra arguments of an update on, and raise for those that
        this function does not name.
        """
        del obj_fn, objective, whole_params, reused
        if self.axis_name is None:
            return self._value(params, self.batch)

        # optax's line searches and Sophia differentiate this, and need the gradient over all
        # devices; by JAX's own rule for psum each device would get a different one.
        @jax.custom_jvp
        def value(params: Params) -> jax.Array:
            return self._value(params, self.batch)

        @value.defjvp
        def rule(primals: tuple[Params], tangents: tuple[PyTree]) -> tuple[jax.Array, jax.Array]:
            f, grad, _ = self.value_and_grad(*primals)
            return f, tree.vdot(grad, *tangents).astype(f.dtype)

        return value(params)

    def value_and_grad(self, params: Params, **_: Any) -> tuple[jax.Array, Params, Aux]:
        """f(θ), ∇f(θ), and the outputs and new model state of the same evaluation."""
        total = self.total_weight(self.batch)

        def part(batch: Batch, key: Key | None) -> Any:
            def f(params: Params) -> tuple[jax.Array, Aux]:
                outputs, state = self.apply(params, batch, key)
                return self.mean_loss(outputs, batch, total), Aux(state, outputs)

            (value, aux), grads = jax.value_and_grad(f, has_aux=True)(params)
            return (value, grads), aux

        (value, grads), aux = self.scan(part, self.batch)
        if self.regularizer is not None:
            r, r_grad = jax.value_and_grad(self.regularizer)(params)
            value, grads = value + r, tree.add_scaled(grads, 1.0, r_grad)
        state = jax.lax.stop_gradient(self._merge_states(aux.model_state))
        return value, grads, Aux(state, aux.outputs)

    def grad(self, params: Params, **_: Any) -> Params:
        """∇f(θ)."""
        return self.value_and_grad(params)[1]

    # ------------------------------------------------------------------ curvature products

    def hvp(self, params: Params, vector: PyTree) -> PyTree:
        """∇²f(θ) v on the curvature batch, forward over reverse (Pearlmutter 1994)."""
        batch = self.batch_for_curvature
        total = self.total_weight(batch)

        def part(batch: Batch, key: Key | None) -> Any:
            def f(params: Params) -> jax.Array:
                return self.mean_loss(self.apply(params, batch, key)[0], batch, total)

            return hvp(f, params, vector), ()

        with jax.default_matmul_precision("highest"):
            return self._regularized(self.scan(part, batch)[0], params, vector)

    def gnvp(self, params: Params, vector: PyTree) -> PyTree:
        r"""G v with G = Σᵢ mᵢ Jᵢᵀ ∇²ℓᵢ Jᵢ / Σᵢ mᵢ + ∇²r, on the curvature batch (Schraudolph 2002).

        J is the outputs' Jacobian and ∇²ℓ the Hessian of `fisher_loss(loss)` with respect to the
        outputs; where that is convex, G is positive semi-definite.
        """
        require_of_outputs(self.loss)
        convex = replace(self, loss=fisher_loss(self.loss))
        batch = self.batch_for_curvature
        total = self.total_weight(batch)

        def part(batch: Batch, key: Key | None) -> Any:
            def predict(params: Params) -> Outputs:
                return self.apply(params, batch, key)[0]

            outputs, push, pull = linearize(predict, params)
            loss = lambda outputs: convex.mean_loss(outputs, batch, total)  # noqa: E731
            return pull(hvp(loss, outputs, push(vector))), ()

        with jax.default_matmul_precision("highest"):
            return self._regularized(self.scan(part, batch)[0], params, vector)

    def efvp(self, params: Params, vector: PyTree) -> PyTree:
        r"""E v with E = Σᵢ mᵢ gᵢ gᵢᵀ / Σᵢ mᵢ, the empirical Fisher, on the curvature batch.

        gᵢ is the gradient of example i's loss. The regularizer is not included.
        """
        batch = self.batch_for_curvature
        total = self.total_weight(batch)

        def losses(batch: Batch, key: Key | None, params: Params) -> jax.Array:
            weights = batch.get("mask", jnp.ones(self.num_examples(batch)))
            values = self._losses(self.apply(params, batch, key)[0], batch)
            wide = tree.accumulator(values.dtype)
            weights = jnp.sqrt(weights.astype(wide) / total.astype(wide)).astype(values.dtype)
            return jnp.where(weights > 0, weights * values, 0.0)

        return self._gram(losses, batch, params, vector)

    def gram_product(
        self, fn: Callable[[Params, Batch], PyTree], params: Params, vector: PyTree
    ) -> PyTree:
        """Jᵀ J v / B with J the Jacobian of `fn(params, batch)`, on the curvature batch.

        B is the number of examples; the mask is not used.
        """
        batch = self.batch_for_curvature
        count = self._psum(jnp.asarray(float(self.num_examples(batch)), jnp.float32))
        product = self._gram(lambda b, key, p: fn(p, b), batch, params, vector)
        return tree.scale(1.0 / count, product)

    def _gram(
        self,
        fn: Callable[[Batch, Key | None, Params], PyTree],
        batch: Batch,
        params: Params,
        vector: PyTree,
    ) -> PyTree:
        """Σ Jᵀ J v over microbatches and devices."""

        def part(batch: Batch, key: Key | None) -> Any:
            _, push, pull = linearize(lambda p: fn(batch, key, p), params)
            return pull(push(vector)), ()

        with jax.default_matmul_precision("highest"):
            return self.scan(part, batch)[0]

    def empirical_fisher_diagonal(self, params: Params, key: Key) -> Params:
        """An unbiased random estimate of diag(Σᵢ mᵢ gᵢ gᵢᵀ / Σᵢ mᵢ), of the empirical Fisher.

        gᵢ is the gradient of example i of the curvature batch. It takes one backward pass of
        Σᵢ sᵢ mᵢ ℓᵢ with random signs sᵢ: in its square the cross terms vanish in expectation
        (Chapelle & Erhan 2011). Microbatches and devices are squared one by one, which lowers the
        variance.
        """
        batch = self.batch_for_curvature
        total = self.total_weight(batch)

        def part(batch: Batch, own_key: Key | None) -> Any:
            # Signs need to be independent within a microbatch only: all microbatches share them.
            draw = key
            if self.axis_name is not None:
                draw = jax.random.fold_in(key, jax.lax.axis_index(self.axis_name))
            size = self.num_examples(batch)
            weights = batch.get("mask", jnp.ones(size)).astype(jnp.float32)
            signs = jax.random.rademacher(draw, (size,), jnp.float32)

            def f(params: Params) -> jax.Array:
                losses = self._losses(self.apply(params, batch, own_key)[0], batch)
                factors = (signs * weights).astype(losses.dtype)
                return jnp.sum(jnp.where(weights > 0, losses * factors, 0.0))

            grads = jax.grad(f)(params)
            return jax.tree.map(lambda g: g * g / total.astype(g.dtype), grads), ()

        return self.scan(part, batch)[0]

    # ------------------------------------------------------------------ to build other sums

    @property
    def batch_for_curvature(self) -> Batch:
        """The examples for curvature: `curvature_batch`, or the whole batch."""
        return self.batch if self.curvature_batch is None else self.curvature_batch

    def curvature_share(self) -> float:
        """The examples of the curvature batch, per example of the batch."""
        return self.num_examples(self.batch_for_curvature) / self.num_examples(self.batch)

    def apply(self, params: Params, batch: Batch, key: Key | None) -> tuple[Outputs, ModelState]:
        """The model's outputs for these examples, and its new state."""
        if self.inputs == ():
            inputs: tuple[Any, ...] = (batch,)
        else:
            names = (self.inputs,) if isinstance(self.inputs, str) else self.inputs
            inputs = tuple(batch[name] for name in names)
        return self.model.apply(params, self.model_state, *inputs, key=key, train=self.train)

    def num_examples(self, batch: Batch) -> int:
        """How many examples `batch` has on this device."""
        return batch_size(batch, self.inputs)

    def total_weight(self, batch: Batch) -> jax.Array:
        """Σᵢ mᵢ over all microbatches and devices."""
        mask = batch.get("mask")
        if mask is None:
            return self._psum(jnp.asarray(float(self.num_examples(batch)), jnp.float32))
        return jnp.maximum(self._psum(jnp.sum(mask.astype(jnp.float32))), 1.0)

    def mean_loss(self, outputs: Outputs, batch: Batch, total: jax.Array) -> jax.Array:
        """Σᵢ mᵢ ℓᵢ / total: what these examples add to the mean over all of weight `total`."""
        losses = self._sum(outputs, batch)
        return losses / total.astype(losses.dtype)

    def scan(self, part: Callable[[Batch, Key | None], Any], batch: Batch) -> Any:
        """A sum over microbatches and devices; all evaluations and products use it.

        Args:
          part: (microbatch, its key) -> (term, rest).
          batch: the examples.

        Returns:
          Σ of the terms, and each microbatch's rest, stacked in order.
        """
        key = self.key
        if key is not None and self.axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(self.axis_name))
        n = self.microbatches
        if n == 1:
            total, rest = part(batch, key)
            return self._psum(total), rest
        size = self.num_examples(batch)
        check.argument(
            size % n == 0, "microbatches", f"a divisor of the batch's {size} examples", n
        )
        slices = jax.tree.map(lambda x: x.reshape(n, size // n, *x.shape[1:]), dict(batch))

        def body(total: PyTree, step: tuple[jax.Array, Batch]) -> tuple[PyTree, PyTree]:
            i, microbatch = step
            one, rest = part(microbatch, None if key is None else jax.random.fold_in(key, i))
            return jax.tree.map(jnp.add, total, one), rest

        first = jax.tree.map(lambda x: x[0], slices)
        shapes = jax.eval_shape(lambda b: part(b, key)[0], first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, rest = jax.lax.scan(body, zeros, (jnp.arange(n), slices))
        if isinstance(rest, Aux):
            outputs = jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), rest.outputs)
            rest = Aux(rest.model_state, outputs)
        return self._psum(total), rest

    # ------------------------------------------------------------------ private

    def _losses(self, outputs: Outputs, batch: Batch) -> jax.Array:
        losses: jax.Array = asked(self.loss, "loss", outputs, batch)
        return losses

    def _sum(self, outputs: Outputs, batch: Batch) -> jax.Array:
        """Σᵢ mᵢ ℓᵢ, in at least float32."""
        losses = self._losses(outputs, batch)
        size = self.num_examples(batch)
        check.argument(
            losses.shape == (size,),
            "loss",
            f"a function that gives one value an example, shape ({size},)",
            losses.shape,
        )
        losses = losses.astype(tree.accumulator(losses.dtype))
        mask = batch.get("mask")
        if mask is None:
            return jnp.sum(losses)
        check_mask(mask, size)
        return jnp.sum(jnp.where(mask > 0, losses * mask.astype(losses.dtype), 0.0))

    def _value(self, params: Params, batch: Batch) -> jax.Array:
        total = self.total_weight(batch)

        def part(batch: Batch, key: Key | None) -> Any:
            outputs, _ = self.apply(params, batch, key)
            return self.mean_loss(outputs, batch, total), ()

        value, _ = self.scan(part, batch)
        return value if self.regularizer is None else value + self.regularizer(params)

    def _regularized(self, product: PyTree, params: Params, vector: PyTree) -> PyTree:
        if self.regularizer is None:
            return product
        return tree.add_scaled(product, 1.0, hvp(self.regularizer, params, vector))

    def _merge_states(self, state: ModelState) -> ModelState:
        """The mean of the new states over microbatches and devices.

        For running averages that is the state after a single large batch.
        """

        def merge(x: jax.Array) -> jax.Array:
            averaged = jnp.issubdtype(x.dtype, jnp.inexact)
            if self.microbatches > 1:
                x = jnp.mean(x, axis=0) if averaged else x[-1]
            if self.axis_name is not None and averaged:
                x = jax.lax.pmean(x, self.axis_name)
            return x

        return jax.tree.map(merge, state)

    def _psum(self, x: PyTree) -> PyTree:
        return x if self.axis_name is None else jax.lax.psum(x, self.axis_name)


def require_of_outputs(loss: Loss) -> None:
    """Refuses a loss that is computed inside the model, without a Hessian in the outputs."""
    check.argument(
        getattr(loss, "of_outputs", True),
        "loss",
        "a function of the model's outputs for Gauss-Newton products and Kronecker factors",
        "its values",
        "Use Spec(outputs=…, loss=function), or another optimizer: adam, lbfgs, cg, newton.",
    )


def fisher_loss(loss: Loss) -> Loss:
    """What Gauss-Newton products differentiate: `loss.fisher` if there is one, or else `loss`.

    `fisher` has the same value and gradient, and the Fisher matrix as its Hessian in the outputs.
    """
    if isinstance(loss, partial):
        return partial(fisher_loss(loss.func), *loss.args, **loss.keywords)
    return getattr(loss, "fisher", loss)


def check_mask(mask: Any, size: int) -> None:
    """Raises unless a batch's mask has one number per example."""
    check.argument(
        mask.shape == (size,), 'batch["mask"]', f"a number an example, ({size},)", mask.shape
    )


def batch_size(batch: Batch, inputs: str | tuple[str, ...] = ()) -> int:
    """The number of examples B: the leading size of all entries of a batch.

    >>> batch_size({"graph": jnp.ones((7, 7)), "image": jnp.ones((4, 3))}, "image")
    Traceback (most recent call last):
        ...
    jdl.core.check.ArgumentError: `batch` must be a dict of arrays with one row an example: \
'image' has 4 rows, got {'graph': (7, 7)}. An array that all examples share belongs in the \
model or the loss, or must be repeated for each; single examples must be stacked into batches.
    """
    leads = {jnp.shape(x)[:1] for x in jax.tree.leaves(dict(batch))}
    if len(leads) == 1 and (lead := leads.pop()):
        return lead[0]
    names = (inputs,) if isinstance(inputs, str) else inputs
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(x)
        for path, x in jax.tree_util.tree_leaves_with_path(dict(batch))
    }
    check.argument(bool(shapes), "batch", "a dict with at least one array", batch)
    # The inputs' rows are the examples, or else the mask's.
    ordered = sorted(shapes, key=lambda path: (path.split("/")[0] not in names, path != "mask"))
    of = next((path for path in ordered if shapes[path]), ordered[0])
    has = f": {of!r} has {shapes[of][0]} rows" if shapes[of] else ""
    odd = {path: shapes[path] for path in ordered if shapes[path][:1] != (shapes[of][:1] or None)}
    raise check.ArgumentError(
        f"`batch` must be a dict of arrays with one row an example{has}, got {odd}. An array that "
        "all examples share belongs in the model or the loss, or must be repeated for each; single "
        "examples must be stacked into batches."
    )


def asked(
    function: Callable[[Outputs, Batch], Any], what: str, outputs: Outputs, batch: Batch
) -> Any:
    """`function(outputs, batch)`; the error for a missing entry of the batch names it.

    >>> asked(lambda outputs, batch: batch["label"], "loss", jnp.zeros(1), {"image": jnp.zeros(1)})
    Traceback (most recent call last):
        ...
    jdl.core.check.DataError: `loss` asks for 'label'; the batch has no such entry, only 'image'.
    """
    try:
        return function(outputs, batch)
    except KeyError as error:
        key = error.args[0] if error.args else None
        if key in batch:
            raise  # not of the batch
        only = ", ".join(map(repr, batch)) or "none"
        also = f"; nor have the outputs: {[*outputs]}" if isinstance(outputs, Mapping) else ""
        raise check.DataError(
            f"`{what}` asks for {key!r}; the batch has no such entry, only {only}{also}."
        ) from error


@dataclass(frozen=True)
class _Predict:
    """A plain function as a `Model.apply`; equal for equal functions, so that jit compiles once."""

    predict: Callable[..., Outputs]

    def __call__(
        self,
        params: Params,
        state: ModelState,
        *inputs: Any,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[Outputs, ModelState]:
        del train
        (batch,) = inputs
        outputs = self.predict(params, batch) if key is None else self.predict(params, batch, key)
        return outputs, state


def _no_init(key: Key, *inputs: Any) -> tuple[Params, ModelState]:
    raise check.UserError("An objective made by Objective.from_fns initializes no parameters.")
