"""Where a program runs: one device, or a mesh with the batch split over it.

Under `jit` with a mesh the program needs no collectives of its own: the compiler inserts them where
a reduction crosses the batch. Parameters and optimizer state are replicated.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jdl.core import check
from jdl.core.types import Batch, PyTree


class Placement(NamedTuple):
    """Where state and batches lie."""

    state: jax.sharding.Sharding  # whole on every device
    batch: jax.sharding.Sharding  # leading axis split over the devices
    num_devices: int

    @property
    def is_host(self) -> bool:
        """Whether it is one CPU, to which nothing need travel."""
        return self.num_devices == 1 and _platform(self.batch) == "cpu"

    def put_batch(self, batch: Batch) -> dict[str, Any]:
        """The batch on the devices, split by examples."""
        if self.is_host:  # the compiled step reads host memory as it is
            return dict(batch)
        sizes = {name: np.shape(x)[0] for name, x in batch.items() if np.ndim(x)}
        check.argument(
            all(n % self.num_devices == 0 for n in sizes.values()),
            "batch_size",
            f"a multiple of the {self.num_devices} devices that share it",
            sizes,
            "Or pass devices=jax.devices()[:1].",
        )
        return jax.device_put(dict(batch), self.batch)

    def put_state(self, state: PyTree) -> PyTree:
        """The state on every device."""
        return jax.device_put(state, self.state)


def placement(devices: Sequence[jax.Device] | None = None) -> Placement:
    """The placement over `devices`; None for all local ones.

    >>> placement(jax.devices()[:1]).num_devices
    1
    """
    devices = jax.local_devices() if devices is None else list(devices)
    check.argument(bool(devices), "devices", "a non-empty list of jax devices", devices)
    if len(devices) == 1:
        single = SingleDeviceSharding(devices[0])
        return Placement(single, single, 1)
    # Auto axes: with make_mesh's default explicit axes, dropout under grad raises a sharding type
    # error.
    mesh = Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    return Placement(NamedSharding(mesh, PartitionSpec()), split, len(devices))


def _platform(sharding: jax.sharding.Sharding) -> str:
    devices: set[Any] = sharding.device_set
    return str(next(iter(devices)).platform)
