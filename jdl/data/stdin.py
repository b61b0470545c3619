"""Batches out of a tar that comes through a pipe: once, in its order, in constant memory."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jdl.core import check
from jdl.data import images
from jdl.data import labels as lb
from jdl.data.augment import Augmentation
from jdl.data.holdout import Holdout
from jdl.data.image_batches import ImageBatches
from jdl.data.loading import InOrder, Loaded
from jdl.data.order import Order
from jdl.data.plan import Plan
from jdl.data.tar.archive import STDIN
from jdl.data.tar.open import open_archive
from jdl.data.tar.stream import Member, MemberStream

logger = logging.getLogger("jdl.data")

_MANY = 1 << 40  # how many records there are is known when they have come


def standard_input(
    *,
    size: tuple[int, int],
    batch_size: int,
    label: lb.Label = "folder",
    classes: Sequence[str] | None = None,
    split: str | Holdout | None = None,
    grayscale: bool = False,
    on_error: str = "raise",
    max_skipped: float = 0.1,
    dtype: str = "uint8",
    threads: int = 2,
) -> "PipedBatches":
    """Batches as `from_tar` makes them, plain or compressed, of the tar on standard input.

    They come in the archive's order, once, and always with a mask, for how many there are is known
    only at the end. A position can be gone to if the same bytes are piped in again.

    Args:
      size: (height, width) to resize to.
      batch_size: rows in every batch.
      label: as in `from_tar`; what stands beside an image cannot be read here.
      classes: the class table; needed where there are labels.
      split: only members whose path begins with this folder, or one side of a split by hash, as in
        `from_tar`; where nothing is of it, that is an error at the end.
      grayscale: one channel rather than three.
      on_error: at an image that cannot be decoded or damage to the archive, `"raise"` or `"skip"`.
      max_skipped: the share of the records so far that may be skipped.
      dtype: `"uint8"`, or `"float32"` for values in [0, 1].
      threads: how many decode.
    """
    check.one_of("on_error", on_error, ("raise", "skip"))
    check.one_of("dtype", dtype, ("uint8", "float32"))
    check.argument(
        label is None or classes is not None,
        "classes",
        "the class names in their order: they cannot be collected before the images come",
        classes,
    )
    check.argument(lb.sidecar(label) is None, "label", "something read from the name", label)
    source = _Piped(label, split, tuple(classes or ()))
    return PipedBatches(
        source,
        Plan.checked(_MANY, batch_size, 1, False),
        Order(_MANY, shuffle=False, seed=0),
        size=size,
        resize=True,
        labelled=label is not None,
        skip=on_error == "skip",
        max_skipped=max_skipped,
        dtype=dtype,
        mean_std=None,
        augmentation=Augmentation(),
        grayscale=grayscale,
        exact=False,
        max_pixels=images.MAX_PIXELS,
        threads=max(threads, 1),
        workers=0,
        cache_bytes=0,
    )


class _Piped:
    """What `ImageBatches` asks of a source, of records that have just come."""

    archives = (STDIN,)
    indexes = ()

    def __init__(self, label: lb.Label, split: str | Holdout | None, classes: tuple[str, ...]):
        self.classes, self._label, self._split = classes, label, split
        holdout = Holdout.parse(split) if isinstance(split, str) else split
        self._holds = None if holdout is None else holdout.checked().chooser()
        self._names: dict[int, str] = {}
        self._of = None
        if label is not None:
            by_name = callable(label) or not isinstance(label, str | int)
            self._of = lb.by_name(label) if by_name else lb.by_folder(label)  # type: ignore[arg-type]
            self._by_name = by_name

    def __len__(self) -> int:
        return _MANY

    def chosen(self, members: Iterable[Member]) -> Iterator[Member]:
        """The images of the split.

        Raises:
          DataError: at the end, if there was none.
        """
        folders: set[str] = set()
        images = found = 0
        for member in members:
            if not member.image:
                continue
            images += 1
            first = (lb.folder_parts(member.name.rpartition("/")[0]) or [""])[0]
            if len(folders) < 10:
                folders.add(first)
            if self._split is None or (
                first == self._split if self._holds is None else self._holds(member.name)
            ):
                found += 1
                yield member
        if not images:
            raise check.DataError("Standard input holds no images.")
        if not found:
            there = ", ".join(repr(name) for name in sorted(folders) if name) or "no folder"
            raise check.DataError(
                f"Standard input has no images of the split {self._split!r} among its {images}. "
                f"Paths begin with: {there}."
            )

    def note(self, record: int, name: str) -> None:
        """Keeps a name for as long as its batch is being made."""
        self._names[record] = name

    def forget(self, records: np.ndarray) -> None:
        """Forgets these names."""
        for record in records.tolist():
            self._names.pop(record, None)

    def where(self, record: int) -> str:
        """Archive and member, for messages."""
        return f"standard input, member {self._names[record]!r}"

    def labels(self, records: np.ndarray) -> np.ndarray:
        """The labels of these records, int32 [n]."""
        found = np.empty(len(records), np.int32)
        assert self._of is not None
        for row, record in enumerate(records.tolist()):
            name = self._names[record]
            label = self._of(name if self._by_name else name.rpartition("/")[0])
            if label is None:
                raise check.DataError(f"{self.where(record)} has no label.")
            lb.check_classes(self.classes, [label], self.where(record))
            found[row] = self.classes.index(label)
        return found


class PipedBatches(ImageBatches):
    """The data set that `standard_input` gives."""

    _masked = True

    @property
    def num_records(self) -> int:
        """Not known before the end: an error."""
        raise check.DataError(
            "How many images standard input holds is not known before its end. To train for "
            "epochs, write it to a file first: jdl pack - OUT-%05d.tar"
        )

    def once(self) -> "PipedBatches":
        """Itself: it comes once."""
        return self

    def repeat(self) -> "PipedBatches":
        """An error: what is piped in comes once."""
        raise check.DataError("Standard input comes once; it cannot be repeated.")

    def count_until(self, record: int) -> int:
        """Those that have come."""
        return record

    def start_loading(self, epoch: int, record: int) -> Any:
        """The batches from a position on; what is before is read over."""
        del epoch
        stream = MemberStream(open_archive(STDIN))
        coming = itertools.islice(enumerate(self.source.chosen(stream)), record, None)
        rows = self.plan.batch_size

        def read(number: int) -> Any:
            del number
            some: Any
            try:
                some = list(itertools.islice(coming, rows))
            except Exception as error:
                some = error
            lost = [damage for damage in stream.damage if damage.lost]
            if lost and not self._skip:
                return check.DataError(
                    f"Standard input is damaged: {lost[0].word} at byte {lost[0].offset}: "
                    f'{lost[0].detail}. To use what can be read, pass on_error="skip".'
                )
            return some

        def decode(number: int, some: Any) -> Loaded | None:
            del number
            if isinstance(some, Exception):
                return Loaded(None, error=some)
            if not some:
                return None
            records = np.array([i for i, _ in some])
            for i, member in some:
                self.source.note(i, member.name)
            try:
                return self._load(0, records, [member.data for _, member in some])
            except Exception as error:
                return Loaded(None, error=error)
            finally:
                self.source.forget(records)

        return _UntilNone(InOrder(read, decode, _MANY, self.num_threads, self.ahead))


class _UntilNone:
    def __init__(self, batches: InOrder):
        self._batches = batches

    def __iter__(self) -> Iterator[Loaded]:
        return self

    def __next__(self) -> Loaded:
        found = next(self._batches)
        if found is None:
            raise StopIteration
        return found

    def close(self) -> None:
        self._batches.close()
