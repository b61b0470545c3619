"""New pictures of a trained run: of a gan, cgan, vae, rbm or dbn.

Pictures are written to a sheet (.png, .jpg), or one to a row (.npz, .jsonl, .csv). The temperature
says how far samples stray from what is most typical: it scales the noise of a gan and a vae, and
divides the energy of an rbm and a dbn.

Examples:
  jdl sample --workdir runs/gan-digits-adam
  jdl sample --workdir runs/cgan-digits-adam --class 7 --count 20 --out sevens.png
  jdl sample --workdir runs/vae-digits-adam --seed 1 --temperature 0.7 --out samples.npz
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jdl.cli import options
from jdl.core import check


@dataclass
class Args:
    """The options of `jdl sample`."""

    workdir: options.Workdir
    out: Path | None = None
    """the file to write, .png, .jpg, .npz, .jsonl or .csv; by default sampled.png in the run
    directory"""
    count: int = 60
    """how many samples"""
    wanted: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """of a cgan or a dbn: the class of all samples; by default all classes in turn"""
    temperature: float | None = None
    """below 1 for more typical samples; by default what suits the model: 0.75 of a dbn, else 1"""
    seed: int = 0
    """random seed"""


def run(args: Args) -> None:
    """Draws the samples and writes them."""
    import numpy as np

    from jdl.recipes.pictures import sheet
    from jdl.recipes.registry import RECIPES, recipe
    from jdl.recipes.run_config import RunConfig
    from jdl.train.tables import open_table
    from jdl.vision import images

    options.check_positive(args, "count")
    if args.temperature is not None:
        check.in_range("--temperature", args.temperature, 0.0, open_low=True)
    config = RunConfig.load(args.workdir)
    chosen = recipe(config.model)
    if chosen.sample is None:
        able = ", ".join(name for name, each in RECIPES.items() if each.sample)
        raise check.UserError(f"{args.workdir} holds a {config.model}; samples are made by {able}.")
    options.check_left_out(args, chosen.of_classes, "its samples have no class", "wanted")
    out = args.workdir / "sampled.png" if args.out is None else args.out
    is_picture = out.suffix.lower() in images.WRITTEN
    ok = is_picture or out.suffix in (".npz", ".jsonl", ".csv")
    check.argument(ok, "--out", "a .png, .jpg, .npz, .jsonl or .csv file", str(out))
    label, names = None, [str(i) for i in range(args.count)]
    if chosen.of_classes:
        label = np.sort(np.arange(args.count) % len(config.classes))
        if args.wanted is not None:
            label[:] = config.classes.index(check.one_of("--class", args.wanted, config.classes))
    of = [] if label is None else [config.classes[i] for i in label]

    wanted = (args.count, args.seed, label, args.temperature)
    found = np.asarray(config.sample(args.workdir, *wanted))
    if is_picture:
        columns = None if args.wanted or not of else -(-args.count // len(config.classes))
        title = f"samples of {args.workdir}"
        images.write(out, sheet(list(found), columns=columns, captions=of or None, title=title))
    else:
        known: dict[str, Any] = {"class": of} if of else {}
        with open_table(out) as table:
            table.write({"name": names, **known, "sample": found})
    print(f"{args.count} samples: {out}")
