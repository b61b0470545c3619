"""Compare optimizers of first and second order on the same problems with equal budgets.

Examples:
  jdl compare --seconds 10
  jdl compare --data photos.tar --model cnn --optimizers sgd,adam,lbfgs,hf --seeds 3 --seconds 30
  jdl compare --problem digits-cnn,logistic,mine.py --trials 8 --seeds 3 --schedule cosine
  jdl compare --optimizers "adamw(learning_rate=3e-3, schedule='cosine', warmup=0.05), kfac"
  jdl compare --optimizers "sgd(weight_decay=5e-4, clip=1), kfac(damping=1)" --config study.toml
  jdl compare --problem autoencoder-mnist --data FOLDER --optimizers kfac,adam --seconds 600

Problems:
  digits-cnn, logistic                     the bundled digits
  mnist-mlp, mnist-cnn, autoencoder-mnist  MNIST, named by --data
  autoencoder-faces                        a tar of faces named by --data
  autoencoder-curves, adding-rnn           generated data
  gpt-bytes, lstm-bytes                    the text --data, or sums, a chain
  vit-images, resnet-images                the tar --data, or the digits
  pinn-poisson, pinn-burgers               an equation
  curve-fit, quadratic, rosenbrock,
  noisy-quadratic                          no data
  mine.py                                  your own file: model, loss, data

Optimizers:
  sgd momentum nesterov adam adamw nadam nadamw radam rmsprop adagrad adafactor
  lamb lars lion adopt ademamix prodigy schedule_free_sgd schedule_free_adamw
  sophia, all optax's; muon soap shampoo lbfgs bfgs ssbroyden cg newton hf
  gauss_newton lm natural_gradient kfac
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jdl.cli import options, output
from jdl.core import check

if TYPE_CHECKING:
    from jdl.compare import Entry, Event, Problem, Results

    Sources = Sequence[tuple[Problem, Sequence[str]]]  # problems, and the options that make them


@dataclass
class Args:
    """The options of `jdl compare`."""

    data: str = "digits"
    """a tar, a glob, a brace range, the bundled digits, or the data of a named problem"""
    problem: str = ""
    """names of problems above, separated by commas; by default --model on --data"""
    model: str = "cnn"
    """mlp, cnn, rnn, vit, resnet or dbn"""
    optimizers: str = "sgd,adam,lbfgs,cg,hf"
    """names of optimizers above, separated by commas, with settings as in an example"""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """of the learning rates, to the end of the budget; wsd is constant but for the last fifth"""
    warmup: float = 0.0
    """share of the budget over which the learning rates rise from 0, such as 0.05"""
    seeds: int = 1
    """number of seeds; at least 6 for a published result"""
    seconds: float = 30.0
    """training seconds of each trial, without compilation and evaluation"""
    epochs: float | None = None
    """a budget in passes over the data, instead of seconds"""
    work: float | None = None
    """a budget in gradients of the whole training set, instead of seconds"""
    steps: int | None = None
    """a budget in steps, instead of seconds"""
    ends: str = "1"
    """shares of the budget, such as 1/4,1/2,1: each trial is also run with these alone"""
    trials: int = 0
    """tuning trials of each optimizer; 0 for the defaults alone"""
    tune: Literal["all", "main"] = "all"
    """the numbers tuned: all of each optimizer's, or its learning rate or damping alone"""
    tuning_share: float = 1.0
    """budget of each tuning trial, as a share of a trial's"""
    tuned_only: bool = False
    """with --trials: report the tuned optimizers alone, not those with default settings too"""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: the process's CPU time divided by the cores, for a machine that others use too"""
    share: str = "1/1"
    """K/N: run only the K-th of N shares, for several processes or hosts with one --workdir"""
    against: Path | None = None
    """another study's results.csv; with --report its results are laid beside this one's"""
    report: bool = False
    """write the report of the trials in --workdir, and run nothing"""
    size: options.Size = None
    color: options.Color = False
    label: options.Label = None
    include: options.Include = None
    exclude: options.Exclude = None
    workdir: Path = Path("runs/compare")
    """the directory for trials and report; started again, finished trials are skipped"""
    config: Path | None = None
    """read options from a .toml or .yaml file; flags given here win"""


def run(args: Args) -> None:
    """Runs the trials, prints the tables, writes the report."""
    from jdl.compare import Tuning, load_results, optimizers

    if args.report:
        _show(load_results(args.workdir), args.workdir, args.against)
        return
    check.argument(args.against is None, "--against", "given with --report", str(args.against))
    options.check_positive(args, "seeds")
    check.argument(args.seconds > 0, "--seconds", "more than 0", args.seconds)
    check.argument(args.trials >= 0, "--trials", "0 or more", args.trials)
    entries = optimizers.listed(args.optimizers, schedule=args.schedule, warmup=args.warmup)
    others = {"epochs": args.epochs, "work": args.work, "steps": args.steps}
    given = {kind: amount for kind, amount in others.items() if amount is not None}
    check.argument(len(given) <= 1, "--epochs, --work, --steps", "given one at a time", given)
    kind, amount = next(iter(given.items()), ("seconds", args.seconds))
    share = _share(args.share)
    check.argument(not args.tuned_only or args.trials > 0, "--trials", "given with --tuned-only", 0)
    tuning = Tuning(args.trials, args.tuning_share, defaults=not args.tuned_only, numbers=args.tune)
    why = "--problem has data of its own"
    options.check_left_out(args, not args.problem, why, "label", "include", "exclude")
    sources, failures = _named_problems(args) if args.problem else (_problem(args), [])
    study(
        sources,
        entries,
        (amount, kind),
        args.workdir,
        seeds=args.seeds,
        tuning=tuning if args.trials else None,
        clock=args.clock,
        share=share,
        ends=_ends(args.ends),
    )
    if failures:
        raise check.SourceError("Some problems could not be made: " + " ".join(failures))


def _listed(option: str, text: str) -> list[str]:
    """The names between commas; of a file that exists, commas are part of its name."""
    parts, names = text.split(","), []
    while parts:
        joined = {n: ",".join(parts[:n]).strip() for n in range(len(parts), 0, -1)}
        count = next((n for n, name in joined.items() if Path(name).is_file()), 1)
        names.append(joined[count])
        del parts[:count]
    names = [name for name in names if name]
    check.argument(bool(names), option, "names separated by commas", text)
    return names


def _ends(text: str) -> tuple[float, ...]:
    must = "shares of the budget above 0 and at most 1, such as 1/4,1/2,1"
    try:
        found = [float(Fraction(part)) for part in text.replace(" ", "").split(",")]
    except (ValueError, ZeroDivisionError):
        found = []
    check.argument(bool(found) and all(0 < x <= 1 for x in found), "--ends", must, text)
    return tuple(found)


def _share(text: str) -> tuple[int, int]:
    parts = text.split("/")
    ok = len(parts) == 2 and all(part.isdecimal() for part in parts)
    ok = ok and 1 <= int(parts[0]) <= int(parts[1])
    check.argument(ok, "--share", "K/N with 1 ≤ K ≤ N, such as 2/8", text)
    return int(parts[0]), int(parts[1])


def _words(args: Args, *names: str) -> list[str]:
    """The options of these names as they were given, without those at their defaults."""
    found = []
    for name in names:
        if (value := getattr(args, name)) != getattr(Args, name):
            found += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return found


def _named_problems(args: Args) -> "tuple[Sources, list[str]]":
    """The problems that can be made, and the errors of the others."""
    from jdl.compare import CATALOGUE, by_name

    names = _listed("--problem", args.problem)
    for name in names:
        if not name.endswith(".py"):
            check.one_of("--problem", name, CATALOGUE)
    reads = [x for x in names if (named := CATALOGUE.get(x)) and (named.needs or named.takes)]
    unread = args.data != "digits" and not reads
    check.argument(not unread, "--data", f"left out: {', '.join(names)} has its own", args.data)
    made, failures = [], []
    for name in names:
        try:
            problem = by_name(name, None if args.data == "digits" else args.data)
            given = _words(args, "data") if name in reads else []
            made.append((problem, ["--problem", name, *given]))
        except check.UserError as error:
            failures.append(str(error))
            if len(names) > 1:
                print(f"jdl compare: {name}: {error}", file=sys.stderr)
    if not made:
        raise check.SourceError("No problem could be made: " + " ".join(failures))
    return made, failures


def _problem(args: Args) -> "Sources":
    """The problem of `--model` and `--data`."""
    from jdl.compare import digits_cnn, tar_problem
    from jdl.data import resolve
    from jdl.recipes.datasets import choice, parse_size
    from jdl.recipes.registry import RECIPES, recipe

    classifiers = [name for name, r in RECIPES.items() if r.kind == "classifier"]
    chosen = recipe(check.one_of("--model", args.model, classifiers))
    check.argument(args.label != "none", "--label", "given: a classifier needs classes", "none")
    which = choice(args.label, args.include, args.exclude)
    if args.data == "digits" and args.model == "cnn" and args.size is None and not which:
        return [(digits_cnn(), ["--problem", "digits-cnn"])]
    size = parse_size(args.size, args.data)
    made = tar_problem(
        resolve(args.data), chosen.build, size=size, grayscale=not args.color, **which
    )
    names = ("data", "model", "size", "color", "label", "include", "exclude")
    return [(made, _words(args, *names))]


def study(
    problems: "Sources",
    optimizers: "Sequence[str | Entry]",
    budget: tuple[int | float, str],
    workdir: Path,
    *,
    share: tuple[int, int] = (1, 1),
    **options: Any,
) -> None:
    """Runs a study with progress on stderr, and prints the results.

    Args:
      problems: each with the options that make it.
      optimizers: as for `Study`, like `workdir` and the further options.
      budget: amount and kind.
      workdir: the study's directory.
      share: as for `Study.run`.
      **options: of `Study`.
    """
    from jdl.compare import Budget, Study

    results = Study(
        [problem for problem, _ in problems],
        optimizers,
        budget=Budget(*budget),
        workdir=workdir,
        sources={problem.name: words for problem, words in problems},
        on_event=_print_event,
        **options,
    ).run(share)
    _show(results, workdir)


def _print_event(event: "Event") -> None:
    where = f"[{event.number}/{event.total}] {event.problem}: {event.optimizer}"
    where += "" if event.share == 1.0 else f", {event.share:g} of the budget,"
    if event.kind == "row" and event.row is not None:
        numbers = [f"seed {event.seed}", f"{event.row['seconds']:6.1f} s"]
        for name, digits in (("train_loss", ".3g"), ("test_accuracy", ".3f")):
            if (value := event.row.get(name)) is not None:
                numbers.append(f" {name.replace('_', ' ')} {value:{digits}}")
        print(where, " ".join(numbers), file=sys.stderr)
    elif event.kind == "tune":
        print(f"{where}: tried {event.words}", file=sys.stderr)
    elif event.kind in ("begin", "end", "skip"):
        words = f"seed {event.seed}: {event.kind} {event.words or ''}"
        print(f"{where} {words}".rstrip(), file=sys.stderr)


def _show(results: "Results", workdir: Path, against: Path | None = None) -> None:
    """Prints the tables, and writes the report."""
    from jdl.compare import table, write_report
    from jdl.compare.results import beside, headline
    from jdl.compare.tables import tuning_table

    results = results if against is None else beside(results, against)
    for name in results.problems:
        header, rows = table(results, name)
        output.table(header, rows, name)
        if (tuned := tuning_table(results, name)) is not None:
            output.table(tuned[0], tuned[1], f"{name}: tuning")
        print(headline(results, name))
    print(f"report:  {write_report(workdir, results)}")
    print(f"metrics: {workdir / 'metrics.jsonl'}")
    failed = [trial for trial in results.trials if trial.status == "failed"]
    if failed and all(trial.status in ("failed", "missing") for trial in results.trials):
        first = failed[0]
        where = f"{first.optimizer} on {first.problem}, seed {first.seed}"
        raise check.UserError(f"Every trial failed; the first, {where}: {first.words}")
