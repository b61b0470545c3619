r"""The restricted Boltzmann machine, with contrastive divergence as an objective.

    E(v, h) = ε(v) − cᵀh − s(v)ᵀ W h
    F(v)    = −log Σₕ exp −E(v, h) = ε(v) − Σⱼ softplus(cⱼ + s(v)ᵀ Wⱼ)

with ε(v) = −bᵀv and s(v) = v for binary units, |v − b|²/2σ² and v/σ for Gaussian ones.
Contrastive divergence is the gradient of

    F(v) − F(ṽ)

where ṽ comes from k steps of Gibbs sampling and is held fixed. Sampling starts from v (CD-k), or
continues chains from step to step (PCD), which are model state and so are saved and resumed.

Parameters are a dict: `kernel` [V, H], `visible_bias` [V], `hidden_bias` [H]. The last K of the V
visible units are softmax label units, if there are any.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdl.core import check
from jdl.core.types import Batch, Key, Params
from jdl.models.layers import one_hot


class Energies(NamedTuple):
    """The outputs of an RBM for a batch."""

    positive: jax.Array  # F(v), [B]
    negative: jax.Array  # F(ṽ), [B]; with persistent chains the mean over all of them
    visible: jax.Array  # the mean-field reconstruction of the inputs, [B, ...]
    hidden: jax.Array  # P(hⱼ = 1 | v), [B, H]; for Gaussian hidden units their means
    classes: jax.Array  # −F(x, y) for each label y, [B, K]: logits of P(y | x)


def contrastive_divergence(outputs: Energies, batch: Batch) -> jax.Array:
    """F(v) − F(ṽ), the loss whose gradient is (persistent) contrastive divergence.

    Its value says nothing about the likelihood. Use it with optimizers that need the gradient only:
    a line search meets different samples, from the same random numbers, at each trial point.
    """
    return outputs.positive - outputs.negative


_WHY = "Contrastive divergence has a gradient, but no value and no curvature to go by."
cast(Any, contrastive_divergence).gradient_only = _WHY


def sparse_divergence(target: float, cost: float) -> Callable[[Energies, Batch], jax.Array]:
    """Contrastive divergence + cost · Σⱼ cross-entropy(target, P(hⱼ = 1 | v)).

    The penalty's derivative with respect to a unit's input is cost · (P(hⱼ) − target). The target
    is the desired mean activity of the hidden units, in [10⁻⁶, 1 − 10⁻⁶].

    References:
      Hinton, A practical guide to training restricted Boltzmann machines, 2010, section 11.
    """
    check.in_range("target", target, 1e-6, 1 - 1e-6)
    check.in_range("cost", cost, 0.0)

    def loss(outputs: Energies, batch: Batch) -> jax.Array:
        q = jnp.clip(outputs.hidden, 1e-6, 1 - 1e-6)
        entropy = -target * jnp.log(q) - (1 - target) * jnp.log1p(-q)
        return contrastive_divergence(outputs, batch) + cost * jnp.sum(entropy, axis=1)

    cast(Any, loss).gradient_only = _WHY
    return loss


def log_odds(mean: Any) -> Callable[..., jax.Array]:
    """An initializer of visible biases: log p/(1 − p) of the data's mean, within ±log 199.

    >>> log_odds([0.5, 0.0])(jax.random.key(0), (2,)).round(2).tolist()
    [0.0, -5.289999961853027]
    """
    mean = jnp.clip(jnp.ravel(jnp.asarray(mean, jnp.float32)), 0.005, 0.995)

    def init(key: Key, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        bias = jnp.log(mean) - jnp.log1p(-mean)
        return jnp.zeros(shape, dtype).at[: mean.size].set(bias.astype(dtype))

    return init


class RBM(nn.Module):
    """A restricted Boltzmann machine; `contrastive_divergence` is its loss.

    Inputs [B, ...] are flattened. With `num_classes` it takes labels too and models both. In
    evaluation ṽ is the mean-field reconstruction, without sampling.

    Attributes:
      hidden: hidden units, H.
      visible: "bernoulli" for values in [0, 1], used as probabilities, or "gaussian".
      hidden_units: "bernoulli", or "gaussian" with variance 1, for a linear code.
      num_classes: softmax label units, K.
      sigma: standard deviation of Gaussian visible units, given the hidden ones.
      k: Gibbs steps per training step.
      chains: the number of persistent chains (PCD); 0 to start each step from the data (CD).
      fast_rate: learning rate of fast PCD's additional weights, which only the chains use; 0 for
        none.
      fast_decay: factor on them at each step, in [0, 1].
      sample_visible: whether ṽ is sampled. False uses its mean, with which CD-1 reached a much
        better likelihood on black and white digits, but less discriminative features.
      kernel_init, visible_bias_init, hidden_bias_init: initializers.

    >>> rbm = RBM(hidden=5)
    >>> variables = rbm.init(jax.random.key(0), jnp.ones((2, 4)))
    >>> rbm.apply(variables, jnp.ones((2, 4))).hidden.shape
    (2, 5)
    >>> rbm.free_energy(variables["params"], jnp.zeros((1, 4))).round(4).tolist()  # −5 log 2
    [-3.4656999111175537]

    References:
      Hinton, Training products of experts by minimizing contrastive divergence, Neural Computation
      14, 2002; Tieleman, Training restricted Boltzmann machines using approximations to the
      likelihood gradient, ICML 2008 (PCD); Tieleman and Hinton, Using fast weights to improve
      persistent contrastive divergence, ICML 2009; Hinton, A practical guide to training
      restricted Boltzmann machines, 2010.
    """

    hidden: int = 500
    visible: str = "bernoulli"
    hidden_units: str = "bernoulli"
    num_classes: int = 0
    sigma: float = 1.0
    k: int = 1
    chains: int = 0
    fast_rate: float = 0.0
    fast_decay: float = 0.95
    sample_visible: bool = True
    kernel_init: Callable[..., jax.Array] = nn.initializers.normal(0.01)
    visible_bias_init: Callable[..., jax.Array] = nn.initializers.zeros
    hidden_bias_init: Callable[..., jax.Array] = nn.initializers.zeros

    @nn.compact
    def __call__(
        self, x: jax.Array, label: jax.Array | None = None, train: bool = False
    ) -> Energies:
        """Energies of inputs [B, ...] and of the samples of the Gibbs chain."""
        self._check()
        v = self.joined(x, label)
        size = v.shape[1]
        params = {
            "kernel": self.param("kernel", self.kernel_init, (size, self.hidden)),
            "visible_bias": self.param("visible_bias", self.visible_bias_init, (size,)),
            "hidden_bias": self.param("hidden_bias", self.hidden_bias_init, (self.hidden,)),
        }
        chain = fast = None
        if self.chains:
            start = (self.chains, self.hidden)
            chain = self.variable("chains", "hidden", self._first_chains, start)
            if self.fast_rate:
                fast = self.variable("chains", "fast", lambda: jax.tree.map(jnp.zeros_like, params))
        hidden = self.hidden_mean(self.hidden_input(params, v))
        means = self.visible_mean(self.visible_input(params, hidden))
        frozen = jax.lax.stop_gradient(params)
        if not train or self.is_initializing():
            negative = self.free_energy(params, jax.lax.stop_gradient(means))
        elif chain is None:
            sample = self._contrast(frozen, v, self.make_rng("dropout"))
            negative = self.free_energy(params, jax.lax.stop_gradient(sample))
        else:
            seen = frozen if fast is None else jax.tree.map(jnp.add, frozen, fast.value)
            h = chain.value.astype(v.dtype)
            sample, h = self.gibbs(seen, h, self.make_rng("dropout"), self.k)
            chain.value = h.astype(jnp.int8)
            if fast is not None:
                fast.value = self._faster(fast.value, frozen, v, sample)
            mean = jnp.mean(self.free_energy(params, jax.lax.stop_gradient(sample)))
            negative = jnp.broadcast_to(mean, v.shape[:1])
        positive = self.free_energy(params, v)
        if self.visible == "bernoulli":
            positive = jnp.where(jnp.all((v >= 0) & (v <= 1), axis=1), positive, jnp.nan)
        n = size - self.num_classes
        pixels = means[:, :n].reshape(x.shape)
        return Energies(positive, negative, pixels, hidden, self.class_logits(params, v[:, :n]))

    # ------------------------------------------------------------------ pure functions of params

    @nn.nowrap
    def joined(self, x: Any, label: Any = None) -> jax.Array:
        """Visible units [B, V] of inputs [B, ...] and int labels [B] or probabilities [B, K].

        Raises:
          ArgumentError: labels are missing or not expected; or, outside of `jit`, values of binary
            units are not in [0, 1], or labels no classes. Inside `jit` such values give NaN.
        """
        if self.visible == "bernoulli":
            hint = 'Scale them, or use visible="gaussian" on standardized data.'
            check.values("x", x, 0, 1, "in [0, 1] for binary visible units", hint)
        x = jnp.asarray(x)
        check.argument(x.ndim >= 2, "x", "of shape [B, ...]", x.shape)
        v = x.reshape(x.shape[0], -1)
        v = v if jnp.issubdtype(v.dtype, jnp.floating) else v.astype(jnp.float32)
        if self.num_classes == 0:
            check.argument(label is None, "label", "None without label units", type(label))
            return v
        must = f"given, for {self.num_classes} label units"
        check.argument(label is not None, "label", must, label)
        if jnp.issubdtype(jnp.result_type(label), jnp.integer):
            label = one_hot("label", label, self.num_classes, v.dtype)
        return jnp.concatenate([v, jnp.asarray(label, v.dtype)], axis=1)

    @nn.nowrap
    def free_energy(self, params: Params, v: jax.Array) -> jax.Array:
        """F(v), [B], of visible units [B, V], in nats."""
        hidden = jnp.sum(self.log_hidden(self.hidden_input(params, v)), axis=1)
        return self.visible_energy(params["visible_bias"], v) - hidden

    @nn.nowrap
    def visible_energy(self, bias: jax.Array, v: jax.Array) -> jax.Array:
        """ε(v), [B]."""
        if self.visible == "bernoulli":
            return -v @ bias
        n = v.shape[1] - self.num_classes
        apart = (v[:, :n] - bias[None, :n]) / self.sigma
        return 0.5 * jnp.sum(jnp.square(apart), axis=1) - v[:, n:] @ bias[n:]

    @nn.nowrap
    def log_hidden(self, a: jax.Array) -> jax.Array:
        """The contribution to −F of a hidden unit with input a."""
        return jax.nn.softplus(a) if self.hidden_units == "bernoulli" else 0.5 * jnp.square(a)

    @nn.nowrap
    def hidden_input(self, params: Params, v: jax.Array) -> jax.Array:
        """Inputs of the hidden units, c + s(v)ᵀ W, [B, H]."""
        return self._scaled(v, 1.0 / self.sigma) @ params["kernel"] + params["hidden_bias"][None]

    @nn.nowrap
    def visible_input(self, params: Params, h: jax.Array) -> jax.Array:
        """Inputs of the visible units, [B, V]: log odds b + W h, or Gaussian means b + σ W h."""
        return params["visible_bias"][None] + self._scaled(h @ params["kernel"].T, self.sigma)

    @nn.nowrap
    def hidden_mean(self, a: jax.Array) -> jax.Array:
        """E[h], from the hidden input."""
        return jax.nn.sigmoid(a) if self.hidden_units == "bernoulli" else a

    @nn.nowrap
    def visible_mean(self, a: jax.Array) -> jax.Array:
        """E[v], from the visible input."""
        n = a.shape[1] - self.num_classes
        pixels = jax.nn.sigmoid(a[:, :n]) if self.visible == "bernoulli" else a[:, :n]
        if not self.num_classes:
            return pixels
        return jnp.concatenate([pixels, jax.nn.softmax(a[:, n:])], 1)

    @nn.nowrap
    def draw_hidden(self, a: jax.Array, key: Key) -> jax.Array:
        """Samples of h, from the hidden input."""
        if self.hidden_units == "gaussian":
            return a + jax.random.normal(key, a.shape, a.dtype)
        return draw_bernoulli(a, key)

    @nn.nowrap
    def draw_visible(self, a: jax.Array, key: Key) -> jax.Array:
        """Samples of v, from the visible input."""
        key, label_key = jax.random.split(key)
        n = a.shape[1] - self.num_classes
        x = a[:, :n]
        if self.visible == "gaussian":
            x = x + self.sigma * jax.random.normal(key, x.shape, x.dtype)
        else:
            x = draw_bernoulli(x, key)
        if not self.num_classes:
            return x
        drawn = jax.random.categorical(label_key, a[:, n:])
        return jnp.concatenate([x, jax.nn.one_hot(drawn, self.num_classes, dtype=a.dtype)], 1)

    @nn.nowrap
    def gibbs(
        self, params: Params, h: jax.Array, key: Key, steps: int
    ) -> tuple[jax.Array, jax.Array]:
        """(v, h) after `steps` of v ~ P(v | h), h ~ P(h | v) from hidden units [B, H]."""

        def step(i: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            v_key, h_key = jax.random.split(jax.random.fold_in(key, i))
            v = self.draw_visible(self.visible_input(params, state[1]), v_key)
            return v, self.draw_hidden(self.hidden_input(params, v), h_key)

        none = jnp.zeros((h.shape[0], params["visible_bias"].size), h.dtype)
        if steps == 1:  # without a loop, XLA shares work with the free energy
            return step(0, (none, h))
        return jax.lax.fori_loop(0, steps, step, (none, h))

    @nn.nowrap
    def sample(
        self, params: Params, key: Key, v: jax.Array, steps: int, known: jax.Array | None = None
    ) -> jax.Array:
        """Visible units [B, V] after Gibbs steps from `v`; the units marked in `known` stay fixed.

        Args:
          params: the parameters.
          key: a random key.
          v: where to start, [B, V].
          steps: the number of Gibbs steps, ≥ 1.
          known: 1 or True for units to keep at their value in `v`, of a shape that broadcasts to
            [B, V]; None for none. Fix pixels to complete an image, labels to sample from a class.
        """

        def step(i: Any, now: jax.Array) -> jax.Array:
            h_key, v_key = jax.random.split(jax.random.fold_in(key, i))
            h = self.draw_hidden(self.hidden_input(params, now), h_key)
            return self.draw_visible(self.visible_input(params, h), v_key)

        return _iterated(step, v, steps, known)

    @nn.nowrap
    def mean_field(
        self, params: Params, v: jax.Array, steps: int, known: jax.Array | None = None
    ) -> jax.Array:
        """`sample` with means in place of samples: the naive mean-field equations, iterated."""

        def step(_: Any, now: jax.Array) -> jax.Array:
            h = self.hidden_mean(self.hidden_input(params, now))
            return self.visible_mean(self.visible_input(params, h))

        return _iterated(step, v, steps, known)

    @nn.nowrap
    def transform(self, params: Params, x: Any, label: Any = None) -> jax.Array:
        """E[h | x], [B, H], as features for another model."""
        return self.hidden_mean(self.hidden_input(params, self.joined(x, label)))

    @nn.nowrap
    def class_logits(self, params: Params, x: jax.Array) -> jax.Array:
        """−F(x, y) for each label, [B, K]: log P(y | x) up to a constant."""
        x = x.reshape(x.shape[0], -1)
        n = params["visible_bias"].size - self.num_classes
        pixels = jnp.pad(x, [(0, 0), (0, self.num_classes)])
        a = self.hidden_input(params, pixels)[:, None] + params["kernel"][None, n:]
        return params["visible_bias"][None, n:] + jnp.sum(self.log_hidden(a), axis=2)

    @nn.nowrap
    def _check(self) -> None:
        check.one_of("visible", self.visible, ("bernoulli", "gaussian"))
        check.one_of("hidden_units", self.hidden_units, ("bernoulli", "gaussian"))
        check.positive_int("hidden", self.hidden)
        check.positive_int("k", self.k)
        check.in_range("sigma", self.sigma, 0.0, open_low=True)
        check.in_range("fast_rate", self.fast_rate, 0.0)
        check.in_range("fast_decay", self.fast_decay, 0.0, 1.0)
        for name in ("num_classes", "chains"):
            value = getattr(self, name)
            check.argument(isinstance(value, int) and value >= 0, name, "an integer ≥ 0", value)
        ok = self.hidden_units == "bernoulli" or (self.chains == 0 and self.visible == "bernoulli")
        must = '"bernoulli" for persistent chains or Gaussian visible units'
        check.argument(ok, "hidden_units", must, self.hidden_units)
        ok = self.chains > 0 or self.fast_rate == 0
        check.argument(ok, "chains", "positive for fast weights", 0)

    @nn.nowrap
    def _scaled(self, v: jax.Array, factor: float) -> jax.Array:
        """`v` with its Gaussian units multiplied by `factor`."""
        if self.visible == "bernoulli" or factor == 1.0:
            return v
        n = v.shape[1] - self.num_classes
        return jnp.concatenate([v[:, :n] * factor, v[:, n:]], axis=1)

    def _first_chains(self, shape: tuple[int, int]) -> jax.Array:
        return jax.random.bernoulli(self.make_rng("params"), 0.5, shape).astype(jnp.int8)

    @nn.nowrap
    def _contrast(self, params: Params, v: jax.Array, key: Key) -> jax.Array:
        """ṽ of CD-k."""
        first, rest, last = jax.random.split(key, 3)
        h = self.draw_hidden(self.hidden_input(params, v), first)
        if self.k > 1:
            h = self.gibbs(params, h, rest, self.k - 1)[1]
        a = self.visible_input(params, h)
        return self.draw_visible(a, last) if self.sample_visible else self.visible_mean(a)

    @nn.nowrap
    def _faster(self, fast: Params, params: Params, v: jax.Array, sample: jax.Array) -> Params:
        """Fast weights after this step's gradient."""

        def divergence(p: Params) -> jax.Array:
            return jnp.mean(self.free_energy(p, v)) - jnp.mean(self.free_energy(p, sample))

        grads = jax.grad(divergence)(params)
        return jax.tree.map(lambda f, g: self.fast_decay * f - self.fast_rate * g, fast, grads)


def draw_bernoulli(logits: jax.Array, key: Key) -> jax.Array:
    """Independent units in {0, 1} with P(1) = σ(logits).

    >>> draw_bernoulli(jnp.array([-50.0, 50.0]), jax.random.key(0)).tolist()
    [0.0, 1.0]
    """
    u = jax.random.uniform(key, logits.shape, logits.dtype)
    return (u < jax.nn.sigmoid(logits)).astype(logits.dtype)


def _iterated(
    step: Callable[[Any, jax.Array], jax.Array], v: jax.Array, steps: int, known: jax.Array | None
) -> jax.Array:
    """`v` after `steps` of `step`; the units marked in `known` stay fixed."""
    fixed = jnp.zeros(v.shape, bool)
    if known is not None:
        known = jnp.asarray(known).astype(bool)
        fixed = jnp.broadcast_to(known.reshape((1,) * (v.ndim - known.ndim) + known.shape), v.shape)
    check.positive_int("steps", steps)
    return jax.lax.fori_loop(0, steps, lambda i, now: jnp.where(fixed, v, step(i, now)), v)
