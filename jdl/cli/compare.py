"""First against second order: one model, several optimizers, equal seconds, one report.

Examples:
  jdl compare --seconds 10
  jdl compare --data photos.tar --model cnn --optimizers sgd,adam,lbfgs,hf --seeds 3 --seconds 30
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Args:
    """What to compare, on what, how long."""

    data: str = "digits"
    """a tar, a glob, a brace range, or the bundled digits"""
    model: str = "cnn"
    """mlp, cnn or rnn"""
    optimizers: str = "sgd,adam,lbfgs,cg,hf"
    """names, with commas: sgd momentum nesterov adam adamw lbfgs cg newton hf"""
    seeds: int = 1
    """how many seeds: 3 or more for a result to publish"""
    seconds: float = 30.0
    """training seconds of each trial, without compilation and evaluation"""
    epochs: float | None = None
    """a budget of passes over the data, in place of seconds"""
    work: float | None = None
    """a budget of work, in gradients of the whole training set, in place of seconds"""
    size: str | None = None
    """HEIGHT or HEIGHTxWIDTH to scale images to; by default 128, and 8 for the digits"""
    color: bool = False
    """keep three channels; by default images are made gray"""
    workdir: Path = Path("runs/compare")
    """the directory for trials and report; started again, what is done is skipped"""


def run(args: Args) -> None:
    """Runs the trials, prints the table, writes the report."""
    from jdl.cli.recipes import RECIPES, recipe
    from jdl.cli.run_config import parse_size
    from jdl.compare import digits_cnn, tar_problem
    from jdl.core import check
    from jdl.data import resolve
    from jdl.optim import registry

    classifiers = [name for name, r in RECIPES.items() if r.kind == "classifier"]
    chosen = recipe(check.one_of("--model", args.model, classifiers))
    check.argument(args.seeds >= 1, "--seeds", "at least 1", args.seeds)
    check.argument(args.seconds > 0, "--seconds", "more than 0", args.seconds)
    names = [name for name in args.optimizers.replace(" ", "").split(",") if name]
    check.argument(bool(names), "--optimizers", "names with commas between them", args.optimizers)
    for name in names:
        check.one_of("--optimizers", name, registry.REGISTRY)
    if args.data == "digits" and args.model == "cnn" and args.size is None:
        problem = digits_cnn()
    else:
        problem = tar_problem(
            resolve(args.data),
            chosen.build,
            size=parse_size(args.size, args.data),
            grayscale=not args.color,
        )
    others = {"epochs": args.epochs, "work": args.work}
    given = {kind: amount for kind, amount in others.items() if amount is not None}
    check.argument(len(given) <= 1, "--epochs, --work", "given one at a time", given)
    kind, amount = next(iter(given.items()), ("seconds", args.seconds))
    study(problem, names, args.seeds, (amount, kind), args.workdir)


def study(
    problem: Any, optimizers: list[Any], seeds: int, budget: tuple[float, str], workdir: Path
) -> Any:
    """Runs a study with progress on stderr, and shows what came out."""
    import sys

    from jdl.cli import progress
    from jdl.cli.run_config import use_compilation_cache
    from jdl.compare import Budget, Study, table, write_report
    from jdl.compare.results import headline

    use_compilation_cache()

    def on_event(event: Any) -> None:
        where = f"[{event.number}/{event.total}] {event.optimizer} seed {event.seed}"
        if event.kind == "row":
            row = event.row
            accuracy = row.get("test_accuracy")
            shown = "" if accuracy is None else f"  test accuracy {accuracy:.3f}"
            loss = row.get("train_loss")
            loss_shown = "" if loss is None else f"  train loss {loss:.3g}"
            print(f"{where}  {row['seconds']:6.1f} s{loss_shown}{shown}", file=sys.stderr)
        elif event.kind in ("begin", "end", "skip"):
            print(f"{where}: {event.kind} {event.words or ''}".rstrip(), file=sys.stderr)

    results = Study(
        [problem],
        optimizers,
        seeds=seeds,
        budget=Budget(*budget),
        workdir=workdir,
        on_event=on_event,
    ).run()
    header, rows = table(results, problem.name)
    progress.table(list(header), [list(row) for row in rows], problem.name)
    print(headline(results, problem.name))
    print(f"report:  {write_report(workdir)}")
    print(f"metrics: {workdir / 'metrics.jsonl'}")
    return results
