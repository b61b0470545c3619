"""What every test runs under: 2 simulated devices, strict types and ranks, checked shapes.

Most of the tests' time is compilation. So JAX's cache keeps programs between processes and runs,
and in some rooms XLA optimizes little. `JAX_DISABLE_MOST_OPTIMIZATIONS=0` asks for all of it.

Property tests try the same examples in every run; `HYPOTHESIS_PROFILE=default` tries new ones.
"""

import gc
import os
import shutil
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "agg"
os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "jdl", "xla-tests"
    ),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from jaxtyping import install_import_hook

install_import_hook("jdl", "beartype.beartype")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

MOST_BYTES = 2**30  # of compiled programs
# Where XLA optimizes little: many small programs, of which none runs for long.
ROOMS = (
    *("core", "optim", "curvature", "compare", "cli"),
    *("train", "solvers", "models", "recipes", "vision"),
)


def pytest_collection_modifyitems(items):
    """Examples of adapters to packages that are not installed are skipped."""
    for item in items:
        adapter = item.name.removeprefix("jdl.core.adapters.from_")
        if adapter in ("equinox", "haiku", "keras") and find_spec(adapter) is None:
            item.add_marker(pytest.mark.skip(reason=f"{adapter} is not installed"))


def pytest_configure(config):
    """Empties a cache that has grown too large, before any worker runs."""
    programs = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if programs.name != "xla-tests" or hasattr(config, "workerinput") or not programs.is_dir():
        return
    if sum(x.stat().st_size for x in programs.iterdir()) > MOST_BYTES:
        shutil.rmtree(programs, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A quick test in one of `ROOMS` compiles fast, and so does the contract's large matrix."""
    room = item.nodeid.startswith(tuple(f"tests/{room}/" for room in ROOMS))
    full = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "0"
    slow = item.get_closest_marker("slow") and "optim/test_contract.py" not in item.nodeid
    full = full or slow
    jax.config.update("jax_disable_most_optimizations", bool(room and not full))


def pytest_collection_finish():
    """What imports and collection made stays: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_report_header():
    names = ("jax", "numpy", "flax", "optax", "grain", "orbax-checkpoint")
    return "stack: " + ", ".join(f"{name} {version(name)}" for name in names)


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test(monkeypatch):
    """A test that fails while it waits for its processes would leave them to slow down others."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    yield
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
