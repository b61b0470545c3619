"""What a part has measured, on disk as soon as it is known."""

import concurrent.futures
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import threading
import time
import traceback


class Results:
    """The rows of one part, rewritten after each."""

    def __init__(self, path, part, seconds):
        self._path, self._began, self._seconds = path, time.monotonic(), seconds
        self._lock = threading.Lock()
        self._found = {"part": part, "complete": False, "machine": machine(), "rows": []}
        self._write()

    def left(self):
        """Seconds until nothing new is to begin."""
        return self._seconds - (time.monotonic() - self._began)

    def add(self, case, **figures):
        """A row: what was measured, and its figures."""
        at = round(time.monotonic() - self._began, 1)
        with self._lock:
            self._found["rows"].append({"case": case, "at": at, "figures": plain(figures)})
            print(f"{at:6.1f} {case}", flush=True)
            self._write()

    @contextlib.contextmanager
    def guard(self, case):
        """An error inside becomes a row of its own, and the part goes on."""
        try:
            yield
        except Exception as error:
            said = f"{type(error).__name__}: {error}"[:600]
            self.add(case, error=said, traceback=traceback.format_exc()[-2000:])

    def together(self, jobs, threads, seconds=None):
        """Runs functions, name -> job, in threads; says which are not done after so long.

        Each adds its own rows, and an error of one is a row too. Gives what the finished ones gave.
        """
        found, pool = {}, concurrent.futures.ThreadPoolExecutor(threads)

        def one(name):
            with self.guard(name):
                found[name] = jobs[name]()

        futures = {pool.submit(one, name): name for name in jobs}
        wait = self.left() if seconds is None else seconds
        _, late = concurrent.futures.wait(futures, timeout=max(wait, 0.0))
        pool.shutdown(wait=False, cancel_futures=True)
        for future in late:
            self.add(futures[future], skipped=f"not done after {wait:.0f} s")
        return found

    def end(self):
        """Says that nothing is missing."""
        self._found["complete"] = True
        self._write()

    def _write(self):
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self._found, indent=1))
        os.replace(part, self._path)


def machine():
    """What it ran on."""
    import jax
    import numpy as np

    devices = jax.devices()
    return {
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "devices": len(devices),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **{n: version(n) for n in ("flax", "optax", "simplejpeg", "torch")},
    }


def version(name):
    """Of an installed package."""
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def plain(value):
    """Figures as JSON holds them, of four digits or so; what is not finite as text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    value = float(value)
    return float(f"{value:.5g}") if abs(value) < float("inf") else str(value)


def timed(work):
    """What it gives, and its seconds."""
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start
