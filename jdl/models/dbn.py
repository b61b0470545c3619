r"""The deep belief net: a stack of restricted Boltzmann machines.

    P(v, h¹, …, hᴸ) = P(v | h¹) ⋯ P(hᴸ⁻² | hᴸ⁻¹) · P(hᴸ⁻¹, hᴸ)

Each machine models the features of the one below. The stack generates samples by Gibbs sampling in
the top machine and one pass down, or is unrolled into an MLP or a deep autoencoder for fine-tuning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdl.core import check, tree
from jdl.core.model import Model, as_model
from jdl.core.types import Batch, Key, ModelState, Params
from jdl.models.autoencoder import Autoencoder
from jdl.models.layers import example_keys
from jdl.models.mlp import MLP
from jdl.models.rbm import RBM, Energies, draw_bernoulli


@dataclass(frozen=True)
class DBN:
    """A stack of RBMs; its parameters are a list of theirs, the lowest first.

    Attributes:
      widths: hidden units of each machine.
      visible: the lowest machine's visible units, "bernoulli" or "gaussian".
      num_classes: label units added to the top machine's visible ones; 0 for none.
      linear_code: whether the top units are Gaussian, for an autoencoder's linear code.
      samples: whether a machine learns samples of the features below, as for a stack that is to
        `generate`, or their means, as for one that is unrolled. Chains of a machine that learned
        means visit few of the modes.
      k, chains: for training each machine, as for `RBM`.

    >>> dbn = DBN(widths=(6, 4))
    >>> params = [
    ...     dbn.layer(i, []).init(jax.random.key(i), jnp.ones((2, n)))[0]
    ...     for i, n in enumerate((9, 6))
    ... ]
    >>> dbn.features(params, jnp.ones((2, 3, 3))).shape
    (2, 4)

    References:
      Hinton, Osindero and Teh, A fast learning algorithm for deep belief nets, Neural Computation
      18, 2006.
    """

    widths: Sequence[int] = (500, 500, 2000)
    visible: str = "bernoulli"
    num_classes: int = 0
    linear_code: bool = False
    samples: bool = False
    k: int = 1
    chains: int = 0

    def __post_init__(self) -> None:
        check.argument(len(self.widths) > 0, "widths", "at least one width", self.widths)
        for width in self.widths:
            check.positive_int("widths", width)

    def rbm(self, i: int) -> RBM:
        """The machine of layer i."""
        top = i == len(self.widths) - 1
        return RBM(
            hidden=self.widths[i],
            visible=self.visible if i == 0 else "bernoulli",
            hidden_units="gaussian" if top and self.linear_code else "bernoulli",
            num_classes=self.num_classes if top else 0,
            k=self.k,
            chains=0 if top and self.linear_code else self.chains,
        )

    def layer(self, i: int, below: Sequence[Params]) -> Model:
        """The machine of layer i as a `Model` of the data, with the layers below as feature map.

        The parameters below are model state, so that features need not be stored.
        """
        check.argument(0 <= i < len(self.widths), "i", f"below {len(self.widths)}", i)
        base = as_model(self.rbm(i))
        below = list(below)

        def init(key: Key, *inputs: Any) -> tuple[Params, ModelState]:
            x, *label = inputs
            params, state = base.init(key, self._up(below, x), *label)
            return params, {"own": state, "below": below}

        def apply(
            params: Params,
            state: ModelState,
            *inputs: Any,
            key: Key | None = None,
            train: bool = False,
        ) -> tuple[Energies, ModelState]:
            x, *label = inputs
            drawn = jax.random.fold_in(key, 1) if self.samples and key is not None else None
            h = self._up(jax.lax.stop_gradient(state["below"]), x, drawn)
            outputs, own = base.apply(params, state["own"], h, *label, key=key, train=train)
            return outputs, {"own": own, "below": state["below"]}

        return Model(init, apply)

    def _up(self, below: Sequence[Params], x: jax.Array, key: Key | None = None) -> jax.Array:
        """Features of the layers below: samples with a key, means without."""
        h = self.rbm(0).clone(num_classes=0).joined(x)
        for i, params in enumerate(below):
            machine = self.rbm(i)
            ok = h.shape[1] == params["visible_bias"].size
            must = f"of {h.shape[1]} visible units in layer {i}"
            check.argument(ok, "params", must, params["visible_bias"].size)
            a = machine.hidden_input(params, h)
            h = (
                machine.hidden_mean(a)
                if key is None
                else draw_bernoulli(a, jax.random.fold_in(key, i))
            )
        return h

    # ------------------------------------------------------------------ the whole stack

    def features(self, params: Sequence[Params], x: jax.Array) -> jax.Array:
        """E[h] of the top units, [B, widths[-1]], for inputs [B, ...]."""
        self._check_depth(params)
        *below, top = params
        h = jnp.pad(self._up(below, x), [(0, 0), (0, self.num_classes)])
        machine = self.rbm(len(below))
        return machine.hidden_mean(machine.hidden_input(top, h))

    def generate(
        self,
        params: Sequence[Params],
        key: Key,
        count: int,
        *,
        steps: int = 1000,
        label: jax.Array | None = None,
        start: jax.Array | None = None,
        temperature: float = 1.0,
        guidance: float = 1.0,
    ) -> jax.Array:
        """Samples of the model, [count, V]: means of the visible units given sampled features.

        Args:
          params: of all layers.
          key: a random key.
          count: the number of samples.
          steps: Gibbs steps in the top machine.
          label: int[count], the classes of the samples; only with label units.
          start: inputs [count, ...] from whose features the chains start; None for random units.
          temperature: > 0, divides the top machine's energy; below 1 samples are more typical.
          guidance: > 0, the number of times that each label unit counts; above 1 samples are more
            like their class.
        """
        self._check_depth(params)
        *below, top = params
        machine = self.rbm(len(below))
        pixels = top["visible_bias"].size - self.num_classes
        check.in_range("temperature", temperature, 0.0, open_low=True)
        check.in_range("guidance", guidance, 0.0, open_low=True)
        binary = "gaussian" not in (machine.visible, machine.hidden_units)
        must = "1 for a top machine with Gaussian units"
        check.argument(binary or temperature == 1, "temperature", must, temperature)
        guided = jnp.asarray(top["kernel"]).at[pixels:].multiply(guidance)
        top = tree.scale(1.0 / temperature, {**top, "kernel": guided})
        start_key, label_key, chain_key, down_key = jax.random.split(key, 4)
        if start is None:
            v = jax.random.bernoulli(start_key, 0.5, (count, pixels)).astype(jnp.float32)
        else:
            v = self._up(below, start)
        known = None
        if self.num_classes:
            held = label is not None
            drawn = jax.random.randint(label_key, (count,), 0, self.num_classes)
            v = machine.joined(v, label if held else drawn)
            known = jnp.arange(v.shape[1]) >= (pixels if held else v.shape[1])
        else:
            check.argument(label is None, "label", "None without label units", "labels")
        v = machine.sample(top, chain_key, v, steps, known)
        if not below:
            h = machine.draw_hidden(machine.hidden_input(top, v), down_key)
            return machine.visible_mean(machine.visible_input(top, h))[:, :pixels]
        h = v[:, :pixels]
        for i in reversed(range(1, len(below))):
            h = draw_bernoulli(
                self.rbm(i).visible_input(below[i], h), jax.random.fold_in(down_key, i)
            )
        lowest = self.rbm(0)
        return lowest.visible_mean(lowest.visible_input(below[0], h))

    def unrolled_mlp(self, params: Sequence[Params], num_outputs: int) -> tuple[MLP, Params]:
        """A sigmoid MLP with the stack's weights, and its parameters.

        Its last layer has the top machine's label weights, or zeros without label units.
        """
        self._check_depth(params)
        ok = self.num_classes in (0, num_outputs)
        must = f"the {self.num_classes} classes of the label units"
        check.argument(ok, "num_outputs", must, num_outputs)
        net = MLP(widths=tuple(self.widths), num_outputs=num_outputs, activation="sigmoid")
        layers = {f"Dense_{i}": self._dense(params, i) for i in range(len(self.widths))}
        top, n = params[-1], self._top_inputs(params)
        kernel, bias = jnp.zeros((self.widths[-1], num_outputs)), jnp.zeros(num_outputs)
        if self.num_classes:
            kernel, bias = top["kernel"][n:].T, top["visible_bias"][n:]
        return net, {**layers, "outputs": {"kernel": kernel, "bias": bias}}

    def unrolled_autoencoder(self, params: Sequence[Params]) -> tuple[Autoencoder, Params]:
        """A deep autoencoder with the stack's weights, and its parameters; outputs are logits."""
        self._check_depth(params)
        check.argument(self.num_classes == 0, "num_classes", "0 for an autoencoder", "label units")
        depth = len(self.widths)
        code = "linear" if self.linear_code else "sigmoid"
        net = Autoencoder(tuple(self.widths), activation="sigmoid", code_activation=code)
        up = {f"encoder_{i}": self._dense(params, i) for i in range(depth)}
        names = [*(f"decoder_{i}" for i in range(depth - 1)), "reconstruction"]
        down = {
            name: {"kernel": p["kernel"].T, "bias": p["visible_bias"]}
            for name, p in zip(names, reversed(params), strict=True)
        }
        return net, up | down

    def _check_depth(self, params: Sequence[Params]) -> None:
        depth = len(self.widths)
        check.argument(len(params) == depth, "params", f"of {depth} layers", len(params))

    def _top_inputs(self, params: Sequence[Params]) -> int:
        return int(params[-1]["visible_bias"].size) - self.num_classes

    def _dense(self, params: Sequence[Params], i: int) -> Params:
        p = params[i]
        n = p["kernel"].shape[0] if i < len(params) - 1 else self._top_inputs(params)
        return {"kernel": p["kernel"][:n], "bias": p["hidden_bias"]}


def starting_at(model: Model | nn.Module, params: Params) -> Model:
    """The model with these initial parameters, for fine-tuning.

    Raises:
      ArgumentError: on initialization, if their shapes are not the model's.

    >>> net = starting_at(MLP(widths=(), num_outputs=2), {"outputs": {"kernel": jnp.ones((3, 2))}})
    >>> net.init(jax.random.key(0), jnp.ones((1, 3)))
    Traceback (most recent call last):
        ...
    jdl.core.check.ArgumentError: `params` must be of the model's shapes, \
{'outputs': {'bias': (2,), 'kernel': (3, 2)}}, got {'outputs': {'kernel': (3, 2)}}.
    """
    base = as_model(model)

    def init(key: Key, *inputs: Any) -> tuple[Params, ModelState]:
        own, state = base.init(key, *inputs)
        shapes, mine = (jax.tree.map(jnp.shape, tree) for tree in (own, params))
        check.argument(shapes == mine, "params", f"of the model's shapes, {shapes}", mine)
        return params, state

    return Model(init, base.apply)


# ---------------------------------------------------------------------- wake and sleep


def up_down(dbn: DBN, params: Sequence[Params], *, k: int = 3) -> Model:
    r"""The up-down algorithm, which fine-tunes the whole stack as a generative model.

    All layers but the top get separate recognition weights R (up) and generative weights G (down).
    All samples are held fixed, and the loss is one sum:

        −Σₗ log P_G(hˡ | hˡ⁺¹)   of a wake pass up,
        −Σₗ log P_R(hˡ⁺¹ | hˡ)   of a sleep pass down, after k Gibbs steps in the top machine,
        F(top wake state) − F(top sleep state).

    The `dbn` has binary units; its `params` come from greedy training. The `Model` has parameters
    `{"up", "down", "top"}`, which `merged` converts to a stack's, and its outputs are the losses,
    float[B]: train it with `jdl.models.dbn.as_loss`.

    References:
      Hinton, Osindero and Teh 2006, section 5 and appendix B.
    """
    dbn._check_depth(params)
    check.positive_int("k", k)
    binary = dbn.visible == "bernoulli" and not dbn.linear_code
    check.argument(binary, "dbn", "of binary units", dbn)
    depth = len(dbn.widths) - 1
    machines = [dbn.rbm(i) for i in range(depth + 1)]
    start = {
        "up": [{"kernel": p["kernel"], "bias": p["hidden_bias"]} for p in params[:-1]],
        "down": [{"kernel": p["kernel"], "bias": p["visible_bias"]} for p in params[:-1]],
        "top": params[-1],
    }

    def up(p: Params, i: int, h: jax.Array) -> jax.Array:
        return h @ p["up"][i]["kernel"] + p["up"][i]["bias"][None]

    def down(p: Params, i: int, h: jax.Array) -> jax.Array:
        return h @ p["down"][i]["kernel"].T + p["down"][i]["bias"][None]

    def cost(logits: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.sum(jax.nn.softplus(logits) - target * logits, axis=1)

    def apply(
        p: Params, state: ModelState, *inputs: Any, key: Key | None = None, train: bool = False
    ) -> tuple[jax.Array, ModelState]:
        if key is None:  # each example by itself, with its own key

            def one(own: Key, *x: jax.Array) -> jax.Array:
                return apply(p, state, *(a[None] for a in x), key=own)[0][0]

            return jax.vmap(one)(example_keys(inputs[0]), *inputs), state
        x, *label = inputs
        keys = jax.random.split(key, 2 * depth + 2)
        fixed = jax.lax.stop_gradient(p)
        wake = [x.reshape(x.shape[0], -1)]
        for i in range(depth):
            wake.append(draw_bernoulli(up(fixed, i, wake[i]), keys[i]))
        machine = machines[depth]
        top = machine.joined(wake[depth], *label)
        asleep = machine.sample(fixed["top"], keys[-1], top, k)
        pixels = asleep.shape[1] - dbn.num_classes
        sleep = {depth: asleep[:, :pixels]}
        for i in reversed(range(depth)):
            sleep[i] = draw_bernoulli(down(fixed, i, sleep[i + 1]), keys[depth + i])
        losses = machine.free_energy(p["top"], top) - machine.free_energy(p["top"], asleep)
        for i in range(depth):
            losses = losses + cost(down(p, i, wake[i + 1]), wake[i])
            losses = losses + cost(up(p, i, sleep[i]), sleep[i + 1])
        return losses, state

    return Model(lambda key, *inputs: (start, {}), apply)


def as_loss(outputs: jax.Array, batch: Batch) -> jax.Array:
    """The loss of a model whose outputs are losses."""
    return outputs


def merged(params: Params) -> list[Params]:
    """A stack's parameters after `up_down`: generative weights, recognition biases."""
    layers = [
        {"kernel": g["kernel"], "visible_bias": g["bias"], "hidden_bias": r["bias"]}
        for g, r in zip(params["down"], params["up"], strict=True)
    ]
    return [*layers, params["top"]]
