"""Batches of a tar on standard input: read once, in its order, in constant memory."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdl.core import check
from jdl.data import labels as lb
from jdl.data.batches import Batches
from jdl.data.choice import Patterns, Some, told
from jdl.data.decoding import Decoder
from jdl.data.holdout import Holdout, inside, no_such_split, parse_split, split_folder
from jdl.data.image_batches import Assembler
from jdl.data.loading import InOrder, Loaded
from jdl.data.order import Order
from jdl.data.pipeline import refuse_damage
from jdl.data.plan import Plan
from jdl.data.tar.archive import STDIN
from jdl.data.tar.open import open_archive
from jdl.data.tar.stream import Member, MemberStream

logger = logging.getLogger("jdl.data")

_MAX_FOLDERS = 1000  # remembered for messages
_MANY = 1 << 40  # in place of the number of records, which is known only at the end


def standard_input(
    *,
    size: tuple[int, int],
    batch_size: int,
    label: lb.Label = "folder",
    classes: Sequence[str] | None = None,
    split: str | Holdout | None = None,
    include: Some = None,
    exclude: Some = None,
    grayscale: bool = False,
    on_error: str = "raise",
    max_skipped: float = 0.1,
    dtype: str = "uint8",
    threads: int = 2,
) -> "PipedBatches":
    """Batches as `from_tar` makes them of the tar on standard input, plain or compressed.

    They come in the archive's order, once. Every batch has a mask, since the number of records is
    known only at the end. `set_state` works if the same bytes are piped in again.

    Args:
      size: (height, width) to resize to.
      batch_size: examples in every batch.
      label: as in `from_tar`, but not from a member beside the image.
      classes: the class table; required with labels.
      split: as in `from_tar`, but a folder's path from the root on; no record of it is an error
        at the end.
      include: as in `from_tar`.
      exclude: as in `from_tar`.
      grayscale: one channel rather than three.
      on_error: at an image that cannot be decoded or damage to the archive, `"raise"` or `"skip"`.
      max_skipped: the share of the records so far that may be skipped; one always may unless it
        is 0.
      dtype: `"uint8"`, or `"float32"` for values in [0, 1].
      threads: how many decode.
    """
    check.one_of("on_error", on_error, ("raise", "skip"))
    check.in_range("max_skipped", max_skipped, 0.0, 1.0)
    check.argument(lb.sidecar(label) is None, "label", "something read from the name", label)
    ok = label is None or classes is not None
    must = "the class names in their order: they cannot be collected before the images come"
    check.argument(ok, "classes", must, classes)
    if label is not None:
        lb.reader(label)  # refuses invalid labels before anything is read
    table = None if label is None else lb.table_of(classes or (), (), "Standard input")
    chosen = _Chosen(label, parse_split(split), table, Patterns.checked(include, exclude))
    decoder = Decoder(size, grayscale, dtype)
    return PipedBatches(chosen, batch_size, decoder, on_error == "skip", max_skipped, threads)


class _Chosen(NamedTuple):
    """Which members are records, and of which classes."""

    label: lb.Label
    split: str | Holdout | None
    classes: tuple[str, ...] | None
    patterns: Patterns

    def images(self, members: Iterable[Member]) -> Iterator[Member]:
        """The images of the split; a `DataError` at the end, if there was none."""
        split, within = self.split, split_folder(self.split)
        in_split = split.chooser() if isinstance(split, Holdout) else None
        class_of = lb.reader(self.label) if callable(self.label) else None
        folders: dict[str, None] = {}
        left_out: Counter[str] = Counter()
        images = found = 0
        for member in (member for member in members if member.image):
            images += 1
            folder = member.name.rpartition("/")[0]
            pattern = self.patterns.refuses(member.name)
            if pattern is None:
                if len(folders) < _MAX_FOLDERS:
                    folders[folder] = None
                if in_split and not in_split(member.name):
                    continue
                if within is not None and not inside(folder, within):
                    continue
                if class_of is None or class_of(member.name) is not None:
                    found += 1
                    yield member
                    continue
            left_out[pattern or "label"] += 1
        if left_out:
            logger.warning("some images are left out of standard input: %s", told(left_out))
        if images == left_out.total():
            why = f": all are left out, {told(left_out)}" if images else ""
            raise check.DataError(f"Standard input holds no images{why}.")
        if split is not None and not found:
            raise no_such_split("Standard input", split, images, folders)


class _Batch:
    """The records of one batch: their names and labels."""

    def __init__(self, chosen: _Chosen, first: int, members: list[Member]):
        self._chosen, self._first, self._members = chosen, first, members
        self.numbers = np.arange(first, first + len(members))

    def where(self, i: int) -> str:
        """The member of record `i`, for messages."""
        return f"standard input, member {self._members[i - self._first].name!r}"

    def labels(self, records: np.ndarray) -> np.ndarray:
        """The labels of these records, int32 [n]."""
        class_of, classes = lb.reader(self._chosen.label), self._chosen.classes or ()
        found = np.empty(len(records), np.int32)
        for row, record in enumerate(records.tolist()):
            label = class_of(self._members[record - self._first].name)
            if label is None:
                raise check.DataError(f"{self.where(record)} has no label.")
            lb.table_of(classes, [label], self.where(record))
            found[row] = classes.index(label)
        return found

    def read(self, rows: Sequence[int]) -> Iterator[bytes]:
        """The bytes of the records in these rows."""
        return (self._members[row].data for row in rows)


class PipedBatches(Batches):
    """The data set that `standard_input` returns."""

    def __init__(
        self,
        chosen: _Chosen,
        batch_size: int,
        decoder: Decoder,
        skip: bool,
        max_skipped: float,
        threads: int,
    ):
        super().__init__(
            Plan.checked(_MANY, batch_size, 1, False),
            Order(_MANY, shuffle=False, seed=0),
            classes=chosen.classes,
            fingerprint=STDIN,
            max_skipped=max_skipped,
        )
        label = None if chosen.label is None else ((), np.int32)
        self._chosen = chosen
        self._assembler = Assembler(decoder, label=label, skip=skip, masked=True)
        self.num_threads = max(threads, 1)
        self.ahead = self._assembler.ahead(batch_size, self.num_threads)

    @property
    def loaded_spec(self) -> dict[str, Any]:
        """What a batch as loaded is made of: name -> jax.ShapeDtypeStruct."""
        return self._assembler.spec(self.plan)

    @property
    def num_records(self) -> int:
        """Not known before the end: an error."""
        raise check.DataError(
            "How many images standard input holds is not known before its end. To train for "
            "epochs, write it to a file first: jdl pack - OUT-%05d.tar"
        )

    def once(self) -> "PipedBatches":
        """Itself: standard input is a single pass already."""
        return self

    def repeat(self) -> "PipedBatches":
        """An error: standard input cannot be read twice."""
        raise check.DataError("Standard input comes once; it cannot be repeated.")

    def shard(self, part: int, parts: int) -> "PipedBatches":
        """Itself, for one process; an error for several, which cannot share a pipe."""
        if parts != 1:
            raise check.DataError(
                f"Standard input cannot be shared by {parts} processes. Write it to a file first: "
                "jdl pack - OUT-%05d.tar"
            )
        return self

    def count_until(self, record: int) -> int:
        """The records so far."""
        return record

    def start_loading(self, epoch: int, record: int) -> Any:
        """The batches from a position on; records before it are read but not decoded."""
        stream = MemberStream(open_archive(STDIN))
        coming = itertools.islice(self._chosen.images(stream), record, None)
        rows = self.plan.batch_size

        def read(number: int) -> _Batch | None:
            try:
                members = list(itertools.islice(coming, rows))
            finally:  # damage explains other errors
                if not self._assembler.skip:
                    refuse_damage(("Standard input", each) for each in stream.damage)
            return _Batch(self._chosen, record + number * rows, members) if members else None

        def decode(batch: _Batch) -> Loaded:
            return self._assembler.make(self.plan, 0, batch.numbers, batch, batch.read)

        return InOrder(read, decode, _MANY, self.num_threads, self.ahead)
