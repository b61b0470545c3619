"""New pictures of a trained run, of a gan, cgan, vae, rbm or dbn; or texts, of a gpt or lstm.

Pictures are written to a sheet (.png, .jpg), or one to a row (.npz, .jsonl, .csv). The temperature
says how far samples stray from what is most typical: it scales the noise of a gan and a vae, and
divides the energy of an rbm and a dbn. Texts continue a prompt, byte by byte; their temperature
divides the logits, and at 0 each byte is the most likely one. A gpt sees the last 128 bytes. Texts
are printed and written to a .txt file, with � for bytes that are not UTF-8.

Examples:
  jdl sample --workdir runs/gan-digits-adam
  jdl sample --workdir runs/cgan-digits-adam --class 7 --count 20 --out sevens.png
  jdl sample --workdir runs/vae-digits-adam --seed 1 --temperature 0.7 --out samples.npz
  jdl sample --workdir runs/gpt-book.txt-adam --prompt 'Once' --length 500 --temperature 0.8
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jdl.cli import options, output
from jdl.core import check

if TYPE_CHECKING:
    from jdl.recipes.run_config import RunConfig


@dataclass
class Args:
    """The options of `jdl sample`."""

    workdir: options.Workdir
    out: Path | None = None
    """the file to write, .png, .jpg, .npz, .jsonl or .csv, of texts .txt; by default sampled.png
    or sampled.txt in the run directory"""
    count: int | None = None
    """how many samples; by default 60 pictures or 3 texts"""
    wanted: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """of a cgan or a dbn: the class of all samples; by default all classes in turn"""
    temperature: float | None = None
    """below 1 for more typical samples; by default what suits the model: 0.75 of a dbn, else 1"""
    prompt: str | None = None
    """what texts begin with; by default a new line"""
    length: int | None = None
    """bytes of a text after its prompt; by default 200"""
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

    options.check_positive(args, "count", "length")
    config = RunConfig.load(args.workdir)
    chosen = recipe(config.model)
    is_text = chosen.kind == "text"
    if args.temperature is not None:
        check.in_range("--temperature", args.temperature, 0.0, open_low=not is_text)
    if chosen.sample is None:
        able = ", ".join(name for name, each in RECIPES.items() if each.sample)
        raise check.UserError(f"{args.workdir} holds a {config.model}; samples are made by {able}.")
    options.check_left_out(args, chosen.of_classes, "its samples have no class", "wanted")
    if is_text:
        return _texts(args, config)
    options.check_left_out(args, False, "its samples are no texts", "prompt", "length")
    number = args.count or 60
    out = args.workdir / "sampled.png" if args.out is None else args.out
    is_picture = out.suffix.lower() in images.WRITTEN
    ok = is_picture or out.suffix in (".npz", ".jsonl", ".csv")
    check.argument(ok, "--out", "a .png, .jpg, .npz, .jsonl or .csv file", str(out))
    label, names = None, [str(i) for i in range(number)]
    if chosen.of_classes:
        label = np.sort(np.arange(number) % len(config.classes))
        if args.wanted is not None:
            label[:] = config.classes.index(check.one_of("--class", args.wanted, config.classes))
    of = [] if label is None else [config.classes[i] for i in label]

    wanted = (number, args.seed, label, args.temperature)
    found = np.asarray(config.sample(args.workdir, *wanted))
    if is_picture:
        columns = None if args.wanted or not of else -(-number // len(config.classes))
        title = f"samples of {args.workdir}"
        images.write(out, sheet(list(found), columns=columns, captions=of or None, title=title))
    else:
        known: dict[str, Any] = {"class": of} if of else {}
        with open_table(out) as table:
            table.write({"name": names, **known, "sample": found})
    print(f"{number} samples: {out}")


def _texts(args: Args, config: "RunConfig") -> None:
    """Prints the texts and writes them; of several, each follows a line of its number."""
    import numpy as np

    from jdl.core.files import write_atomically

    out = args.workdir / "sampled.txt" if args.out is None else args.out
    check.argument(out.suffix == ".txt", "--out", "a .txt file, for texts", str(out))
    check.argument(args.prompt != "", "--prompt", "of at least one byte", args.prompt)
    # Bytes of the command line that are not UTF-8 come as surrogates.
    prompt = (args.prompt or "\n").encode("utf-8", "surrogateescape")
    number, length = args.count or 3, args.length or 200
    wanted = (number, args.seed, None, args.temperature)
    found = np.asarray(config.sample(args.workdir, *wanted, prompt=prompt, length=length))
    begin = b"" if args.prompt is None else prompt
    parts = [(begin + bytes(row)).decode("utf-8", "replace") for row in found.astype(np.uint8)]
    if number > 1:
        parts = [f"--- {i} ---\n{part}" for i, part in enumerate(parts, 1)]
    write_atomically(out, "\n".join(parts) + "\n")
    for part in parts:
        for line in part.expandtabs().replace("\r\n", "\n").split("\n"):
            output.say(line)
    print(f"{number} text{'s' * (number > 1)}: {out}")
