"""The classic comparison at the scale of one machine: two deep autoencoders, every method in turn.

    make bench-paper DATA=folder [ARGS="--minutes 10 --seeds 1 --only curves"]

CURVES (784-400-200-100-50-25-6, 20,000 generated images) and MNIST (784-1000-500-250-30, 60,000
images), from Martens' sparse initialization; the same minutes of training for each method, without
compilation and evaluation. The measure is that of the papers: squared error summed over pixels,
mean per image. Nesterov's method (with Sutskever's momentum schedule), Adam and SOAP have their
learning rates chosen by the training error of `--trials` shorter runs, whose cost is in the table.
All others have their defaults, and the batch sizes below.

A run that was stopped resumes when it is started again; `paper.md` and `paper.png` in the work
directory contain the results so far, `report.html` all details.
"""

import argparse
import contextlib
import math
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from jdl.compare import Budget, Entry, Study, Tuning, drawing, load_results, named, write_report
from jdl.compare import machine as machines
from jdl.compare import results as res
from jdl.compare.catalogue import autoencoder_curves, autoencoder_mnist
from jdl.core import check
from jdl.core.files import write_atomically
from jdl.optim import hessian_free, kronecker
from jdl.optim.registry import TuningRange

METRIC = "train_squared_error"
TITLES = {"autoencoder-curves": "CURVES", "autoencoder-mnist": "MNIST"}


def nesterov(rate: float) -> optax.GradientTransformation:
    """μₜ = min(1 − 2^(−1 − log₂(⌊t / 250⌋ + 1)), 0.99), after Sutskever et al. 2013, section 3."""

    def init(params):
        return jnp.zeros((), jnp.int32), jnp.float32(rate), jax.tree.map(jnp.zeros_like, params)

    def update(grads, state, params=None, **_):
        count, rate, velocity = state
        mu = jnp.minimum(1 - 0.5 / (jnp.floor(count / 250) + 1), 0.99)

        def along(velocity):
            return jax.tree.map(lambda v, g: mu * v - rate * g, velocity, grads)

        velocity = along(velocity)
        return along(velocity), (count + 1, rate, velocity)

    return optax.GradientTransformationExtraArgs(init, update)


def nesterov_entry(rate: float, name: str = "nesterov") -> Entry:
    return Entry(
        name,
        lambda: nesterov(rate),
        200,
        options={"learning_rate": rate, "momentum": "Sutskever's schedule up to 0.99"},
        search=TuningRange("learning_rate", 1e-3, 1e-1),
        tuned=lambda values: nesterov_entry(values["learning_rate"], "nesterov-tuned"),
    )


def entries(curvature: int) -> list[Entry]:
    """Every method; `curvature` is the papers' curvature batch."""
    hf = named("hf", curvature_batch_size=curvature)
    settings = {
        "damping": 1.0,
        "damping_increase": 1.1,
        "damping_decrease": 0.9,
        "damping_minimum": 1e-4,
        "max_cg_iterations": 2,
        "warm_start": 0.5,
        "num_candidates": 1,
    }
    mini = Entry(
        "hf-mini",
        lambda: hessian_free(preconditioner=kronecker.preconditioner(every=20), **settings),
        1000,
        500,
        options={**settings, "preconditioner": "kronecker, refreshed every 20 steps"},
    )
    adam = named("adam", batch_size=200)._replace(search=TuningRange("learning_rate", 1e-4, 1e-2))
    soap = named("soap", batch_size=1000)._replace(search=TuningRange("learning_rate", 3e-4, 3e-2))
    fixed = [named("kfac", batch_size=1000), mini, named("lbfgs"), named("cg"), hf]
    fixed = [entry._replace(search=None, tuned=None) for entry in fixed]
    return [fixed[0], nesterov_entry(0.01), adam, soap, *fixed[1:]]


def studies(args: argparse.Namespace) -> list[Study]:
    """One study per problem: their curvature batches differ."""
    found = []
    options = {"validation": 0.0}
    if args.examples:
        options["examples"] = args.examples
    for name, curvature in (("curves", 5000), ("mnist", 7500)):
        if name not in args.only.split(","):
            continue
        problem = (
            autoencoder_curves(**options)
            if name == "curves"
            else autoencoder_mnist(args.data, **options)
        )
        keep = [e for e in entries(curvature) if not args.methods or e.name in args.methods]
        found.append(
            Study(
                problem,
                keep,
                seeds=args.seeds,
                budget=Budget(60.0 * args.minutes),
                workdir=args.workdir / name,
                evaluations=args.evaluations,
                tuning=Tuning(args.trials, args.share, METRIC, defaults=False),
                clock=args.clock,
                on_event=tell,
            )
        )
    return found


def tell(event) -> None:
    if event.kind == "row":
        row = event.row
        print(f"    {row['seconds']:7.1f} s  training error {row[METRIC]:.4g}", flush=True)
    else:
        seed = "" if event.seed < 0 else f" seed {event.seed}"
        words = f"{event.kind} {event.problem} {event.optimizer}{seed} {event.words}"
        print(f"{time.strftime('%H:%M:%S')} {words}", flush=True)


# ------------------------------------------------------------------ what came out


def found_in(workdir: Path) -> dict[str, res.Results]:
    """Problem -> its study's results so far."""
    found = {}
    for name in ("curves", "mnist"):
        with contextlib.suppress(check.DataError):
            results = load_results(workdir / name)
            found[results.problems[0]] = results
    return found


def lines(results: res.Results) -> dict[str, list[str]]:
    """Method -> training error, test error, steps, epochs, work, seconds spent on tuning."""
    (problem,) = results.problems
    found = {}
    for line in res.lines(results, problem):
        tuned = results.tuned.get((problem, line.optimizer), ())
        last = [t.within(results.budget) for t in results.of(problem, line.optimizer)]
        train = res.Spread.of(rows[-1].get(METRIC, math.inf) if rows else math.inf for rows in last)
        name = line.optimizer
        if set(line.statuses) == {"missing"}:
            found[f"{name} (not run yet)"] = ["–"] * 7
            continue
        if set(line.statuses) != {"done"}:
            name += f" ({', '.join(sorted(set(line.statuses) - {'done'}))})"
        step, epoch, work = (
            res.Spread.of(rows[-1][column] if rows else 0.0 for rows in last)
            for column in ("step", "epoch", "work")
        )
        found[name] = [
            res.shown(train, "train_squared_error"),
            res.shown(line.test.get("test_squared_error", train), "test_squared_error"),
            res.shown(step, "step"),
            res.shown(epoch, "epoch"),
            f"{work.median:.3g}",
            f"{res.tuning_cost(tuned, 'seconds'):.0f}" if tuned else "–",
            ", ".join(f"{x:.3g}" for x in (res.chosen(tuned) or {}).values()) or "–",
        ]
    return found


def markdown(found: dict[str, res.Results]) -> str:
    """The whole table."""
    text = ["# Deep autoencoders", ""]
    for problem, results in found.items():
        budget, study = results.budget, results.study
        size = study["problems"][0]["examples"]
        head = ["method", "training error", "test error", "steps", "epochs", "work"]
        head += ["s of tuning", "learning rate"]
        text += [f"## {TITLES[problem]}, {size:,} images, {budget} each", ""]
        rows = lines(results)
        order = sorted(rows, key=lambda name: _number(rows[name][0]))
        text += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        text += ["| " + " | ".join([name, *rows[name]]) + " |" for name in order]
        clock = {"cpu": "process CPU time ÷ cores", "wall": "wall time"}[study["clock"]]
        text += ["", f"Clock: {clock}. {machines.sentence(study['machine'])}.", ""]
        if problem == "autoencoder-curves":
            text += [
                "CURVES is regenerated from its description and is not the papers' exact data set: "
                "compare orders of magnitude, not digits.",
                "",
            ]
    text += [
        "Squared error summed over pixels, mean per image. Work: gradients of the whole training "
        "set.",
    ]
    return "\n".join(text) + "\n"


def _number(text: str) -> float:
    try:
        return float(text.split()[0])
    except ValueError:
        return math.inf


def picture(found: dict[str, res.Results]):
    """Training error against seconds, one panel per problem."""
    import numpy as np

    with drawing.figures() as figure_module:
        figure = figure_module.Figure(figsize=(9.6, 4.2))
        for place, (problem, results) in enumerate(found.items(), 1):
            axes = figure.add_subplot(1, len(found), place)
            axes.set_xscale("log")
            axes.set_yscale("log")
            for i, name in enumerate(results.optimizers):
                rows = [t.within(results.budget) for t in results.of(problem, name)]
                rows = [[r for r in each if r["seconds"] > 0 and r.get(METRIC)] for each in rows]
                if not rows or not rows[0]:
                    continue
                x = np.array([[r["seconds"], r[METRIC]] for r in rows[0]])
                axes.plot(
                    *x.T,
                    color=drawing.LINES[i % len(drawing.LINES)],
                    label=name.removesuffix("-tuned"),
                    linestyle=(0, (4.5, 1.6)) if name.endswith("-tuned") else "-",
                )
            size = results.study["problems"][0]["examples"]
            axes.set_title(f"{TITLES[problem]}, {size:,} images")
            axes.set_xlabel("seconds of training")
            axes.set_ylabel("training error, squared, per image")
            drawing.leave_room(axes)
        figure.tight_layout(w_pad=2.0)
        for axes in figure.axes:
            drawing.name_lines(figure, axes)
        return figure


def write(workdir: Path) -> None:
    """The table and the plot of the results so far."""
    found = found_in(workdir)
    if not found:
        return
    write_atomically(workdir / "paper.md", markdown(found))
    drawing.save(picture(found), workdir / "paper.png")
    for name in ("curves", "mnist"):
        if (workdir / name / "study.toml").exists():
            write_report(workdir / name)
    print(f"table: {workdir / 'paper.md'}, picture: {workdir / 'paper.png'}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/mnist", help="folder of MNIST's four files")
    parser.add_argument("--workdir", type=Path, default=Path("runs/paper"))
    parser.add_argument("--minutes", type=float, default=10.0, help="of each method")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--trials", type=int, default=5, help="to choose a learning rate by")
    parser.add_argument("--share", type=float, default=0.2, help="of the minutes, for such a trial")
    parser.add_argument("--evaluations", type=int, default=12)
    parser.add_argument("--examples", type=int, default=0, help="fewer images to train on")
    parser.add_argument("--only", default="curves,mnist")
    parser.add_argument("--methods", default="", help="some of them, with commas")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    args = parser.parse_args()
    args.methods = [name for name in args.methods.split(",") if name]
    print(f"output: {args.workdir.absolute()}", flush=True)
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(args.workdir / "xla"))
    try:
        for study in studies(args):
            study.run()
    except check.UserError as error:
        print(f"bench-paper: error: {error}", file=sys.stderr)
        return 2
    finally:
        write(args.workdir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
