"""Which places of an epoch's order each batch holds."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jdl.core import check

_ENDLESS = 2**62


class Span(NamedTuple):
    """The places [start, stop) of one epoch's order that a batch holds."""

    epoch: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Which places each batch holds."""

    num_records: int  # records in an epoch
    batch_size: int  # examples in every batch
    epochs: int | None  # how many epochs; None for no end
    drop_remainder: bool  # whether an epoch's last records that fill no batch are dropped
    # the part of every batch that this process makes. Processes share batches, not records, so all
    # have the same number of batches and the same position
    part: int = 0
    parts: int = 1  # the number of parts of a batch

    @classmethod
    def checked(
        cls, num_records: int, batch_size: int, epochs: int | None, drop_remainder: bool | None
    ) -> "Plan":
        """A plan of a user's arguments.

        By default (`drop_remainder=None`) only an endless data set drops its remainder, and only if
        an epoch fills at least one batch.
        """
        check.positive_int("batch_size", batch_size)
        if epochs is not None:
            check.positive_int("epochs", epochs)
        if drop_remainder is None:
            drop_remainder = epochs is None and num_records >= batch_size
        ok = not drop_remainder or batch_size <= num_records
        must = f"at most the {num_records} records there are"
        hint = "Or pass drop_remainder=False: the batch is then padded and masked."
        check.argument(ok, "batch_size", must, batch_size, hint)
        return cls(num_records, batch_size, epochs, drop_remainder)

    def sharded(self, part: int, parts: int) -> "Plan":
        """The plan of one part of the same batches."""
        check.positive_int("parts", parts)
        ok = isinstance(part, int) and not isinstance(part, bool) and 0 <= part < parts
        check.argument(ok, "part", f"an integer of 0 to {parts - 1}", part)
        ok = self.batch_size % parts == 0
        check.argument(ok, "batch_size", f"a multiple of the {parts} processes", self.batch_size)
        return replace(self, part=part, parts=parts)

    @property
    def rows(self) -> int:
        """Examples of every batch that this process makes."""
        return self.batch_size // self.parts

    def mine(self, span: "Span") -> "Span":
        """This process's part of a batch; empty if padding is all of it."""
        start = min(span.start + self.part * self.rows, span.stop)
        return Span(span.epoch, start, min(start + self.rows, span.stop))

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return self._left(0)

    @property
    def padded(self) -> bool:
        """Whether some batch is padded."""
        return not self.drop_remainder and self.num_records % self.batch_size > 0

    def spec(
        self, entries: dict[str, tuple[tuple[int, ...], Any]], *, masked: bool = False
    ) -> dict[str, Any]:
        """The jax.ShapeDtypeStructs of entries name -> (example's shape, dtype), and the mask."""
        import jax

        if masked or self.padded:
            entries = entries | {"mask": ((), np.float32)}
        return {
            name: jax.ShapeDtypeStruct((self.rows, *shape), np.dtype(dtype))
            for name, (shape, dtype) in entries.items()
        }

    def span(self, epoch: int, record: int, number: int) -> Span:
        """The batch `number` batches after the one that begins at a position."""
        # The position may come from a run with another batch size: its epoch is finished first,
        # with batches of the present size.
        left = self._left(record)
        if number >= left:
            further, number = divmod(number - left, self.steps_per_epoch)
            epoch, record = epoch + 1 + further, 0
        start = record + number * self.batch_size
        return Span(epoch, start, min(start + self.batch_size, self.num_records))

    def count(self, epoch: int, record: int) -> int:
        """The number of batches from a position on."""
        if self.epochs is None:
            return _ENDLESS
        if epoch >= self.epochs:
            return 0
        return self._left(record) + (self.epochs - epoch - 1) * self.steps_per_epoch

    def _left(self, record: int) -> int:
        """The number of batches left in an epoch from a record on."""
        left = max(self.num_records - record, 0)
        return left // self.batch_size if self.drop_remainder else -(-left // self.batch_size)
