"""The pictures that the commands write on their default data, on one sheet, to be looked at.

    make bench-pictures [ARGS="--only gan,vae --out folder"]

Each model is trained as `jdl train MODEL` does, in a folder of its own, and samples are drawn; a
CNN's layers are looked at. Runs that are there already continue: a second call only draws the
sheet again, `OUT/all.png`.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from jdl.cli.main import main as jdl
from jdl.data import digits
from jdl.recipes.pictures import eight_bits, sheet
from jdl.recipes.registry import RECIPES

SIDE = 560


def ran(*words):
    print("jdl", *words, flush=True)
    if jdl([str(word) for word in words]):
        print("  failed", flush=True)


def seen(run):
    """What a CNN sees in a digit, and dreams; its curvature."""
    digit = run / "digit.jpg"
    pixels = next(iter(digits("test", batch_size=64)))["image"][33]
    Image.fromarray(np.repeat(pixels, 3, axis=2)).save(digit)
    layer = ("--layer", "Conv_1")
    for what in ("maps", "grad-cam", "saliency"):
        out = ("--out", run / f"activations-{what}.png")
        ran("activations", run, digit, "--what", what, *(() if what == "saliency" else layer), *out)
    for what, more in (("preferred", ()), ("exciting", ("--data", "digits"))):
        out = ("--out", run / f"activations-{what}.png")
        ran("activations", run, "--what", what, *layer, "--count", 6, *more, *out)
    ran("dream", "--model", run, "--class", "3", "--out", run / "dream-3.png")
    ran("curvature", "--workdir", run, "--images", 256)


def laid(paths, to):
    """The pictures in equal squares, each under the name of its run and file."""
    squares = []
    for path in paths:
        with Image.open(path) as picture:
            whole = ImageOps.pad(picture.convert("RGB"), (SIDE, SIDE), color="white")
        squares.append(np.asarray(whole) / 255)
    names = [f"{path.parent.name}/{path.name}" for path in paths]
    Image.fromarray(eight_bits(sheet(squares, captions=names, title=str(to)))).save(to)
    print(f"sheet: {to}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default=",".join(["cnn", *(n for n, r in RECIPES.items() if r.pictures)])
    )
    parser.add_argument("--steps", type=int, help="by default the recommended number of each model")
    parser.add_argument("--out", type=Path, default=Path("runs/pictures"))
    args = parser.parse_args()
    found = []
    for model in args.only.split(","):
        run = args.out / model
        steps = ("--max-steps", args.steps) if args.steps else ()
        ran("train", model, "--workdir", run, *steps)
        if RECIPES[model].sample is not None:
            ran("sample", "--workdir", run)
        if model == "cnn":
            seen(run)
        found += sorted(run.glob("*.png"))
    laid(found, args.out / "all.png")


if __name__ == "__main__":
    main()
