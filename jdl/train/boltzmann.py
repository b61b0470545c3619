"""Boltzmann machines and their stacks in the Estimator: momentum, weight cost, pretraining."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdl import metrics
from jdl.core import check, tree
from jdl.core.model import ModelLike
from jdl.core.types import Batch, Outputs, Params
from jdl.models.dbn import DBN
from jdl.models.rbm import RBM, contrastive_divergence, sparse_divergence
from jdl.train.estimator import Estimator
from jdl.train.feed import Data


class Momentum(NamedTuple):
    """State of `momentum_switch`: the averaged gradient, and steps done."""

    velocity: Params
    steps: jax.Array


def momentum_switch(
    learning_rate: Any = 0.1, *, early: float = 0.5, late: float = 0.9, after: int = 3000
) -> optax.GradientTransformation:
    """Gradient descent with a momentum that rises from `early` to `late` at step `after`.

    The first gradients are large and change direction, and high momentum would make them diverge.
    The rate is scaled by 1 − momentum, so that the switch keeps the size of a steady step.

    Args:
      learning_rate: the rate for a constant gradient, > 0, or a schedule.
      early: in [0, 1).
      late: in [0, 1).
      after: the step of the switch.

    >>> switch = momentum_switch(0.1)
    >>> updates, _ = switch.update(jnp.ones(1), switch.init(jnp.zeros(1)))
    >>> updates.round(3).tolist()
    [-0.05000000074505806]

    References:
      Hinton, A practical guide to training restricted Boltzmann machines, 2010, section 9.
    """
    for name, value in (("early", early), ("late", late)):
        check.argument(0 <= value < 1, name, "a number in [0, 1)", value)

    def init(params: Params) -> Momentum:
        return Momentum(jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32))

    def update(grads: Any, state: Momentum, params: Any = None, **_: Any) -> Any:
        del params
        momentum = jnp.where(state.steps < after, early, late)
        rate = learning_rate(state.steps) if callable(learning_rate) else learning_rate
        velocity = tree.add_scaled(tree.scale(momentum, state.velocity), 1 - momentum, grads)
        return tree.scale(-rate, velocity), Momentum(velocity, state.steps + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def weight_cost(cost: float) -> Callable[[Params], jax.Array]:
    """½ · cost · Σ ‖kernel‖², a regularizer without biases."""
    check.in_range("cost", cost, 0.0)

    def penalty(params: Params) -> jax.Array:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        kernels = [x for path, x in leaves if getattr(path[-1], "key", None) == "kernel"]
        return 0.5 * cost * tree.vdot(kernels, kernels)

    return penalty


def slower_layers(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Scales the updates of named layers, for fine-tuning, after an optimizer.

    Args:
      factors: layer, a top-level entry of the parameters -> factor ≥ 0.

    >>> gentle = optax.chain(optax.sgd(1.0), slower_layers({"Dense_0": 0.1}))
    >>> params = {"Dense_0": jnp.ones(1), "outputs": jnp.ones(1)}
    >>> updates, _ = gentle.update(params, gentle.init(params))
    >>> [round(float(u[0]), 3) for u in updates.values()]
    [-0.1, -1.0]
    """
    for name, factor in factors.items():
        check.in_range(f"factors[{name!r}]", factor, 0.0)

    def init(params: Params) -> optax.EmptyState:
        for name in factors:
            check.one_of("a layer", name, list(params))
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        del params
        return {n: tree.scale(factors.get(n, 1.0), u) for n, u in updates.items()}, state

    return optax.GradientTransformationExtraArgs(init, update)


def rbm(
    model: ModelLike,
    optimizer: str | optax.GradientTransformation | None = None,
    *,
    sparsity: tuple[float, float] | None = None,
    cost: float = 2e-4,
    labels: bool = False,
    **options: Any,
) -> Estimator:
    """An Estimator that trains an RBM by contrastive divergence.

    Logs the squared error of reconstructions (a weak indicator of the likelihood), the free energy
    (whose gap between training and test data shows overfitting) and, with labels, the accuracy.

    Args:
      model: an `RBM`, or a layer of a `DBN`.
      optimizer: any optax transformation that uses the gradient alone, or a name; by default
        `momentum_switch()`.
      sparsity: (target, cost) of the hidden units' activity.
      cost: the coefficient of `weight_cost`.
      labels: whether the machine has label units, for `batch["label"]`.
      **options: as for `Estimator`.
    """
    loss = contrastive_divergence if sparsity is None else sparse_divergence(*sparsity)

    @metrics.direction("min")
    def squared_error(outputs: Outputs, batch: Batch) -> jax.Array:
        return metrics.sum_squared_error(outputs.visible, batch, target="image")

    @metrics.direction("max")
    def accuracy(outputs: Outputs, batch: Batch) -> jax.Array:
        return metrics.accuracy(outputs.classes, batch)

    measures = {"free_energy": lambda outputs, batch: outputs.positive}
    if isinstance(model, RBM):  # a higher layer of a stack reproduces features, not the image
        measures["squared_error"] = squared_error
    if labels:
        measures["accuracy"] = accuracy
    options = {"metrics": measures, "inputs": ("image", "label") if labels else "image"} | options
    return Estimator(
        model,
        loss,
        momentum_switch() if optimizer is None else optimizer,
        regularizer=weight_cost(cost) if cost else None,
        **options,
    )


def pretrain(
    dbn: DBN,
    data: Data,
    *,
    steps: int | Sequence[int],
    optimizer: Callable[[int], Any] | None = None,
    workdir: str | Path | None = None,
    seed: int = 0,
    **options: Any,
) -> list[Params]:
    """Greedy pretraining of a stack, one Estimator per layer, on the outputs of the layers below.

    Args:
      dbn: the stack.
      data: as for `Estimator.train`; repeated as often as needed.
      steps: training steps of each layer.
      optimizer: `optimizer(i)` for layer i; by default `momentum_switch()`, with a hundredth of its
        rate for a layer of Gaussian units, which diverges sooner.
      workdir: each layer's run directory is in it, `layer_0`, …; training started again continues.
      seed: for layer 0; layer i uses seed + i.
      **options: as for `rbm`.

    Returns:
      The parameters of all layers, as NumPy arrays.
    """
    depth = len(dbn.widths)
    counts = [steps] * depth if isinstance(steps, int) else list(steps)
    check.argument(len(counts) == depth, "steps", f"one number, or {depth}", steps)
    params: list[Params] = []
    for i, count in enumerate(counts):
        machine = dbn.rbm(i)
        gaussian = "gaussian" in (machine.visible, machine.hidden_units)
        estimator = rbm(
            dbn.layer(i, params),
            optimizer(i) if optimizer else momentum_switch(1e-3 if gaussian else 0.1),
            labels=machine.num_classes > 0,
            workdir=None if workdir is None else Path(workdir) / f"layer_{i}",
            seed=seed + i,
            **options,
        )
        estimator.train(data, max_steps=count)
        params.append(jax.tree.map(np.asarray, jax.device_get(estimator.evaluation_params)))
    return params
