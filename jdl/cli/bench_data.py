"""Images per second from a tar: reading alone, decoding in threads, in worker processes."""

import time
from collections.abc import Generator
from typing import Any

import numpy as np

from jdl.cli import output
from jdl.data import from_tar, resolve
from jdl.data.image_batches import ImageBatches
from jdl.data.pipeline import cores
from jdl.recipes.datasets import parse_size

_WARM = 2  # batches before the clock starts
_FEW = 5  # lines about problems


def measure(
    target: str, *, size: str | None, channels: int, batch_size: int, seconds: float, **which: Any
) -> output.Report:
    """Images per second by reading alone, in threads, and in worker processes; what was lost."""
    target = target or "digits"
    several = sorted({1, 2, cores()})
    how_read: dict[str, Any] = {
        "size": parse_size(size, target),
        "grayscale": channels == 1,
        "batch_size": batch_size,
        "label": None,
        "epochs": None,
        "on_error": "skip",
        "max_skipped": 1.0,  # reported below
        "cache_bytes": 0,
        **which,
    }
    source = (probe := from_tar(resolve(target), **how_read)).source
    rates: dict[str, float] = {}
    decoded, skipped = 0, dict[str, str]()

    def batches(**how: Any) -> Generator[int, None, None]:
        nonlocal decoded
        data = from_tar(resolve(target), **how_read, **how)
        iterator = iter(data)
        try:
            for batch in iterator:
                decoded += (images := int(np.sum(batch["mask"])))
                yield images
        finally:
            iterator.close()
            skipped.update(data.skipped_records)

    if source.mode == "random":
        rates["reading alone"] = _rate(_reading(probe, batch_size), seconds)
    rates["decoded on demand"] = _rate(batches(threads=0), seconds)
    for n in several:
        rates[f"{n} thread{'s' * (n > 1)}"] = _rate(batches(threads=n), seconds)
    if source.mode != "stream":
        for n in (n for n in several if n > 1):
            rates[f"{n} worker processes"] = _rate(batches(workers=n), seconds)
    shape = "×".join(map(str, probe.element_spec["image"].shape))
    found = {
        "images": len(source),
        "decoded": decoded,
        "skipped": skipped,
        "damage": [{"archive": path, **each._asdict()} for path, each in source.damage],
        "cores": cores(),
        "images_per_second": rates,
    }
    return _report(f"{target}: {len(source)} images, batches of {shape}, {cores()} cores", found)


def _reading(data: ImageBatches, batch_size: int) -> Generator[int, None, None]:
    """The numbers of images in batches whose bytes are only read."""
    for i in range(1 << 40):
        epoch, at = divmod(i, max(len(data.source) // batch_size, 1))
        records = data.order.records(epoch, at * batch_size, (at + 1) * batch_size)
        yield sum(isinstance(each, bytes) for each in data.source.read_many(records))


def _report(title: str, found: dict[str, Any]) -> output.Report:
    rates, skipped = found["images_per_second"], found["skipped"]
    best = max((how for how in rates if how != "reading alone"), key=lambda how: rates[how])
    told = "damaged: {word} at byte {offset} of {archive}: {detail}"
    lost = [told.format(**each) for each in found["damage"]]
    lost += [f"skipped {where}: {why}" for where, why in skipped.items()]
    few = lost[:_FEW] + [f"and {len(lost) - _FEW} more, which --json lists"] * (len(lost) > _FEW)
    notes = [
        f"fastest: {best}. By default from_tar uses one thread for each core.",
        f"images decoded in these runs: {found['decoded']}, many of them several times",
        *(few or ["no image skipped, no damage"]),
    ]
    rows = [[how, f"{rate:.0f}"] for how, rate in rates.items()]
    return output.Report(found, ["", "images/s"], rows, title, "\n".join(notes))


def _rate(numbers: Generator[int, None, None], seconds: float) -> float:
    """Images per second after the first batches."""
    for _ in range(_WARM):
        next(numbers)
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        images += next(numbers)
    rate = images / (time.perf_counter() - start)
    numbers.close()
    return rate
