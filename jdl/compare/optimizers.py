"""The optimizers of a study, with all settings for the report."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import optax

from jdl.compare.identity import setting
from jdl.core import check
from jdl.optim.registry import TuningRange
from jdl.optim.transformation import ScalarOrSchedule

BatchSize: TypeAlias = int | Literal["full"]

MINI_BATCH = 64  # examples of a step, for methods that work with small batches
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

    >>> entry = Entry("sgd", lambda: optax.sgd(0.1), batch_size=32, options={"learning_rate": 0.1})
    >>> entry.settings()
    {'batch_size': 32, 'learning_rate': 0.1}
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
        return own | {name: setting(value) for name, value in self.options.items()}


def named(
    name: str,
    *,
    label: str | None = None,
    batch_size: BatchSize | None = None,
    curvature_batch_size: int | None = None,
    microbatches: int | None = None,
    learning_rate: ScalarOrSchedule | None = None,
    **options: Any,
) -> Entry:
    """The entry of an optimizer by its name on the command line.

    Args:
      name: sgd, momentum, nesterov, adam, adamw, lbfgs, cg, newton, hf …; see `jdl.optim.by_name`
      label: the entry's name, if an optimizer appears with several settings.
      batch_size: examples of a step, at most all of them; None for "full" for methods with a line
        search or curvature products, which are sensitive to sampling noise, and 64 for the others.
      curvature_batch_size: examples for curvature products; None for the whole batch.
      microbatches: as for `Entry`.
      learning_rate: None for the optimizer's default; a schedule is not tuned.
      **options: passed on to the optimizer.

    >>> named("adam", learning_rate=1e-4).settings()  # doctest: +ELLIPSIS
    {'batch_size': 64, 'b1': 0.9, 'b2': 0.999, ..., 'learning_rate': 0.0001}
    """
    from jdl.optim import registry

    name = registry.short_name(name)

    def make() -> optax.GradientTransformation:
        return registry.by_name(name, learning_rate, **options)

    make()  # raises for wrong arguments before anything runs
    known = registry.REGISTRY[name]
    if batch_size is None:
        batch_size = "full" if known.batches == "large" else MINI_BATCH
    rate = known.learning_rate if learning_rate is None else learning_rate
    settings = _defaults(known.make) | {"learning_rate": rate} | options

    def tuned(values: dict[str, int | float]) -> Entry:
        given: dict[str, Any] = {
            "batch_size": batch_size,
            "curvature_batch_size": curvature_batch_size,
            "microbatches": microbatches,
            "learning_rate": learning_rate,
        }
        return named(name, label=f"{label or name}{TUNED}", **(given | options | values))

    entry = Entry(
        label or name, make, batch_size, curvature_batch_size, microbatches, settings, of=name
    )
    space = tuple(
        x for x in known.space if not (x.parameter == "learning_rate" and callable(learning_rate))
    )
    if known.search not in space:
        return entry
    return entry._replace(search=space, tuned=tuned)


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
