"""The optimizers of a study, with all settings for the report."""

import ast
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import optax

from jdl.compare.identity import as_label, setting
from jdl.core import check
from jdl.optim import arguments, schedules
from jdl.optim.registry import TuningRange
from jdl.optim.transformation import ScalarOrSchedule

BatchSize: TypeAlias = int | Literal["full"]

# Examples of a step, for methods that work with small batches: of first order, and of second, whose
# model of a smaller batch fits that batch alone.
MINI_BATCH, CURVATURE_BATCH = 64, 256
WARMUP = TuningRange("warmup", 0.0, 0.2, "linear")
# Arguments of `named` itself.
_OF_ENTRY = (
    *("label", "batch_size", "curvature_batch_size", "microbatches"),
    *("schedule", "warmup", "decay_to"),
)
TUNED = "-tuned"  # suffix of the name of an entry whose setting was tuned


class Entry(NamedTuple):
    """One optimizer with its settings.

    Attributes:
      name: its label in tables and pictures, and the name of its directories.
      make: returns the optax transformation; called for each trial.
      batch_size: examples of a step, or "full" for all the training data.
      curvature_batch_size: examples for curvature products; None for the whole batch.
      microbatches: slices that a batch is cut into, to bound memory; None to choose it for a full
        batch, and for one slice otherwise.
      options: the settings in `make`, for the report. A resumed study compares them, and `make`
        itself as `jdl.compare.identity` sees it, to decide whether a trial is done.
      search: what to tune, and over which range, or several, the main one first; None for nothing.
      tuned: `tuned(values)` returns the entry with these values, by parameter, instead of its own.
      of: its name in the registry; empty for an optimizer of your own.
      call: how `jdl compare --optimizers` writes it, without the label; empty where it cannot.
      schedule: of the learning rate, to the end of the budget: "constant", "linear", "cosine" or
        "wsd", see `jdl.optim.schedules`; for an optimizer of your own a factor on its updates.
      warmup: the share of the budget over which the rate rises from 0, in [0, 0.5].
      decay_to: where a falling schedule ends, as a share of the rate.

    >>> entry = Entry("sgd", lambda: optax.sgd(0.1), batch_size=32, options={"learning_rate": 0.1})
    >>> entry.settings()
    {'batch_size': 32, 'schedule': 'constant', 'learning_rate': 0.1}
    """

    name: str
    make: Callable[[], optax.GradientTransformation]
    batch_size: BatchSize = "full"
    curvature_batch_size: int | None = None
    microbatches: int | None = None
    options: Mapping[str, Any] = {}
    search: TuningRange | tuple[TuningRange, ...] | None = None
    tuned: Callable[[dict[str, int | float]], "Entry"] | None = None
    of: str = ""
    call: str = ""
    schedule: str = "constant"
    warmup: float = 0.0
    decay_to: float = 0.0

    @property
    def is_scheduled(self) -> bool:
        """Whether its learning rate changes over the budget."""
        return self.schedule != "constant" or self.warmup > 0.0

    @property
    def space(self) -> tuple[TuningRange, ...]:
        """What to tune; empty for nothing."""
        if self.search is None or self.tuned is None:
            return ()
        return (self.search,) if isinstance(self.search, TuningRange) else self.search

    def defaults(self, space: Sequence[TuningRange]) -> dict[str, int | float] | None:
        """Its own values of these numbers; None unless `settings` has them all."""
        own = self.settings()
        found = {x.parameter: own.get(x.parameter) for x in space}
        numbers = {name: x for name, x in found.items() if isinstance(x, int | float)}
        return numbers if len(numbers) == len(found) else None

    def settings(self) -> dict[str, Any]:
        """All settings, as plain values for TOML."""
        own: dict[str, Any] = {"batch_size": self.batch_size}
        if self.curvature_batch_size is not None:
            own["curvature_batch_size"] = self.curvature_batch_size
        if self.microbatches is not None:
            own["microbatches"] = self.microbatches
        own["schedule"] = self.schedule
        if self.is_scheduled:
            own["warmup"] = self.warmup
            own |= {"decay_to": self.decay_to} if self.decay_to else {}
        return own | {name: setting(value) for name, value in self.options.items()}


def named(
    name: str,
    *,
    label: str | None = None,
    batch_size: BatchSize | None = None,
    curvature_batch_size: int | None = None,
    microbatches: int | None = None,
    learning_rate: ScalarOrSchedule | None = None,
    schedule: str = "constant",
    warmup: float = 0.0,
    decay_to: float = 0.0,
    **options: Any,
) -> Entry:
    """The entry of an optimizer by its name on the command line.

    Args:
      name: sgd, momentum, nesterov, adam, adamw, lbfgs, cg, newton, hf …; see `jdl.optim.by_name`
      label: the entry's name, if an optimizer appears with several settings.
      batch_size: examples of a step, at most all of them; None for "full" for methods with a line
        search or curvature products, which are sensitive to sampling noise, 256 for `kfac` and
        `natural_gradient`, and 64 for the others.
      curvature_batch_size: examples for curvature products; None for the whole batch.
      microbatches: as for `Entry`.
      learning_rate: None for the optimizer's default; a function of the step is not tuned.
      schedule: as for `Entry`.
      warmup: likewise; tuned with the other numbers of a first-order method with a schedule.
      decay_to: likewise.
      **options: passed on to the optimizer.

    >>> named("adam", learning_rate=1e-4, schedule="cosine").settings()  # doctest: +ELLIPSIS
    {'batch_size': 64, 'schedule': 'cosine', 'warmup': 0.0, 'b1': 0.9, ..., 'learning_rate': 0.0001}
    """
    from jdl.optim import registry

    name = registry.short_name(name)

    def make() -> optax.GradientTransformation:
        return registry.by_name(name, learning_rate, **options)

    make()  # raises for wrong arguments before anything runs
    schedules.checked(schedule, warmup, decay_to)
    plain_rate = not callable(learning_rate) or (schedule, warmup) == ("constant", 0.0)
    must = "left out where learning_rate is a function of the step"
    check.argument(plain_rate, "schedule, warmup", must, (schedule, warmup))
    known = registry.REGISTRY[name]
    given: dict[str, Any] = {
        "batch_size": batch_size,
        "curvature_batch_size": curvature_batch_size,
        "microbatches": microbatches,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup": warmup,
        "decay_to": decay_to,
        **options,
    }
    if batch_size is None:
        mini = CURVATURE_BATCH if known.second_order else MINI_BATCH
        batch_size = "full" if known.batches == "large" else mini
    rate = known.learning_rate if learning_rate is None else learning_rate
    settings = _defaults(known.make) | {"learning_rate": rate} | options

    def tuned(values: dict[str, int | float]) -> Entry:
        return named(name, label=f"{label or name}{TUNED}", **(given | values))

    entry = Entry(
        label or name,
        make,
        batch_size,
        curvature_batch_size,
        microbatches,
        settings,
        of=name,
        call=_call(name, given),
        schedule=schedule,
        warmup=warmup,
        decay_to=decay_to,
    )
    space = tuple(
        x for x in known.space if not (x.parameter == "learning_rate" and callable(learning_rate))
    )
    if known.search not in space:
        return entry
    if entry.is_scheduled and not known.second_order:
        space += (WARMUP,)
    return entry._replace(search=space, tuned=tuned)


def _call(name: str, given: Mapping[str, Any]) -> str:
    """The call of an optimizer's name with these arguments; empty unless all are literals."""
    unsaid = {"schedule": "constant", "warmup": 0.0, "decay_to": 0.0}
    words = []
    for key, value in given.items():
        try:
            ast.literal_eval(repr(value))
        except (ValueError, SyntaxError):
            return ""
        if value is None or value == unsaid.get(key, ()):
            continue
        words.append(f"{key}={json.dumps(value) if isinstance(value, str) else repr(value)}")
    return f"{name}({', '.join(words)})"


def listed(text: str, *, schedule: str = "constant", warmup: float = 0.0) -> list[Entry]:
    """The entries of names separated by commas, each with settings in parentheses if need be.

    An entry is labelled by its settings, unless they have a `label`.

    Args:
      text: such as "adamw(learning_rate=3e-3, schedule='cosine'), kfac"; values are literals.
      schedule: of entries without one of their own, except schedule-free methods.
      warmup: likewise.

    Raises:
      ArgumentError: the text is something else, or an optimizer or option does not exist, or cannot
        have this value.

    >>> [entry.name for entry in listed("adam, adam(learning_rate=3e-3), kfac")]
    ['adam', 'adam-learning_rate=0.003', 'kfac']
    """
    entries = []
    for name, options in _calls(text):
        words = "".join(f"-{key}={value}" for key, value in options.items())
        own = {key: options[key] for key in options if key not in _OF_ENTRY}
        options = {"label": as_label(name + words), **options}
        options |= arguments.checked(name, own, "--optimizers")
        if not name.startswith("schedule_free"):
            options = {"schedule": schedule, "warmup": warmup, **options}
        entries.append(named(name, **options))
    return entries


def _calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The names and keyword arguments of a list of names and calls."""
    from jdl.optim import registry

    must = "names separated by commas, with settings such as adamw(learning_rate=3e-3) or not"
    found = []
    # A hyphen between letters is part of a name, other than within quotes.
    source = re.sub(
        r"""('[^']*'|"[^"]*")|(?<=[A-Za-z])-(?=[A-Za-z])""", lambda x: x[1] or "_", text
    )
    try:
        for node in ast.parse(f"[{source.strip()}]", mode="eval").body.elts:  # type: ignore[attr-defined]
            call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
            if not isinstance(call.func, ast.Name) or call.args:
                raise ValueError("not a name with keyword arguments")
            options = {str(x.arg): ast.literal_eval(x.value) for x in call.keywords}
            found.append((registry.short_name(call.func.id, "--optimizers"), options))
    except (SyntaxError, ValueError) as error:
        if isinstance(error, check.UserError):
            raise
        raise check.ArgumentError(f"`--optimizers` must be {must}, got {text!r}.") from error
    check.argument(bool(found), "--optimizers", must, text)
    return found


def _defaults(make: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(make).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def as_entry(optimizer: Any) -> Entry:
    """An `Entry`, or the entry of a name with its default settings."""
    if isinstance(optimizer, Entry):
        check_batch_size(optimizer.batch_size)
        check.argument(
            callable(optimizer.make),
            "make",
            "a function that makes the optimizer, such as lambda: optax.sgd(0.1)",
            type(optimizer.make).__name__,
        )
        schedules.checked(optimizer.schedule, optimizer.warmup, optimizer.decay_to)
        return optimizer
    check.argument(
        isinstance(optimizer, str),
        "optimizers",
        "names or jdl.compare.Entry's",
        getattr(optimizer, "__name__", type(optimizer).__name__),
        'For an optimizer of your own use Entry("mine", lambda: optimizer).',
    )
    return named(optimizer)


def check_batch_size(value: Any) -> None:
    """Raises unless `value` is a batch size."""
    if value != "full":
        check.positive_int("batch_size", value)
