"""Images a second out of a tar: reading alone, decoding in threads, in worker processes."""

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jdl.cli.bench import Args

_WARM = 2  # batches before the clock starts


def run(args: "Args") -> None:
    """Measures and prints."""
    from jdl.cli import progress
    from jdl.cli.run_config import parse_size
    from jdl.data import from_tar, resolve

    target = args.target or "digits"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    several = sorted({1, 2, cores or 1})
    options: dict[str, Any] = {
        "size": parse_size(args.size, target),
        "grayscale": not args.color,
        "batch_size": args.batch_size,
        "label": None,
        "epochs": None,
        "on_error": "skip",
        "cache_bytes": 0,
    }
    probe = from_tar(resolve(target), **options)
    source = probe.source
    rates: dict[str, float] = {}

    def reading() -> Iterator[int]:
        for i in range(1 << 40):
            epoch, at = divmod(i, max(len(source) // args.batch_size, 1))
            records = probe.order.records(epoch, at * args.batch_size, (at + 1) * args.batch_size)
            yield sum(1 for _ in source.read_many(records))

    def batches(**how: Any) -> Callable[[], Iterator[int]]:
        def make() -> Iterator[int]:
            iterator = iter(from_tar(resolve(target), **options, **how))
            try:
                for batch in iterator:
                    yield int(np.sum(batch["mask"]))
            finally:
                iterator.close()

        return make

    if source.mode == "random":
        rates["reading alone"] = _rate(reading, args.seconds)
    rates["made when asked for"] = _rate(batches(threads=0), args.seconds)
    for n in several:
        rates[f"{n} thread{'s' * (n > 1)}"] = _rate(batches(threads=n), args.seconds)
    if source.mode != "stream":
        for n in (n for n in several if n > 1):
            rates[f"{n} worker processes"] = _rate(batches(workers=n), args.seconds)
    if args.as_json:
        print(json.dumps({"images": len(source), "cores": cores, "images_per_second": rates}))
        return
    shape = "×".join(map(str, probe.element_spec["image"].shape))
    progress.table(
        ["", "images/s"],
        [[how, f"{rate:.0f}"] for how, rate in rates.items()],
        f"{target}: {len(source)} images, batches of {shape}, {cores} cores",
    )
    best = max((how for how in rates if how != "reading alone"), key=lambda how: rates[how])
    print(f"fastest: {best}. Without arguments from_tar uses a thread a core.")


def _rate(make: Callable[[], Iterator[int]], seconds: float) -> float:
    """Images a second, once it runs."""
    numbers = make()
    for _ in range(_WARM):
        next(numbers)
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        images += next(numbers)
    rate = images / (time.perf_counter() - start)
    numbers.close()  # type: ignore[attr-defined]
    return rate
