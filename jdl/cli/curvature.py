"""The curvature of the loss at a trained run's parameters, averaged over batches.

Top eigenvalues with their spread between batches, spectral density, trace, gradient noise scale and
sharpness. Writes curvature.png and curvature.json into the run directory, or into --out. With
--along, the largest eigenvalue at each checkpoint, of the Hessian and of that which Adam, RMSprop
or K-FAC see, into curvature-along.png and .json; `jdl train --keep-every` keeps more checkpoints.

Examples:
  jdl curvature --workdir runs/cnn-digits-adam
  jdl curvature --workdir runs/cnn-digits-adam --along
  jdl curvature --workdir runs/photos --data held-out.tar --images 4096 --matrix gauss_newton
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jdl.cli import options, output
from jdl.core import check

if TYPE_CHECKING:
    import numpy as np

    from jdl.curvature import Density, Landscape
    from jdl.data import Batches
    from jdl.train.estimator import Estimator

SINGLE_BATCHES = 4  # batches whose own top eigenvalue is found


@dataclass
class Args:
    """The options of `jdl curvature`."""

    workdir: options.Workdir
    data: options.RunData = None
    split: options.TrainSplit = None
    label: options.Label = None
    include: options.Include = None
    exclude: options.Exclude = None
    matrix: Literal["hessian", "gauss_newton", "empirical_fisher"] = "hessian"
    """the matrix whose spectrum is computed"""
    images: int = 1024
    """number of images, drawn at random, to average over; 0 for all"""
    batch_size: int = 128
    """images in a batch, also of the batches whose spread is shown"""
    top: int = 10
    """number of eigenvalues"""
    steps: int = 40
    """Lanczos steps for the density"""
    probes: int = 2
    """random start vectors for the density"""
    max_products: int = 200
    """limit of matrix-vector products for the eigenvalues, each one pass over the images"""
    rho: float = 0.05
    """radius of the ball in which sharpness seeks the highest loss"""
    along: bool = False
    """follow the largest eigenvalue of the Hessian along the run's checkpoints"""
    seed: int = 0
    """random seed for the images drawn and the start vectors"""
    out: Path | None = None
    """folder for curvature.png and curvature.json; by default the run directory"""


def run(args: Args) -> None:
    """Prints the numbers, writes them and the picture."""
    from jdl.recipes.registry import recipe

    started = time.perf_counter()
    options.check_positive(args, "batch_size", "top", "steps", "probes", "max_products")
    check.argument(args.images >= 0, "--images", "at least 0", args.images)
    check.in_range("--rho", args.rho, 0.0, open_low=True)
    opened = options.open_run(args, "train", seed=args.seed, epochs=1, shuffle=True)
    if recipe(opened.config.model).kind in ("gan", "cgan", "trees"):
        held = f"{args.workdir} holds a {opened.config.model}"
        raise check.UserError(f"jdl curvature needs one loss over images; {held}.")
    estimator = opened.config.estimator(args.workdir)
    next(iter(estimator.predict_batches(opened.images)))  # restores the checkpoint
    about = {"workdir": str(args.workdir), "step": estimator.step}
    about |= {"data": opened.data, "split": opened.split}
    if args.along:
        ok = args.matrix == "hessian"
        check.argument(
            ok, "--matrix", "left out with --along, which follows the Hessian", args.matrix
        )
        found = about | _follow(args, estimator, opened.images)
        _write(args, "curvature-along", found, _draw_along)
        return
    found, by_batch = _measure(args, estimator, opened.images)
    found = about | found | {"seconds": time.perf_counter() - started}
    _print(found)
    _write(args, "curvature", found, lambda path, found: _draw(path, found, by_batch))


def _landscape(args: Args, estimator: "Estimator", images: "Batches", params: Any) -> "Landscape":
    from jdl.curvature import Landscape

    most = math.ceil(args.images / args.batch_size) if args.images else None
    return Landscape(estimator.objective, images, params, max_batches=most)


def _follow(args: Args, estimator: "Estimator", images: "Batches") -> dict[str, Any]:
    """The largest eigenvalue at each checkpoint, a list by name."""
    from jdl.curvature import SharpnessTracker

    track = SharpnessTracker(tolerance=0.02, max_products=args.max_products)
    rows = []
    for step in estimator.checkpoints(images):
        land = _landscape(args, estimator, images, estimator.params)
        values = track(land, opt_state=estimator.state.opt_state)
        rows.append({"step": step, "loss": land.value()} | values)
    names = list(rows[0])
    output.table(names, [[f"{row[name]:.4g}" for name in names] for row in rows], "hessian")
    return {name: [row[name] for row in rows] for name in names}


def _measure(
    args: Args, estimator: "Estimator", images: "Batches"
) -> tuple[dict[str, Any], "np.ndarray"]:
    """All numbers, and the top eigenvectors' Rayleigh quotients of each batch."""
    from jdl import curvature

    land = _landscape(args, estimator, images, estimator.evaluation_params)
    batches, examples = land.examples()
    say, seed = _Stages(), args.seed
    op = curvature.operator(land, kind=args.matrix)
    loss, slope = land.value(), float((land.gradient() ** 2).sum() ** 0.5)
    say(f"{op.size:,} parameters, {examples:,} images in {batches} batches, loss {loss:.4g}")
    count = min(args.top, op.size)
    top = curvature.top_eigenpairs(op, count, max_products=args.max_products, seed=seed)
    say(f"top eigenvalues: {top.products} products, {top.memory / 2**20:.0f} MB of vectors")
    by_batch = land.rayleigh_by_batch(args.matrix, top.vectors)
    single = _top_of_single_batches(land, args.matrix, seed)
    say("eigenvalues of batches")
    density = curvature.spectral_density(op, steps=args.steps, probes=args.probes, seed=seed)
    say(f"density: {density.products} products, {density.memory / 2**20:.0f} MB of vectors")
    trace = curvature.trace(op, products=12, seed=seed)
    noise = curvature.noise_scale(land) if batches >= 4 else None
    sharp = curvature.sharpness(land, rho=args.rho, direction=top.vectors[0])
    say("trace, noise scale, sharpness")
    spread = by_batch.std(axis=0, ddof=1).tolist() if batches > 1 else [None] * len(top.values)
    grid, heights = _curve(density)
    return {
        "matrix": args.matrix,
        "parameters": op.size,
        "images": examples,
        "batches": batches,
        "batch_size": args.batch_size,
        "loss": loss,
        "gradient_norm": slope,
        "eigenvalues": top.values.tolist(),
        "eigenvalue_residuals": top.residuals.tolist(),
        "eigenvalues_converged": top.converged,
        "eigenvalue_products": top.products,
        "eigenvalue_spread_over_batches": spread,
        "top_eigenvalue_of_single_batches": single,
        "trace": trace.value,
        "trace_error": trace.error,
        "density": {"eigenvalue": grid.tolist(), "density": heights.tolist()},
        "noise_scale": None if noise is None else noise.value,
        "noise_scale_low": None if noise is None else noise.low,
        "noise_scale_high": None if noise is None else noise.high,
        "sharpness": sharp.rise,
        "sharpness_first_step": sharp.first_step,
        "rho": args.rho,
        "memory_bytes": max(top.memory, density.memory),
    }, by_batch


def _print(found: dict[str, Any]) -> None:
    columns = ("eigenvalues", "eigenvalue_spread_over_batches", "eigenvalue_residuals")
    rows = [
        [str(i), f"{value:.4g}", "" if spread is None else f"{spread:.2g}", f"{residual:.1g}"]
        for i, (value, spread, residual) in enumerate(
            zip(*(found[column] for column in columns), strict=True), 1
        )
    ]
    output.table(["", "eigenvalue", "± over batches", "residual"], rows, found["matrix"])
    if not found["eigenvalues_converged"]:
        print("some eigenvalues have not converged; increase --max-products")
    single = ", ".join(f"{x:.4g}" for x in found["top_eigenvalue_of_single_batches"])
    print(f"top eigenvalue of single batches: {single}")
    print(f"trace {found['trace']:.4g} ± {found['trace_error']:.2g}")
    if found["noise_scale"] is None:
        print("noise scale: needs at least 4 batches; see --images, --batch-size")
    else:
        low, high = found["noise_scale_low"], found["noise_scale_high"]
        print(f"noise scale {found['noise_scale']:.4g} images ({low:.4g} to {high:.4g})")
    print(f"sharpness: the loss rises by {found['sharpness']:.4g} within {found['rho']:g}")


def _write(
    args: Args, name: str, found: dict[str, Any], draw: Callable[[Path, dict[str, Any]], None]
) -> None:
    from jdl.core.files import write_atomically
    from jdl.train.writers import READ_ONLY

    folder = args.out or args.workdir
    try:
        write_atomically(folder / f"{name}.json", json.dumps(_finite(found), indent=1) + "\n")
        draw(folder / f"{name}.png", found)
    except OSError as error:
        if args.out is not None or error.errno not in READ_ONLY:
            raise
        why = f"{folder} is read-only ({error.strerror}), nothing is written; give --out FOLDER."
        print(f"jdl curvature: {why}", file=sys.stderr)
        return
    print(f"wrote {folder / name}.png and {name}.json")


class _Stages:
    """Prints each finished stage with the seconds it took on stderr."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def __call__(self, text: str) -> None:
        now = time.perf_counter()
        print(f"{text} ({now - self._last:.1f} s)", file=sys.stderr)
        self._last = now


def _top_of_single_batches(land: "Landscape", kind: str, seed: int) -> list[float]:
    """The top eigenvalue of the matrix of each of a few batches alone."""
    from jdl import curvature

    found = []
    for objective in itertools.islice(land.objectives(), SINGLE_BATCHES):
        op = curvature.operator(objective, land.params, kind=kind)
        top = curvature.top_eigenpairs(op, 1, tolerance=0.01, max_products=60, seed=seed)
        found.append(float(top.values[0]))
    return found


def _curve(density: "Density") -> tuple["np.ndarray", "np.ndarray"]:
    """The smoothed density on a grid."""
    import numpy as np

    low, high = float(density.nodes.min()), float(density.nodes.max())
    width = max(0.01 * (high - low), 1e-12)
    grid = np.linspace(low - 4 * width, high + 4 * width, 400)
    return grid, density.smooth(grid, width)


def _finite(value: Any) -> Any:
    """The same with None for infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(path: Path, found: dict[str, Any], by_batch: "np.ndarray") -> None:
    """The density on the left; on the right the top eigenvalues, averaged and of batches."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    from jdl.compare.drawing import INK, LINES, MUTED, STYLE
    from jdl.core.files import atomic_file

    blue, orange = LINES[0], LINES[1]
    names = {
        "hessian": "Hessian",
        "gauss_newton": "Gauss-Newton",
        "empirical_fisher": "empirical Fisher",
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.7), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
        grid, heights = (np.asarray(found["density"][k]) for k in ("eigenvalue", "density"))
        least = 0.3 / found["parameters"] / (grid[-1] - grid[0])
        left.fill_between(grid, np.maximum(heights, least), least, color=blue, alpha=0.25, lw=0)
        left.plot(grid, np.maximum(heights, least), color=blue)
        left.set_yscale("log")
        left.set_ylim(bottom=least)
        ticks, below = found["eigenvalues"], left.get_xaxis_transform()
        left.plot(ticks, [0.02] * len(ticks), "|", color=orange, ms=9, transform=below)
        left.set_title(f"Density of the {names[found['matrix']]}'s eigenvalues")
        left.set_xlabel("eigenvalue  (ticks: the largest)")
        left.set_ylabel("share of eigenvalues per unit")

        index = np.arange(1, len(found["eigenvalues"]) + 1)
        for row in by_batch:
            right.plot(index, row, "o", color=MUTED, ms=3, alpha=0.45, mew=0)
        right.plot(index, found["eigenvalues"], "o", color=blue, ms=6, mew=0)
        alone = found["top_eigenvalue_of_single_batches"]
        right.plot([1.0] * len(alone), alone, "_", color=orange, ms=14, mew=1.6)
        right.set_ylim(bottom=min(0.0, float(np.min(by_batch))))
        right.set_title("The largest, averaged and batch by batch")
        right.set_xlabel("rank")
        right.set_xticks(index if len(index) <= 15 else index[::5])
        top = 0.97
        for text, colour in (
            (f"● average of {found['images']:,} images", blue),
            (f"● same directions, {found['batch_size']} images each", MUTED),
            ("— largest of a single batch by itself", orange),
        ):
            place = {"ha": "right", "va": "top", "transform": right.transAxes}
            right.text(0.98, top, text, color=colour, **place)
            top -= 0.075
        figure.suptitle(
            f"{found['workdir']} at step {found['step']}: {found['parameters']:,} parameters, "
            f"loss {found['loss']:.3g}, trace {found['trace']:.3g}",
            color=INK,
            fontsize=9.0,
        )
        with atomic_file(path) as file:
            figure.savefig(file, format="png", dpi=150)


def _draw_along(path: Path, found: dict[str, Any]) -> None:
    """Loss and eigenvalues against steps."""
    import matplotlib
    from matplotlib.figure import Figure

    from jdl.compare.drawing import LINES, STYLE
    from jdl.core.files import atomic_file

    names = [name for name in ("loss", "sharpness", "preconditioned_sharpness") if name in found]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.2 * len(names), 2.8), layout="constrained")
        for axes, name, colour in zip(figure.subplots(1, len(names)), names, LINES, strict=False):
            axes.plot(found["step"], found[name], "o-", color=colour, ms=4)
            axes.set_title(name.replace("_", " ").capitalize())
            axes.set_xlabel("step")
        with atomic_file(path) as file:
            figure.savefig(file, format="png", dpi=150)
