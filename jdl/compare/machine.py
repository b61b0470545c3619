"""The machine, the versions and the flags that a study's timings depend on."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from jdl.data.pipeline import cores

PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy")


@functools.cache
def describe() -> dict[str, Any]:
    """The machine as plain values for TOML; timings compare only where they are equal.

    >>> sorted(describe()["versions"])
    ['flax', 'grain', 'jax', 'jaxlib', 'jdl', 'numpy', 'optax', 'python']
    """
    import jax

    from jdl import __version__

    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    devices = jax.devices()
    return {
        "platform": platform.platform(terse=True),
        "processor": _processor(),
        "cores": cores(),
        "memory_gib": round((memory() or 0) / 2**30, 1),
        "backend": jax.default_backend(),
        "devices": f"{len(devices)} × {devices[0].device_kind}",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "matmul_precision": str(jax.config.values["jax_default_matmul_precision"] or "default"),
        "versions": {"python": platform.python_version(), "jdl": __version__, **versions},
    }


@functools.cache
def commit() -> str:
    """The commit of the running code, with "-dirty" if it was changed since; empty if unknown."""
    here = str(Path(__file__).parent)

    def git(*command: str) -> str:
        line = ["git", "-C", here, *command]
        run = subprocess.run(line, check=True, capture_output=True, text=True, timeout=10)
        return run.stdout.strip()

    try:
        # Fails where the package is installed inside a repository that does not track it.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return ""


def sentence(machine: dict[str, Any]) -> str:
    """The machine in one line.

    >>> sentence({"processor": "Z80", "cores": 1, "memory_gib": 0.1, "backend": "cpu",
    ...           "devices": "1 × cpu", "platform": "CP/M"})
    'Z80, 1 core, 0.1 GiB, CP/M; JAX on cpu (1 × cpu)'
    """
    cores = f"{machine['cores']} core" + ("" if machine["cores"] == 1 else "s")
    return (
        f"{machine['processor']}, {cores}, {machine['memory_gib']} GiB, {machine['platform']}; "
        f"JAX on {machine['backend']} ({machine['devices']})"
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def memory() -> int | None:
    """Bytes of main memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
