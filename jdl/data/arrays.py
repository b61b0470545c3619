"""Batches of arrays that are in memory already."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from jdl.core import check
from jdl.data.batches import Batches
from jdl.data.loading import Loaded
from jdl.data.order import Order
from jdl.data.plan import Plan, Span


def from_arrays(
    features: npt.ArrayLike | Mapping[str, npt.ArrayLike],
    targets: npt.ArrayLike | None = None,
    *,
    batch_size: int,
    epochs: int | None = None,
    shuffle: bool | None = None,
    seed: int = 0,
    drop_remainder: bool | None = None,
    classes: tuple[str, ...] | None = None,
) -> "ArrayBatches":
    """Batches `{"image": features[B, …], "label": targets[B, …]}`, of any shapes and types.

    An Estimator scales uint8 images [n, H, W, C] with C of 1, 3 or 4 to [0, 1]; for gray pixels
    [n, H, W] pass `pixels[..., None]`. All other uint8 arrays stay as they are: give
    flattened pixels as float32, tokens and class numbers as int32.

    A batch is gathered at once, without threads: fast enough for thousands of steps per second. If
    an epoch's last batch is not full it is padded with zeros, and every batch has an entry
    `"mask"`, float32[B], 1 for examples that count.

    Args:
      features: an array with leading axis n, or a dict of several, which keep their names.
      targets: an array with the same leading axis; None for batches of features alone.
      batch_size: examples in every batch, B.
      epochs: how many passes over the data; None for no end.
      shuffle: a new order each epoch; by default only with `epochs=None`.
      seed: for the orders.
      drop_remainder: drop an epoch's last examples that fill no batch; by default only with
        `epochs=None`.
      classes: the names of the classes, kept in the data set.

    >>> data = from_arrays(np.eye(5), np.arange(5), batch_size=2, epochs=1)
    >>> [batch["label"].tolist() for batch in data]
    [[0, 1], [2, 3], [4, 0]]
    >>> [batch["mask"].tolist() for batch in data][-1]
    [1.0, 0.0]
    """
    named = features if isinstance(features, Mapping) else {"image": features}
    arrays = {name: np.asarray(array) for name, array in named.items()}
    if targets is not None:
        arrays["label"] = np.asarray(targets)
    for name, array in arrays.items():
        argument = "targets" if name == "label" and targets is not None else "features"
        check.argument(array.dtype != object, argument, "one array of numbers", type(features))
        check.argument(array.ndim > 0, argument, "an array with a leading axis of rows", array)
    shapes = {name: array.shape for name, array in arrays.items()}
    check.argument(bool(arrays), "features", "at least one array", features)
    n = len(next(iter(arrays.values())))
    check.argument(n > 0, "features", "an array of at least one row", shapes)
    same = all(len(array) == n for array in arrays.values())
    check.argument(same, "targets", f"an array of {n} rows, as `features` has", shapes)
    plan = Plan.checked(n, batch_size, epochs, drop_remainder)
    order = Order(n, shuffle=epochs is None if shuffle is None else shuffle, seed=seed)
    return ArrayBatches(arrays, plan, order, classes)


class ArrayBatches(Batches):
    """The data set that `from_arrays` returns; `arrays` are by name, [n, …] each."""

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        plan: Plan,
        order: Order,
        classes: tuple[str, ...] | None = None,
    ):
        kinds = ";".join(f"{name} {a.dtype.str} {a.shape}" for name, a in arrays.items())
        super().__init__(plan, order, classes=classes, fingerprint=f"arrays: {kinds}")
        self.arrays = arrays

    @property
    def loaded_spec(self) -> dict[str, Any]:
        """What a batch as loaded is made of: name -> jax.ShapeDtypeStruct."""
        return self.plan.spec({n: (a.shape[1:], a.dtype) for n, a in self.arrays.items()})

    def load(self, span: Span) -> Loaded:
        """The batch of these places."""
        span = self.plan.mine(span)
        rows, n = self.plan.rows, span.stop - span.start
        # Copies even without shuffling: a batch must not share memory with the user's array.
        if self.order.shuffle:
            records = self.order.records(*span)
            batch = {name: array.take(records, axis=0) for name, array in self.arrays.items()}
        else:
            batch = {name: a[span.start : span.stop].copy() for name, a in self.arrays.items()}
        if n < rows:
            for name, array in batch.items():
                padding = np.zeros((rows - n, *array.shape[1:]), array.dtype)
                batch[name] = np.concatenate([array, padding])
        if self.plan.padded:
            batch["mask"] = (np.arange(rows) < n).astype(np.float32)
        return Loaded(batch)
