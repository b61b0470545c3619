"""The optimizer of a run of `jdl train`, with its options and its schedule."""

from typing import Any

import optax

from jdl.core import check
from jdl.optim import arguments, registry, schedules
from jdl.recipes.registry import recipe


def settings(args: Any, optimizer: str, max_steps: int) -> dict[str, Any]:
    """The fields of a `RunConfig` for a command's `--option` and `--schedule`.

    Args:
      args: the command's arguments.
      optimizer: its name in the registry.
      max_steps: the steps of the run in total.

    Raises:
      ArgumentError: for an option that the optimizer does not have, or a schedule that cannot be.
    """
    options = arguments.parsed(optimizer, args.option)
    for name in ("weight_decay", "clip"):
        check.argument(
            getattr(args, name) is None or name not in options,
            f"--option {name}",
            f"left out where `--{name.replace('_', '-')}` is given",
            options.get(name),
        )
    constant = args.schedule == "constant"
    must = "left out without a --schedule that falls"
    check.argument(not (constant and args.decay_to), "--decay-to", must, args.decay_to)
    must = "left out: a schedule-free method has no schedule"
    hint = "Its warm-up is `--option warmup_steps=N`."
    free = optimizer.startswith("schedule_free")
    for name, given in (("--schedule", not constant), ("--warmup", bool(args.warmup))):
        check.argument(not (free and given), name, must, getattr(args, name[2:]), hint)
    most = max_steps // 2
    must = f"a number of steps from 0 to {most}, half of those of the run"
    check.argument(0 <= args.warmup <= most, "--warmup", must, args.warmup)
    steps = None if constant else max_steps
    return {"option": arguments.written(options), "schedule_steps": steps}


def transformation(config: Any) -> optax.GradientTransformation:
    """The optimizer of a `RunConfig`.

    Args:
      config: the run's.
    """
    chosen = recipe(config.model)
    options = dict(chosen.options) if config.optimizer == chosen.optimizer else {}
    options |= arguments.parsed(config.optimizer, config.option)
    given = {"weight_decay": config.weight_decay, "clip": config.clip}
    options |= {name: value for name, value in given.items() if value is not None}
    made = registry.by_name(config.optimizer, config.learning_rate, **options)
    if config.schedule == "constant" and not config.warmup:
        return made
    return schedules.over_steps(
        made,
        config.schedule,
        config.schedule_steps or 2 * config.warmup,  # of a constant one only the warm-up counts
        warmup=config.warmup,
        decay_to=config.decay_to,
        by_rate=config.optimizer not in schedules.BY_STEP,
    )
