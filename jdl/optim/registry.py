"""Optimizers by name, each with its default learning rate and the range to tune it in."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jdl.core import check
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
    """The one number of an optimizer to tune, and its range, on a logarithmic scale.

    It is a field of the optimizer's state: `optax.tree.set(opt_state, **{parameter: x})` tries
    another value without compiling again.
    """

    parameter: str
    low: float
    high: float


class OptimizerSpec(NamedTuple):
    """An optimizer's entry in the registry.

    Attributes:
      make: `make(learning_rate, **options)` gives the transformation.
      learning_rate: the default.
      second_order: whether it uses curvature or a line search, and its state has `Diagnostics`.
      batches: "mini"; or "large" for one that is sensitive to sampling noise and works best on
        large batches, or the whole data set.
      search: what to tune, and over which range.
    """

    make: Callable[..., optax.GradientTransformation]
    learning_rate: float
    second_order: bool
    batches: str
    search: TuningRange


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


def _first_order(
    make: Callable[..., Any], learning_rate: float, low: float, high: float
) -> OptimizerSpec:
    @functools.wraps(make)  # `by_name` checks options by its signature
    def with_rate_as_state(rate: Any, **options: Any) -> optax.GradientTransformation:
        # The same arithmetic, but the rate is a field of the state rather than of the program.
        return optax.inject_hyperparams(lambda learning_rate: make(learning_rate, **options))(
            learning_rate=rate
        )

    return OptimizerSpec(
        with_rate_as_state, learning_rate, False, "mini", TuningRange("learning_rate", low, high)
    )


REGISTRY: dict[str, OptimizerSpec] = {
    "sgd": _first_order(optax.sgd, 0.1, 1e-3, 1.0),
    "momentum": _first_order(_momentum, 0.01, 1e-4, 0.3),
    "nesterov": _first_order(_nesterov, 0.01, 1e-4, 0.3),
    "adam": _first_order(optax.adam, 1e-3, 1e-5, 3e-2),
    "adamw": _first_order(optax.adamw, 1e-3, 1e-5, 3e-2),
    "nadam": _first_order(optax.nadam, 1e-3, 1e-5, 3e-2),
    "nadamw": _first_order(optax.nadamw, 1e-3, 1e-5, 3e-2),
    "radam": _first_order(optax.radam, 1e-3, 1e-5, 3e-2),
    "rmsprop": _first_order(optax.rmsprop, 1e-3, 1e-5, 3e-2),
    "adagrad": _first_order(optax.adagrad, 1e-2, 1e-4, 1.0),
    "adafactor": _first_order(_adafactor, 1e-2, 1e-4, 0.3),
    "lamb": _first_order(optax.lamb, 1e-3, 1e-5, 3e-2),
    "lars": _first_order(optax.lars, 0.1, 1e-3, 10.0),
    "lion": _first_order(optax.lion, 1e-4, 1e-6, 3e-3),
    "adopt": _first_order(optax.contrib.adopt, 1e-3, 1e-5, 3e-2),
    # Its slow mean starts at 0 and is not corrected for that, which is a warm-up of its own.
    "ademamix": _first_order(optax.contrib.ademamix, 1e-3, 1e-5, 3e-2),
    "prodigy": _first_order(_prodigy, 1.0, 0.1, 10.0),  # a factor on the rate that it estimates
    "schedule_free_sgd": _first_order(_free_sgd, 1.0, 1e-2, 10.0),
    "schedule_free_adamw": _first_order(_free_adamw, 2.5e-3, 1e-4, 3e-2),
    "muon": OptimizerSpec(muon, 2e-2, False, "mini", TuningRange("learning_rate", 1e-4, 0.3)),
    "sophia": _first_order(_sophia, 1e-3, 1e-5, 3e-2),
    "soap": _first_order(soap, 3e-3, 1e-4, 3e-2),
    "shampoo": _first_order(shampoo, 1e-3, 1e-4, 3e-2),
    "lbfgs": OptimizerSpec(lbfgs, 1.0, True, "large", TuningRange("learning_rate", 1e-2, 1.0)),
    "cg": OptimizerSpec(nonlinear_cg, 1.0, True, "large", TuningRange("learning_rate", 1e-2, 1.0)),
    "newton": OptimizerSpec(newton, 1.0, True, "large", TuningRange("damping", 1e-4, 10.0)),
    "hf": OptimizerSpec(hessian_free, 1.0, True, "large", TuningRange("damping", 1e-3, 100.0)),
    "gauss_newton": OptimizerSpec(
        gauss_newton, 1.0, True, "large", TuningRange("learning_rate", 1e-2, 1.0)
    ),
    "lm": OptimizerSpec(
        levenberg_marquardt, 1.0, True, "large", TuningRange("damping", 1e-6, 10.0)
    ),
    "natural_gradient": OptimizerSpec(
        natural_gradient, 0.3, True, "mini", TuningRange("learning_rate", 1e-2, 1.0)
    ),
    "kfac": OptimizerSpec(kfac, 1.0, True, "mini", TuningRange("damping", 1e-4, 10.0)),
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
        cg or nonlinear_cg, newton, hf or hessian_free, gauss_newton, lm or levenberg_marquardt,
        natural_gradient, kfac. Evaluate a schedule-free one as an Estimator does, not at the
        parameters that it trains but at `jdl.train.ema.weights_of(opt_state, params)`.
      learning_rate: > 0 or a schedule; None for the optimizer's own default. For second-order ones
        it scales the first trial step, and is best left alone. It is part of the state; a run that
        the Estimator resumes continues with the rate given last.
      **options: further arguments of the optimizer.

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
    known = inspect.signature(spec.make).parameters
    for option in options:
        check.one_of(f"an option of {name}", option, known)
    return spec.make(rate, **options)
