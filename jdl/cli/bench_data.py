"""Images per second from a tar: reading alone, decoding in threads, in worker processes."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jdl.cli import options, output
from jdl.data import from_tar, resolve
from jdl.recipes.datasets import parse_size

_WARM = 2  # batches before the clock starts


def measure(
    target: str,
    *,
    size: str | None,
    channels: int,
    batch_size: int,
    seconds: float,
    **which: Any,
) -> output.Report:
    """Images per second by reading alone, in threads, and in worker processes."""
    target = target or "digits"
    cores = options.cores()
    several = sorted({1, 2, cores})
    how_read: dict[str, Any] = {
        "size": parse_size(size, target),
        "grayscale": channels == 1,
        "batch_size": batch_size,
        "label": None,
        "epochs": None,
        "on_error": "skip",
        "cache_bytes": 0,
        **which,
    }
    probe = from_tar(resolve(target), **how_read)
    source = probe.source
    rates: dict[str, float] = {}

    def reading() -> Iterator[int]:
        for i in range(1 << 40):
            epoch, at = divmod(i, max(len(source) // batch_size, 1))
            records = probe.order.records(epoch, at * batch_size, (at + 1) * batch_size)
            yield sum(1 for _ in source.read_many(records))

    def batches(**how: Any) -> Callable[[], Iterator[int]]:
        def make() -> Iterator[int]:
            iterator = iter(from_tar(resolve(target), **how_read, **how))
            try:
                for batch in iterator:
                    yield int(np.sum(batch["mask"]))
            finally:
                iterator.close()

        return make

    if source.mode == "random":
        rates["reading alone"] = _rate(reading, seconds)
    rates["decoded on demand"] = _rate(batches(threads=0), seconds)
    for n in several:
        rates[f"{n} thread{'s' * (n > 1)}"] = _rate(batches(threads=n), seconds)
    if source.mode != "stream":
        for n in (n for n in several if n > 1):
            rates[f"{n} worker processes"] = _rate(batches(workers=n), seconds)
    best = max((how for how in rates if how != "reading alone"), key=lambda how: rates[how])
    shape = "×".join(map(str, probe.element_spec["image"].shape))
    return output.Report(
        {"images": len(source), "cores": cores, "images_per_second": rates},
        ["", "images/s"],
        [[how, f"{rate:.0f}"] for how, rate in rates.items()],
        f"{target}: {len(source)} images, batches of {shape}, {cores} cores",
        f"fastest: {best}. By default from_tar uses one thread for each core.",
    )


def _rate(make: Callable[[], Iterator[int]], seconds: float) -> float:
    """Images per second after the first batches."""
    numbers = make()
    for _ in range(_WARM):
        next(numbers)
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        images += next(numbers)
    rate = images / (time.perf_counter() - start)
    numbers.close()  # type: ignore[attr-defined]
    return rate
