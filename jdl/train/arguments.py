"""The Estimator's arguments, checked, and made into what its parts are given."""

from collections.abc import Sequence
from typing import Any

import optax

from jdl.core import check
from jdl.core.model import Model, as_model, with_compute_dtype, with_remat
from jdl.optim import registry
from jdl.train.ema import averaging
from jdl.train.parallel import Placement


def check_all(
    loss: Any,
    microbatches: int,
    log_every: int,
    save_every: int | None,
    on_nonfinite: str,
    workdir: Any,
    hooks: Any,
) -> None:
    """Refuses arguments that no part of the Estimator would."""
    check.argument(
        isinstance(hooks, Sequence) and all(map(callable, hooks)),
        "hooks",
        "a list of functions",
        hooks,
    )
    check.argument(
        callable(loss), "loss", "a function of (outputs, batch)", loss, "`jdl.losses` has some."
    )
    check.positive_int("microbatches", microbatches)
    check.positive_int("log_every", log_every)
    if save_every is not None:
        check.positive_int("save_every", save_every)
    check.one_of("on_nonfinite", on_nonfinite, ("stop", "skip", "rollback"))
    check.argument(
        on_nonfinite != "rollback" or workdir is not None,
        "workdir",
        'given with on_nonfinite="rollback", which goes back to its checkpoints',
        workdir,
    )


def prepared_model(model: Any, compute_dtype: str | None, remat: bool) -> Model:
    """The pure functions of the model, computing as they are asked to."""
    prepared = as_model(model)
    if compute_dtype is not None:
        prepared = with_compute_dtype(prepared, compute_dtype)
    return with_remat(prepared) if remat else prepared


def prepared_optimizer(
    optimizer: str | optax.GradientTransformation, ema: float | None
) -> optax.GradientTransformation:
    """The transformation, found by its name if need be, with a moving average if asked for."""
    if isinstance(optimizer, str):
        optimizer = registry.by_name(optimizer)
    ok = hasattr(optimizer, "init") and hasattr(optimizer, "update")
    hint = "Call it: it makes a transformation." if callable(optimizer) else ""
    check.argument(ok, "optimizer", "an optax transformation or a name", optimizer, hint)
    return optimizer if ema is None else averaging(optimizer, ema)


def curvature_share(curvature_batch_size: int | None, placed: Placement) -> int | None:
    """The examples for curvature products that the step itself counts: of one device in pmap."""
    if curvature_batch_size is None or placed.mode != "pmap":
        return curvature_batch_size
    check.argument(
        curvature_batch_size % placed.num_devices == 0,
        "curvature_batch_size",
        f"a multiple of the {placed.num_devices} devices that share it",
        curvature_batch_size,
    )
    return curvature_batch_size // placed.num_devices
