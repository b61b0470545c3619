"""The data of `--data`: a tar, a glob, a brace range, `digits`; trees: `trees`, or a file; a text.

Of a model of texts any file is a text, named "text:FILE" here and in `config.toml`.
"""

from typing import TYPE_CHECKING, Any

from jdl.core import check

if TYPE_CHECKING:
    from jdl.data import Batches
    from jdl.recipes.registry import Recipe

TEXT, CHAIN = "text:", "chain"  # a file's prefix, the generated text


def choice(
    label: str | None = None, include: str | None = None, exclude: str | None = None
) -> dict[str, Any]:
    """The options of `jdl.data.from_tar` that `--label`, `--include` and `--exclude` mean.

    >>> choice("0", exclude="*.depth.png, old/"), choice(exclude="none")
    ({'label': 0, 'exclude': ['*.depth.png', 'old/']}, {'exclude': []})
    """
    from jdl.data.labels import parse
    from jdl.data.targets import is_table

    found: dict[str, Any] = {}
    if label is not None:
        pattern = label.startswith("re:")
        found = {"label": parse(label)} if pattern or not is_table(label) else {"labels": label}
    for name, text in (("include", include), ("exclude", exclude)):
        if text is not None and (name, text) != ("include", "none"):
            found[name] = [] if text == "none" else [*map(str.strip, text.split(","))]
    return found


def kind(data: str) -> str:
    """What `--data` names: "images", "generated trees", "a file of trees", "a text"."""
    if data == CHAIN or data.startswith(TEXT):
        return "a text"
    if data == "trees":
        return "generated trees"
    if data.endswith(".py"):
        return "a file's arrays"
    return "a file of trees" if data.endswith((".txt", ".conllu")) else "images"


def named(data: str, kind_of_model: str) -> str:
    """The data's name: of a model of texts a file is a text.

    >>> named("a.txt", "text"), named("a.txt", "trees")
    ('text:a.txt', 'a.txt')
    """
    is_file = kind_of_model == "text" and kind(data) != "a text"
    return f"{TEXT}{data}" if is_file else data


def told(data: str, number: int, classes: int | None = None) -> str:
    """So many examples of the data, in words.

    >>> told("text:a.txt", 7), told("digits", 7), told("digits", 7, 10)
    ('7 windows of 128 bytes of a.txt', '7 images of digits', '7 examples of digits (10 classes)')
    """
    if kind(data) == "a text":
        from jdl.recipes.texts import WINDOW

        what = "generated letters, a Markov chain" if data == CHAIN else data.removeprefix(TEXT)
        return f"{number} windows of {WINDOW} bytes of {what}"
    if classes is None:
        return f"{number} images of {data}"
    return f"{number} examples of {data} ({classes} classes)"


def check_suits(data: str, chosen: "Recipe") -> tuple[bool, bool]:
    """Raises unless the model can read the data; returns whether they are arrays; no images."""
    is_own, found = chosen.kind == "own", kind(data)
    must = "given, or else the model's file must define data of its own"
    check.argument(bool(data), "--data", must, None)
    ok = found == "images" or (is_own and found == "a file's arrays")
    must = "images, or a Python file that defines data" if is_own else "images for this model"
    if chosen.data == "trees":
        ok, must = "trees" in found, "trees for this model: a .txt or .conllu file"
    if chosen.kind == "text":
        ok = found == "a text"
    check.argument(ok, "--data", must, data)
    return found == "a file's arrays", "trees" in found or found == "a text"


def open_images(data: str, *, size: tuple[int, ...], words: Any = (), **options: Any) -> "Batches":
    """The data set of a `--data` argument: paths, or the words `digits` and `trees`.

    `options` are further ones of `jdl.data.from_tar`; label, include and exclude as the flags.
    """
    if data == "trees":
        from jdl.recipes.formulas import trees_of

        return trees_of(**options)
    if kind(data) == "a text":
        from jdl.recipes import texts

        return texts.batches_of(None if data == CHAIN else data.removeprefix(TEXT), **options)
    if kind(data) == "a file's arrays":
        from jdl.recipes import own

        return own.batches_of(data, **options)
    if kind(data) != "images":
        from jdl.recipes.treebanks import batches_of

        return batches_of(data, size=size, words=words, **options)

    from jdl.data import from_tar, resolve

    which = {name: options.pop(name, None) for name in ("label", "include", "exclude")}
    return from_tar(resolve(data), size=(size[0], size[1]), **choice(**which), **options)


def input_shape(data: str, size: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """The shape of one input: (height, width, channels), or that of generated trees or a text."""
    if data == "trees":
        from jdl.recipes.formulas import SHAPE

        return SHAPE
    if kind(data) == "a text":
        from jdl.recipes.texts import WINDOW

        return (WINDOW,)
    return (*size, channels) if kind(data) == "images" else size


def default_split(data: str, wanted: str | None, default: str, **which: str | None) -> str | None:
    """The split asked for, None for "all"; else `default` if the data have it; else None.

    `which` are the words of `--include` and `--exclude`.
    """
    if kind(data) == "a file of trees":
        check.argument(
            wanted in (None, "all"), "--split", "left out: a file of trees is one", wanted
        )
    if kind(data) == "a file's arrays":
        from jdl.recipes import own

        parts = own.parts(data)
        must = " or ".join(parts) + f", as {data} has"
        check.argument(wanted is None or wanted in parts, "--split", must, wanted)
        return wanted or (default if default in parts else None)
    if wanted is not None:
        return None if wanted == "all" else wanted
    if kind(data) != "images":
        return default if data == "trees" or kind(data) == "a text" else None
    from jdl.data import resolve, splits

    return default if default in splits(resolve(data), **choice(**which)) else None


def label_if_any(data: str, *, agree: bool = True, **which: str | None) -> str | None:
    """None, for classes by folder; "none" if images have none; with `agree`, if splits differ."""
    if kind(data) != "images":
        return None
    from jdl.data import TarSource, resolve, splits

    chosen, archives = choice(**which), resolve(data)
    parts = splits(archives, **chosen) or (None,)
    sources = [TarSource(archives, split=part, **chosen) for part in parts]
    labelled = all(s.unlabelled() is None for s in sources)
    same = not agree or all(s.classes == sources[0].classes for s in sources)
    return None if labelled and same else "none"


def parse_size(size: str | None, data: str) -> tuple[int, int]:
    """(height, width) of `--size`: `64` or `64x48`; by default 8×8 for the digits, else 128×128."""
    if size is None:
        return (8, 8) if data == "digits" else (128, 128)
    parts = size.lower().split("x")
    ok = len(parts) in (1, 2) and all(p.isdigit() and 0 < int(p) <= 65536 for p in parts)
    check.argument(ok, "--size", "HEIGHT or HEIGHTxWIDTH in pixels, such as 128 or 96x128", size)
    return int(parts[0]), int(parts[-1])
