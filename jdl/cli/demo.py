"""Compare five optimizers on the bundled digits with one CNN.

Indexes the tar, streams it, trains the same CNN with SGD, Adam, L-BFGS, nonlinear conjugate
gradient and Hessian-free for the same number of seconds each, prints the table and writes the
report.

Examples:
  jdl demo
  jdl demo --seconds 5 --workdir runs/quick
"""

from dataclasses import dataclass
from pathlib import Path

from jdl.core import check


@dataclass
class Args:
    """The options of `jdl demo`."""

    workdir: Path = Path("runs/demo")
    """the directory for trials and report; started again, finished trials are not repeated"""
    seconds: float = 20.0
    """training seconds of each optimizer"""


def run(args: Args) -> None:
    """Runs the study on the digits."""
    from jdl.cli import compare, index
    from jdl.compare import digits_cnn, named

    check.argument(args.seconds > 0, "--seconds", "more than 0", args.seconds)
    index.run(index.Args("digits"))
    # Curvature from a quarter of the data and a bounded inner solve; the report says both.
    hf = named("hf", curvature_batch_size=360, max_cg_iterations=20)
    optimizers = ("sgd", "adam", "lbfgs", "cg", hf)
    problems = [(digits_cnn(), ("--problem", "digits-cnn"))]
    compare.study(problems, optimizers, (args.seconds, "seconds"), args.workdir)
