"""Optimizers by name, each with its default learning rate and the range to tune it in."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jdl.core import check
from jdl.optim.bfgs import bfgs
from jdl.optim.gauss_newton import gauss_newton
from jdl.optim.hessian_free import hessian_free
from jdl.optim.kfac import kfac
from jdl.optim.lbfgs import lbfgs
from jdl.optim.levenberg_marquardt import levenberg_marquardt
from jdl.optim.muon import muon
from jdl.optim.natural_gradient import natural_gradient
from jdl.optim.newton import newton
from jdl.optim.nonlinear_cg import nonlinear_cg
from jdl.optim.shampoo import shampoo
from jdl.optim.soap import soap
from jdl.optim.sophia import curvature_diagonal
from jdl.optim.transformation import ScalarOrSchedule


class TuningRange(NamedTuple):
    """One number of an optimizer to tune, and its range.

    Attributes:
      parameter: an argument of the optimizer.
      low: the smallest value.
      high: the largest.
      scale: on which values are spread evenly: "log", "linear", or "one minus log" for averages'
        decays β, where 1 − β is spread on a logarithmic scale.
      whole: whether only integers are tried.

    >>> TuningRange("b2", 0.9, 0.999, "one minus log").at(0.5), TuningRange("lr", 1e-4, 1.0).at(0.5)
    (0.99, 0.01)
    """

    parameter: str
    low: int | float
    high: int | float
    scale: str = "log"
    whole: bool = False

    def at(self, share: float) -> int | float:
        """The value that share of the way from low to high, in [0, 1], to four digits."""
        low, high = (self._scaled(x) for x in (self.low, self.high))
        x = low + share * (high - low)
        x = float(f"{x if self.scale == 'linear' else math.exp(x):.4g}")
        x = round(1.0 - x, 12) if self.scale == "one minus log" else x
        return round(x) if self.whole else x

    def share(self, value: int | float) -> int | float:
        """How far from low to high a value is: the inverse of `at`; −∞ or ∞ for the scale's end.

        >>> TuningRange("lr", 1e-4, 1.0).share(0.1)
        0.75
        """
        low, high, x = (self._scaled(x) for x in (self.low, self.high, value))
        return (x - low) / (high - low)

    def _scaled(self, value: int | float) -> int | float:
        if self.scale == "linear":
            return value
        x = 1.0 - value if self.scale == "one minus log" else value
        return math.log(x) if x > 0 else -math.inf


class OptimizerSpec(NamedTuple):
    """An optimizer's entry in the registry.

    Attributes:
      make: `make(learning_rate, **options)` gives the transformation.
      learning_rate: the default.
      second_order: whether it uses curvature or a line search, and its state has `Diagnostics`.
      batches: "mini"; or "large" for one that is sensitive to sampling noise and works best on
        large batches, or the whole data set.
      space: what to tune, and over which ranges, the main number first. That one is a field of the
        optimizer's state: `optax.tree.set(opt_state, **{parameter: x})` tries another value without
        compiling again.
    """

    make: Callable[..., optax.GradientTransformation]
    learning_rate: float
    second_order: bool
    batches: str
    space: tuple[TuningRange, ...]

    @property
    def search(self) -> TuningRange:
        """The main number to tune, and its range."""
        return self.space[0]


_momentum = functools.partial(optax.sgd, momentum=0.9)
_nesterov = functools.partial(optax.sgd, momentum=0.9, nesterov=True)
_adafactor = functools.partial(optax.adafactor, multiply_by_parameter_scale=False)
# Schedule-free steps are to begin with a warm-up (Defazio et al. 2024); x is then an average of
# what came after. Its SGD's rate is ten times SGD's, as y moves by (1 − b1) of a step.
_free_sgd = functools.partial(optax.contrib.schedule_free_sgd, warmup_steps=100)
_free_adamw = functools.partial(optax.contrib.schedule_free_adamw, warmup_steps=100)
# γ is the paper's for Gauss-Newton-Bartlett; optax's .01 is that for Hutchinson's estimate.
_sophia = functools.partial(
    optax.contrib.sophia, gamma=0.05, hessian_diagonal_fn=curvature_diagonal()
)


@functools.wraps(optax.contrib.prodigy)
def _prodigy(*args: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
    # Its state has the first parameters: a copy, as one array cannot be donated twice.
    made = optax.contrib.prodigy(*args, **options)
    return optax.GradientTransformationExtraArgs(
        lambda params: made.init(jax.tree.map(jnp.copy, params)), made.update
    )


_MOMENTUM = TuningRange("momentum", 0.5, 0.99, "one minus log")
_B1 = TuningRange("b1", 0.5, 0.98, "one minus log")
_B2 = TuningRange("b2", 0.9, 0.9999, "one minus log")
_DECAY = TuningRange("weight_decay", 1e-4, 1.0)  # decoupled: a factor on the learning rate
_SHAMPOO_BETA = TuningRange("shampoo_beta", 0.8, 0.99, "one minus log")
_BETA = TuningRange("beta", 0.8, 0.99, "one minus log")
_GRADIENT_DECAY = TuningRange("gradient_decay", 0.5, 0.98, "one minus log")


def _first_order(
    make: Callable[..., Any], learning_rate: float, low: float, high: float, *others: TuningRange
) -> OptimizerSpec:
    decays = "weight_decay" in inspect.signature(make).parameters

    @functools.wraps(make)  # `by_name` checks options by its signature
    def with_rate_as_state(rate: Any, **options: Any) -> optax.GradientTransformation:
        decay = None if decays else options.pop("weight_decay", None)

        def at(learning_rate: Any) -> optax.GradientTransformation:
            made = make(learning_rate, **options)
            return made if decay is None else optax.chain(made, _shrinking(decay * learning_rate))

        # The same arithmetic, but the rate is a field of the state rather than of the program.
        return optax.inject_hyperparams(at)(learning_rate=rate)

    space = (TuningRange("learning_rate", low, high), *others)
    return OptimizerSpec(with_rate_as_state, learning_rate, False, "mini", space)


def _shrinking(by: Any) -> optax.GradientTransformation:
    """Adds −by · θ to the updates: decoupled weight decay."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda u, p: (u - by * p.astype(jnp.float32)).astype(u.dtype), updates, params
        )
    )


def _second_order(
    make: Callable[..., Any], learning_rate: float, batches: str, *space: TuningRange
) -> OptimizerSpec:
    return OptimizerSpec(make, learning_rate, True, batches, space)


def _rate(low: float, high: float = 1.0) -> TuningRange:
    return TuningRange("learning_rate", low, high)


def _damping(low: float, high: float) -> TuningRange:
    return TuningRange("damping", low, high)


REGISTRY: dict[str, OptimizerSpec] = {
    "sgd": _first_order(optax.sgd, 0.1, 1e-3, 1.0),
    "momentum": _first_order(_momentum, 0.01, 1e-4, 0.3, _MOMENTUM),
    "nesterov": _first_order(_nesterov, 0.01, 1e-4, 0.3, _MOMENTUM),
    "adam": _first_order(optax.adam, 1e-3, 1e-4, 3e-2, _B2, _B1),
    "adamw": _first_order(optax.adamw, 1e-3, 1e-4, 3e-2, _DECAY, _B2),
    "nadam": _first_order(optax.nadam, 1e-3, 1e-4, 3e-2, _B2, _B1),
    "nadamw": _first_order(optax.nadamw, 1e-3, 1e-4, 3e-2, _DECAY, _B2),
    "radam": _first_order(optax.radam, 1e-3, 1e-4, 3e-2, _B2, _B1),
    "rmsprop": _first_order(optax.rmsprop, 1e-3, 1e-4, 3e-2, _B2._replace(parameter="decay")),
    "adagrad": _first_order(optax.adagrad, 1e-2, 1e-4, 1.0),
    "adafactor": _first_order(_adafactor, 1e-2, 1e-4, 0.3),
    "lamb": _first_order(optax.lamb, 1e-3, 1e-4, 3e-2, _DECAY, _B2),
    "lars": _first_order(optax.lars, 0.1, 1e-3, 10.0, _MOMENTUM),
    "lion": _first_order(optax.lion, 1e-4, 1e-5, 3e-3, _DECAY, _B2),
    "adopt": _first_order(optax.contrib.adopt, 1e-3, 1e-4, 3e-2, _B2, _B1),
    # Its slow mean starts at 0 and is not corrected for that, which is a warm-up of its own.
    "ademamix": _first_order(optax.contrib.ademamix, 1e-3, 1e-4, 3e-2, _DECAY, _B2),
    "prodigy": _first_order(_prodigy, 1.0, 0.1, 10.0, _DECAY),  # a factor on the rate it estimates
    "schedule_free_sgd": _first_order(_free_sgd, 1.0, 1e-2, 10.0, _B1),
    "schedule_free_adamw": _first_order(_free_adamw, 2.5e-3, 1e-4, 3e-2, _DECAY, _B1),
    "muon": OptimizerSpec(muon, 2e-2, False, "mini", (_rate(1e-3, 0.3), _DECAY, _BETA)),
    "sophia": _first_order(_sophia, 1e-3, 1e-4, 3e-2, _DECAY, _B2),
    "soap": _first_order(soap, 3e-3, 1e-4, 3e-2, _DECAY, _SHAMPOO_BETA),
    "shampoo": _first_order(shampoo, 1e-3, 1e-4, 3e-2, _DECAY, _SHAMPOO_BETA),
    "lbfgs": _second_order(lbfgs, 1.0, "large", _rate(1e-2)),
    "bfgs": _second_order(bfgs, 1.0, "large", _rate(1e-2)),
    "ssbroyden": _second_order(
        functools.partial(bfgs, update="ssbroyden"), 1.0, "large", _rate(1e-2)
    ),
    "cg": _second_order(nonlinear_cg, 1.0, "large", _rate(1e-2)),
    "newton": _second_order(newton, 1.0, "large", _damping(1e-4, 10.0)),
    "hf": _second_order(hessian_free, 1.0, "large", _damping(1e-3, 100.0)),
    "gauss_newton": _second_order(gauss_newton, 1.0, "large", _rate(1e-2)),
    "lm": _second_order(levenberg_marquardt, 1.0, "large", _damping(1e-6, 10.0)),
    "natural_gradient": _second_order(
        natural_gradient, 0.3, "mini", _rate(1e-2), _damping(1e-2, 10.0)
    ),
    "kfac": _second_order(kfac, 1.0, "mini", _damping(1e-3, 10.0), _GRADIENT_DECAY, _rate(0.1)),
}


# A name of the registry -> the optimizer's function in `jdl.optim`; either is taken as a name.
LONG_NAMES = {"cg": "nonlinear_cg", "hf": "hessian_free", "lm": "levenberg_marquardt"}


def short_name(name: str, argument: str = "optimizer", others: Iterable[str] = ()) -> str:
    """The registry's name of an optimizer, given its short or its long name.

    Args:
      name: of the registry or of `LONG_NAMES`; hyphens count as underscores.
      argument: what the caller calls it, for the error.
      others: further names to accept.

    Raises:
      ArgumentError: for an unknown name; the message suggests the nearest.

    >>> short_name("hessian-free"), short_name("hf")
    ('hf', 'hf')
    """
    short = {long: short for short, long in LONG_NAMES.items()}
    known = dict.fromkeys([*REGISTRY, *short, *others])
    given = name.replace("-", "_") if isinstance(name, str) else name
    if given in known:
        return short.get(given, given)
    return str(check.one_of(argument, name, known))


def by_name(
    name: str, learning_rate: ScalarOrSchedule | None = None, **options: Any
) -> optax.GradientTransformation:
    """The optimizer of that name.

    Args:
      name: sgd, momentum, nesterov, adam, adamw, nadam, nadamw, radam, rmsprop, adagrad,
        adafactor, lamb, lars, lion, adopt, ademamix, prodigy, schedule_free_sgd,
        schedule_free_adamw, sophia (all optax's; sophia's update needs `objective`, `value_fn` or
        `obj_fn` too, see `jdl.optim.sophia.curvature_diagonal`), muon, soap, shampoo, lbfgs,
        bfgs, ssbroyden, cg or nonlinear_cg, newton, hf or hessian_free, gauss_newton, lm or
        levenberg_marquardt, natural_gradient, kfac. Evaluate a schedule-free one as an Estimator
        does, not at the parameters that it trains but at
        `jdl.train.ema.weights_of(opt_state, params)`.
      learning_rate: > 0 or a schedule; None for the optimizer's own default. For second-order ones
        it scales the first trial step, and is best left alone. It is part of the state; a run that
        the Estimator resumes continues with the rate given last.
      **options: further arguments of the optimizer. Each of first order also takes
        `weight_decay`, its own or else decoupled, θ ← θ − η λ θ beside the step; and `clip`, the
        largest global norm of the gradient that it is given.

    Raises:
      ArgumentError: for an unknown name or option; the message names the nearest.

    >>> by_name("lbgfs")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    jdl.core.check.ArgumentError: `optimizer` must be one of sgd, ..., got 'lbgfs'. Did you mean \
'lbfgs'?
    >>> import jax.numpy as jnp
    >>> state = by_name("adam", 0.01).init(jnp.zeros(2))
    >>> round(float(optax.tree.get(state, "learning_rate")), 3)
    0.01
    """
    spec = REGISTRY[short_name(name)]
    rate = spec.learning_rate if learning_rate is None else learning_rate
    if isinstance(rate, int | float):
        check.in_range("learning_rate", rate, 0.0, open_low=True)
    known = parameters(name)
    for option in options:
        if spec.second_order and option in EVERY_FIRST_ORDER:
            _refuse(option, options[option], name, known)
        check.one_of(f"an option of {name}", option, known)
    clip = options.pop("clip", None)
    for option, value in (("clip", clip), ("weight_decay", options.get("weight_decay"))):
        if isinstance(value, int | float):
            check.in_range(option, value, 0.0, open_low=option == "clip")
    made = spec.make(rate, **options)
    return made if clip is None else optax.chain(optax.clip_by_global_norm(clip), made)


# Options that every first-order method has, in addition to those of its own function.
EVERY_FIRST_ORDER = {
    name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=float)
    for name in ("weight_decay", "clip")
}


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """The arguments that `by_name` passes on to an optimizer, by name.

    Args:
      name: as for `by_name`.

    >>> [x for x in parameters("adam") if x not in parameters("sgd")]
    ['b1', 'b2', 'eps', 'eps_root', 'mu_dtype']
    """
    spec = REGISTRY[short_name(name)]
    own = dict(inspect.signature(spec.make).parameters)
    return own if spec.second_order else own | EVERY_FIRST_ORDER | own


def _refuse(option: str, value: Any, name: str, known: Iterable[str]) -> None:
    """Raises for a decay of weights or a clipped gradient in a second-order method."""
    if option == "weight_decay":
        must = f"left out: {name} steps by a model of the loss, which would not have the decay"
        hint = "hf and kfac have l2_reg, a term of the loss itself."
        if "l2_reg" in known:
            hint = "Give l2_reg, a term of the loss itself, as in `--option l2_reg=0.001`."
        check.argument(False, option, must, value, hint)
    must = f"left out: the line search or model of {name} needs the gradient of the loss as it is"
    bound = next((x for x in ("kl_clip", "trust_region") if x in known), None)
    hint = f"{bound} bounds its steps, as in `--option {bound}=0.1`." if bound else ""
    check.argument(False, option, must, value, hint)
