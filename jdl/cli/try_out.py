"""`jdl train --try`: each part of a run once, in a temporary run directory, with its seconds."""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdl.cli import output

if TYPE_CHECKING:
    from jdl.data import Batches
    from jdl.recipes.run_config import RunConfig


def try_out(
    config: "RunConfig",
    data: "Batches",
    held_out: "tuple[str, Batches]",
    how: Mapping[str, Any],
) -> None:
    """Reads a batch, makes a step, validates, saves and predicts, and prints what that gave.

    Args:
      config: the run's settings.
      data: what it trains on.
      held_out: the name of what it is evaluated on, and that.
      how: further options of its Estimator.
    """
    import jax

    from jdl.recipes.warm_start import first_model

    def part(name: str, act: Callable[[], Any], say: Callable[[Any], str]) -> Any:
        began = time.perf_counter()
        done = act()
        output.say(f"{name:9}{time.perf_counter() - began:7.2f} s  {say(done)}")
        return done

    with tempfile.TemporaryDirectory(prefix="jdl-try-") as folder:
        workdir = Path(folder)
        model, told = first_model(config, workdir)
        estimator = config.estimator(workdir, model=model, **how)
        split, images = held_out
        part("read", lambda: next(iter(data)), _shapes)
        part(
            "train",
            lambda: estimator.train(data, steps=1, save=False),
            lambda done: (
                f"1 step, of which {done.compile_seconds:.2f} s compiling; "
                f"{sum(x.size for x in jax.tree.leaves(done.params)):,} parameters; memory: "
                + output.memory(done)
            ),
        )
        for line in told:
            output.say(line)
        batch = [next(iter(images.once()))]
        numbers = lambda found: ", ".join(f"{k} {v:.4g}" for k, v in found.items())  # noqa: E731
        part("validate", lambda: estimator.evaluate(batch), lambda x: f"{split}: {numbers(x)}")
        part("save", estimator.save, lambda _: f"{_bytes(workdir / 'checkpoints') / 1e6:.1f} MB")
        part("predict", lambda: estimator.predict(batch), _shapes)


def _shapes(tree: Any) -> str:
    """Name, type and shape of each array."""
    import jax

    return ", ".join(
        f"{jax.tree_util.keystr(path, simple=True)} {x.dtype}{list(x.shape)}".lstrip()
        for path, x in jax.tree.leaves_with_path(tree)
    )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
