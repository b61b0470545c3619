"""Where a program runs: one device, or several that share each batch.

    "jit"    parameters replicated on every device, the compiler inserts the collectives
    "fsdp"   likewise, with large parameters and their optimizer state split over the devices
    "pmap"   each device runs the step on its part of the batch, `Objective` holds the collectives

All three compile one `jax.jit` with the same shardings and give the numbers of one device, within
rounding. "pmap" differs by one `jax.shard_map` around the step, which is what `jax.pmap` is made of
today. It is used with `check_vma=False`: with the check, JAX would sum gradients over the devices
by itself, and `Objective` does so already. Every reduction of a step must therefore be in
`Objective`: a loop whose condition differs between devices would deadlock.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jdl.core import check
from jdl.core.objective import batch_size
from jdl.core.types import Batch, PyTree

MODES = ("jit", "fsdp", "pmap")
AXIS = "data"
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
SPLIT_FROM = 2**14  # elements: splitting smaller arrays saves little memory and costs time

# (path of a leaf of the train state, its shape, devices) -> the axis to split, or None
SplitRule = Callable[[str, tuple[int, ...], int], int | None]


def split_largest_axis(path: str, shape: tuple[int, ...], num_devices: int) -> int | None:
    """The largest axis that the devices divide evenly; None for small arrays.

    >>> split_largest_axis("params/kernel", (512, 1024), 2)
    1
    >>> split_largest_axis("params/bias", (1024,), 2) is None
    True
    """
    del path
    if math.prod(shape) < SPLIT_FROM:
        return None
    divisible = [axis for axis, size in enumerate(shape) if size % num_devices == 0]
    return max(divisible, key=lambda axis: shape[axis], default=None)


class Placement(NamedTuple):
    """Shardings of state and batches.

    Attributes:
      state: that of arrays replicated on every device.
      batch: that of a batch: the leading axis is split over the devices.
      devices: those that share a batch, of all processes.
      mode: "jit", "fsdp" or "pmap".
      rule: which arrays "fsdp" splits, and along which axis.
      inputs: the batch's entries that the model takes.
    """

    state: jax.sharding.Sharding
    batch: jax.sharding.Sharding
    devices: tuple[jax.Device, ...]
    mode: str = "jit"
    rule: SplitRule = split_largest_axis
    inputs: str | tuple[str, ...] = ()

    @property
    def num_devices(self) -> int:
        """How many devices share a batch."""
        return len(self.devices)

    @property
    def num_local(self) -> int:
        """How many of them are this process's."""
        return sum(d.process_index == jax.process_index() for d in self.devices)

    @property
    def is_host(self) -> bool:
        """Whether it is one CPU, to which nothing is transferred."""
        return self.num_devices == 1 and self.devices[0].platform == "cpu"

    @property
    def axis_name(self) -> str | None:
        """The axis that `Objective` reduces over."""
        return AXIS if self.mode == "pmap" else None

    def put_batch(self, batch: Batch) -> dict[str, Any]:
        """This process's batch on the devices, split by examples."""
        self._check_divides(batch)
        if jax.process_count() == 1:
            return jax.device_put(dict(batch), self.batch)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self.batch, np.asarray(x)),
            dict(batch),
        )

    def put_step_batch(self, batch: Batch) -> Batch:
        """The same where the device is not the host, whose programs take host arrays."""
        return batch if self.is_host else self.put_batch(batch)

    def _check_divides(self, batch: Batch) -> None:
        size = batch_size(batch, self.inputs)
        check.argument(
            size % self.num_local == 0,
            "batch_size",
            f"a multiple of the {self.num_local} devices that share it",
            size,
            "Pad a smaller last batch with examples that its mask leaves out, as jdl.data does; or "
            "pass devices=jax.devices()[:1].",
        )

    def put_state(self, state: PyTree) -> PyTree:
        """The state on the devices."""
        return jax.device_put(state, self.shardings(state))

    def shardings(self, state: PyTree) -> PyTree:
        """The sharding of each leaf of a train state, or of its shapes."""
        if self.mode != "fsdp" or self.num_devices == 1:
            return jax.tree.map(lambda _: self.state, state)
        assert isinstance(self.state, NamedSharding)
        mesh = self.state.mesh

        def sharding(path: Any, leaf: Any) -> NamedSharding:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            axis = self.rule(name, leaf.shape, self.num_devices)
            if axis is None:
                return NamedSharding(mesh, PartitionSpec())
            check.argument(
                -leaf.ndim <= axis < leaf.ndim and leaf.shape[axis] % self.num_devices == 0,
                "split_rule",
                f"a function that returns an axis which {self.num_devices} devices divide, or None",
                f"axis {axis} for {name} of shape {leaf.shape}",
            )
            spec: list[str | None] = [None] * leaf.ndim
            spec[axis] = AXIS
            return NamedSharding(mesh, PartitionSpec(*spec))

        return jax.tree_util.tree_map_with_path(sharding, state)

    def lower_step(self, train: Callable[..., Any], state: PyTree, *args: Any) -> Any:
        """The step `(state, *args) -> (state, logs)`, lowered; it reuses the state's memory."""
        if self.axis_name is not None:
            assert isinstance(self.state, NamedSharding)
            train = jax.shard_map(
                train,
                mesh=self.state.mesh,
                in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
                out_specs=PartitionSpec(),
                check_vma=False,
            )
        shardings = self.shardings(state)
        return jax.jit(
            train,
            in_shardings=(shardings, self.batch, self.state)[: 1 + len(args)],
            out_shardings=(shardings, self.state),
            donate_argnums=0,
        ).lower(state, *args)


def placement(
    devices: Sequence[jax.Device] | None = None,
    mode: str = "jit",
    rule: SplitRule | None = None,
) -> Placement:
    """The placement over `devices`; None for all there are.

    >>> placement(jax.devices()[:1]).num_devices
    1
    """
    check.one_of("parallel", mode, MODES)
    given = jax.devices() if devices is None else devices
    devices = list(given) if isinstance(given, Iterable) else []
    must = "a non-empty list of jax devices, such as jax.devices()[:1]"
    check.argument(bool(devices), "devices", must, given)
    rule = split_largest_axis if rule is None else rule
    if len(devices) == 1 and mode != "pmap":
        single = SingleDeviceSharding(devices[0])
        return Placement(single, single, tuple(devices), mode, rule)
    # Auto axes: with make_mesh's default explicit axes, dropout under grad raises a sharding type
    # error.
    mesh = Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))
    state, batch = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (AXIS,)))
    return Placement(state, batch, tuple(devices), mode, rule)


def own_examples(tree: PyTree) -> PyTree:
    """This process's examples of batches or outputs, as NumPy arrays; random keys stay keys."""

    def own(x: Any) -> Any:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            numbers = own(jax.random.key_data(x))
            return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(x))
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        pieces = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])

    return jax.tree.map(own, tree)


def make_deterministic() -> None:
    """Makes XLA use reproducible kernels on GPUs instead of the fastest ones.

    Raises:
      UserError: a device has been used already, after which it is too late.
    """
    from jax._src import xla_bridge  # nothing public says whether a device has been used

    if xla_bridge.backends_are_initialized():
        raise check.UserError(
            "Reproducible kernels must be asked for before JAX is first used. Set "
            f"XLA_FLAGS={DETERMINISTIC} in the environment instead."
        )
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
