"""The data of `--data`: a tar, a glob, a brace range, `digits`, or `trees` for generated trees."""

from typing import TYPE_CHECKING, Any

from jdl.core import check

if TYPE_CHECKING:
    from jdl.data import Batches


def open_images(data: str, *, size: tuple[int, ...], **options: Any) -> "Batches":
    """The data set of a `--data` argument.

    Args:
      data: paths, or the words `digits` and `trees`.
      size: (height, width) of the images.
      **options: further ones of `jdl.data.from_tar`.
    """
    if data == "trees":
        from jdl.recipes.formulas import trees_of

        return trees_of(**options)

    from jdl.data import from_tar, resolve

    return from_tar(resolve(data), size=(size[0], size[1]), **options)


def input_shape(data: str, size: tuple[int, int], channels: int) -> tuple[int, ...]:
    """The shape of one input: (height, width, channels), or that of generated trees."""
    if data == "trees":
        from jdl.recipes.formulas import SHAPE

        return SHAPE
    return (*size, channels)


def default_split(data: str, wanted: str | None, default: str) -> str | None:
    """The split asked for, None for "all"; else `default` if the data have it; else None."""
    if wanted is not None:
        return None if wanted == "all" else wanted
    if data == "trees":
        return default
    from jdl.data import resolve, splits

    return default if default in splits(resolve(data)) else None


def parse_size(size: str | None, data: str) -> tuple[int, int]:
    """(height, width) of `--size`: `64` or `64x48`; by default 8×8 for the digits, else 128×128."""
    if size is None:
        return (8, 8) if data == "digits" else (128, 128)
    parts = size.lower().split("x")
    ok = len(parts) in (1, 2) and all(p.isdigit() and 0 < int(p) <= 65536 for p in parts)
    check.argument(ok, "--size", "HEIGHT or HEIGHTxWIDTH in pixels, such as 128 or 96x128", size)
    return int(parts[0]), int(parts[-1])
