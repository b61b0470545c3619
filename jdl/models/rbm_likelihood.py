r"""The partition function Z = Σᵥ exp −F(v) of a restricted Boltzmann machine, and likelihoods."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdl.core import check
from jdl.core.types import Key, Params
from jdl.models.rbm import RBM

LARGEST_ERROR = 0.1  # relative standard error of Z above which likelihoods are refused
_CHUNK = 12  # log2 of the number of hidden states summed at once


class Annealed(NamedTuple):
    """An estimate of log Z."""

    log_z: float  # log of the mean importance weight, in nats
    # standard error of Z / Z, from the weights' variance; unreliable if large: few weights dominate
    relative_error: float
    low: float  # log(Z − 3 standard errors); −inf if that is not positive
    high: float  # log(Z + 3 standard errors)
    log_weights: np.ndarray  # of each chain


def temperatures(count: int = 14_500) -> np.ndarray:
    """Inverse temperatures from 0 to 1, densest near 1, as in Salakhutdinov and Murray (2008).

    >>> temperatures(29)[[0, 1, -1]].round(2).tolist()
    [0.0, 0.5, 1.0]
    """
    check.argument(count >= 29, "count", "at least 29", count)
    first, middle = max(count // 29, 1), 8 * count // 29
    low = np.linspace(0, 0.5, first, endpoint=False), np.linspace(0.5, 0.9, middle, endpoint=False)
    return np.concatenate([*low, np.linspace(0.9, 1, count - first - middle)])


def annealed_log_z(
    rbm: RBM,
    params: Params,
    key: Key,
    *,
    chains: int = 100,
    betas: Any = None,
    base_bias: Any = None,
) -> Annealed:
    r"""Estimates log Z by annealed importance sampling.

    Chains go from independent units with biases a, whose Z is known, to the machine through

        −F_β(v) = −(1 − β) ε_a(v) − β ε_b(v) + Σⱼ log Σₕⱼ exp β hⱼ (cⱼ + s(v)ᵀ Wⱼ)

    with importance weights Π exp(F_βₖ₋₁(v) − F_βₖ(v)).

    Args:
      rbm: the machine.
      params: its parameters.
      key: a random key.
      chains: the number of importance weights to average.
      betas: increasing inverse temperatures from 0 to 1; None for the paper's 14,500.
      base_bias: a, [V]; None for the machine's visible biases. The data's log odds
        (`jdl.models.rbm.log_odds`) are better.

    References:
      Salakhutdinov and Murray, On the quantitative analysis of deep belief networks, ICML 2008,
      section 4.
    """
    check.positive_int("chains", chains)
    check.argument(chains >= 2, "chains", "at least 2, for an error", chains)
    betas = np.asarray(temperatures() if betas is None else betas, np.float32)
    ordered = betas.ndim == 1 and betas[0] == 0 and betas[-1] == 1 and np.all(np.diff(betas) > 0)
    check.argument(bool(ordered), "betas", "increasing from 0 to 1", betas)
    bias = params["visible_bias"]
    base = bias if base_bias is None else jnp.asarray(base_bias, bias.dtype)
    check.argument(base.shape == bias.shape, "base_bias", f"of shape {bias.shape}", base.shape)
    log_weights = _anneal(rbm, params, base, key, jnp.asarray(betas), chains)
    hidden = rbm.hidden * float(rbm.log_hidden(jnp.zeros(())))
    start = float(_log_z_of_visible(rbm, base[None])[0]) + hidden
    weights = np.asarray(log_weights, np.float64)
    check.argument(bool(np.isfinite(weights).all()), "params", "finite numbers", "NaN or infinity")
    shift = weights.max()
    scaled = np.exp(weights - shift)
    error = scaled.std(ddof=1) / math.sqrt(chains) / scaled.mean()
    log_z = start + shift + math.log(scaled.mean())
    low = log_z + math.log1p(-3 * error) if 3 * error < 1 else -math.inf
    return Annealed(log_z, float(error), low, log_z + math.log1p(3 * error), start + weights)


@functools.partial(jax.jit, static_argnames=("rbm", "chains"))
def _anneal(
    rbm: RBM, params: Params, base: jax.Array, key: Key, betas: jax.Array, chains: int
) -> jax.Array:
    """Log weights [chains], without the base's own log Z."""
    bias = params["visible_bias"]

    def minus_energy(v: jax.Array, a: jax.Array, beta: jax.Array) -> jax.Array:
        own = (1 - beta) * rbm.visible_energy(base, v) + beta * rbm.visible_energy(bias, v)
        return jnp.sum(rbm.log_hidden(beta * a), axis=1) - own

    def step(state: Any, pair: Any) -> Any:
        v, log_weights = state
        i, cold, warm = pair  # the last beta and the next
        a = rbm.hidden_input(params, v)
        log_weights = log_weights + minus_energy(v, a, warm) - minus_energy(v, a, cold)
        h_key, v_key = jax.random.split(jax.random.fold_in(key, i))
        h = rbm.draw_hidden(warm * a, h_key)
        back = (1 - warm) * base[None] + warm * rbm.visible_input(params, h)
        return (rbm.draw_visible(back, v_key), log_weights), None

    first = rbm.draw_visible(jnp.broadcast_to(base[None], (chains, base.size)), key)
    steps = (jnp.arange(1, betas.size), betas[:-1], betas[1:])
    return jax.lax.scan(step, (first, jnp.zeros(chains, first.dtype)), steps)[0][1]


def exact_log_z(rbm: RBM, params: Params) -> float:
    """The exact log Z, by summing over all states of at most 20 binary hidden units.

    >>> params = {"kernel": jnp.zeros((3, 2)), "visible_bias": jnp.zeros(3)}
    >>> round(exact_log_z(RBM(hidden=2), params | {"hidden_bias": jnp.zeros(2)}), 4)  # 5 log 2
    3.4657
    """
    n = rbm.hidden
    check.argument(n <= 20, "hidden", "at most 20 to be enumerated", n, "Use annealed_log_z.")
    binary = rbm.hidden_units == "bernoulli"
    check.argument(binary, "hidden_units", "bernoulli to be enumerated", "gaussian")
    inner = min(n, _CHUNK)
    low = np.asarray(list(itertools.product((0, 1), repeat=inner)), np.float32)
    parts = []
    for high in itertools.product((0, 1), repeat=n - inner):
        h = np.concatenate([low, np.tile(np.asarray(high, np.float32), (len(low), 1))], axis=1)
        parts.append(float(_log_sum(rbm, params, jnp.asarray(h))))
    return float(functools.reduce(np.logaddexp, parts))


@functools.partial(jax.jit, static_argnames="rbm")
def _log_sum(rbm: RBM, params: Params, h: jax.Array) -> jax.Array:
    """The log of these hidden states' contribution to Z."""
    a = rbm.visible_input(params, h)
    log_p = h @ params["hidden_bias"] + _log_z_of_visible(rbm, a)
    if rbm.visible == "gaussian":  # completing the square leaves (mean² − b²)/2σ²
        n = a.shape[1] - rbm.num_classes
        squares = jnp.square(a[:, :n]) - jnp.square(params["visible_bias"][None, :n])
        log_p += jnp.sum(squares, axis=1) / (2 * rbm.sigma**2)
    return jax.nn.logsumexp(log_p)


def _log_z_of_visible(rbm: RBM, a: jax.Array) -> jax.Array:
    """The log of the sum over visible states, [B], of independent units with input a [B, V]."""
    n = a.shape[1] - rbm.num_classes
    if rbm.visible == "bernoulli":
        pixels = jnp.sum(jax.nn.softplus(a[:, :n]), axis=1)
    else:
        pixels = jnp.full(a.shape[0], 0.5 * n * math.log(2 * math.pi * rbm.sigma**2), a.dtype)
    return pixels + jax.nn.logsumexp(a[:, n:], axis=1) if rbm.num_classes else pixels


def log_likelihood(
    rbm: RBM, params: Params, v: Any, log_z: float | Annealed, *, batch_size: int = 1000
) -> float:
    """The mean of −F(v) − log Z over visible units [N, V], in nats; refused for an uncertain Z."""
    if isinstance(log_z, Annealed):
        if log_z.relative_error > LARGEST_ERROR:
            raise check.TrainingError(
                f"The relative standard error of Z is {log_z.relative_error:.2g}, above "
                f"{LARGEST_ERROR}: too large for a likelihood. Use more chains and temperatures."
            )
        log_z = log_z.log_z
    energy = jax.jit(rbm.free_energy)
    v = np.asarray(v)
    check.argument(v.ndim == 2 and len(v) > 0, "v", "of shape [N, V], N ≥ 1", v.shape)
    parts = [
        np.asarray(energy(params, jnp.asarray(v[i : i + batch_size])), np.float64)
        for i in range(0, len(v), batch_size)
    ]
    return float(-np.concatenate(parts).mean() - log_z)


def pseudo_log_likelihood(
    rbm: RBM, params: Params, v: jax.Array, key: Key | None = None
) -> jax.Array:
    """Σᵢ log P(vᵢ | v₋ᵢ), [B], of binary visible units [B, V], in nats.

    With a key an unbiased but noisy estimate, V log P of one random unit; without, the sum over all
    units, at V times the cost.
    """
    ok = rbm.visible == "bernoulli" and rbm.num_classes == 0
    check.argument(ok, "rbm", "one of binary visible units without labels", rbm)
    a, size = rbm.hidden_input(params, v), v.shape[1]
    held = jnp.sum(rbm.log_hidden(a), axis=1)

    def log_p(unit: jax.Array) -> jax.Array:
        """Log P of the unit int[B] of each example."""
        change = 1 - 2 * jnp.take_along_axis(v, unit[:, None], axis=1)
        flipped = jnp.sum(rbm.log_hidden(a + change * params["kernel"][unit]), axis=1)
        gain = flipped - held + change[:, 0] * params["visible_bias"][unit]
        return jax.nn.log_sigmoid(-gain)

    if key is not None:
        return size * log_p(jax.random.randint(key, v.shape[:1], 0, size))
    units = jnp.broadcast_to(jnp.arange(size)[:, None], (size, v.shape[0]))
    zeros = jnp.zeros(v.shape[0], v.dtype)
    return jax.lax.fori_loop(0, size, lambda i, total: total + log_p(units[i]), zeros)
