"""This machine's backend, devices, memory, image decoder and optional packages.

Examples:
  jdl doctor
  jdl doctor --json
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
from dataclasses import dataclass
from typing import Any

from jdl.cli import options

CORE = ("jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint", "numpy", "pillow")
# extra -> (the module to look for, what it is for)
EXTRAS = {
    "fast-images": ("simplejpeg", "decoding JPEGs 1.5 to 4 times as fast"),
    "vision": ("safetensors", "published networks for activations, dream and style"),
    "tensorboard": ("tensorboardX", "logs for TensorBoard"),
    "export": ("flatbuffers", "models as one file that runs without their code"),
    "remote": ("fsspec", "archives behind http:// and https://"),
    "seekable": ("indexed_gzip", "random access to .tar.gz"),
    "zstd": ("backports.zstd", "archives compressed as .tar.zst"),
}

_MARK = {True: "installed", False: "missing"}


@dataclass
class Args:
    """The options of `jdl doctor`."""

    as_json: options.Json = False


def run(args: Args) -> None:
    """Prints a line for each finding."""
    found = look()
    if args.as_json:
        print(json.dumps(found))
        return
    machine = found["machine"]
    rows = [
        ("jdl", found["jdl"]),
        ("Python", f"{machine['python']} on {machine['system']}, {machine['cores']} cores"),
        ("memory", _size(machine["memory"])),
        ("backend", found["backend"]),
        *((d["name"], f"{d['kind']}, {_size(d['memory'])}") for d in found["devices"]),
        ("decoder", found["decoder"]),
        ("compiled programs", found["compile_cache"] or "not kept between commands"),
        *found["packages"].items(),
    ]
    rows += [(f"[{e['extra']}]", f"{_MARK[e['found']]}: {e['purpose']}") for e in found["extras"]]
    for name, value in rows:
        print(f"{name:18}{value}")
    missing = [e["extra"] for e in found["extras"] if not e["found"]]
    if missing:
        print(f"the rest: pip install 'jax-jdl[{','.join(missing)}]'")
    if found["accelerator_hint"]:
        print(found["accelerator_hint"])


def look() -> dict[str, Any]:
    """All findings."""
    import jax

    from jdl import __version__
    from jdl.compare.machine import memory
    from jdl.data.pipeline import cores

    devices = [
        {
            "name": f"{d.platform}:{d.id}",
            "kind": d.device_kind,
            "memory": (d.memory_stats() or {}).get("bytes_limit"),
        }
        for d in jax.local_devices()
    ]
    return {
        "jdl": __version__,
        "machine": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": cores(),
            "memory": memory(),
        },
        "backend": jax.default_backend(),
        "devices": devices,
        "decoder": _decoder(),
        "compile_cache": _compile_cache(),
        "packages": {name: importlib.metadata.version(name) for name in CORE},
        "extras": [
            {"extra": extra, "found": _found(module), "purpose": purpose}
            for extra, (module, purpose) in EXTRAS.items()
        ],
        "accelerator_hint": _hint(jax.default_backend()),
    }


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return module == "backports.zstd" and _found("compression.zstd")


def _decoder() -> str:
    if _found("simplejpeg"):
        return f"simplejpeg {importlib.metadata.version('simplejpeg')} for JPEG, Pillow for others"
    return "Pillow"


def _compile_cache() -> str | None:
    """The folder of compiled programs, their number and size; None if none are kept."""
    import jax

    folder = jax.config.jax_compilation_cache_dir
    if not (folder and jax.config.jax_enable_compilation_cache):
        return None
    files = [f for f in os.scandir(folder) if f.is_file()] if os.path.isdir(folder) else []
    programs = sum(f.name.endswith("-cache") for f in files)
    size = sum(f.stat().st_size for f in files) / 2**20
    return f"{programs} in {folder}, {size:.1f} MiB"


def _hint(backend: str) -> str:
    """What to install to use an accelerator that JAX does not use."""
    if backend == "cpu" and os.path.exists("/proc/driver/nvidia/version"):
        return "There is an NVIDIA GPU that JAX does not use: pip install 'jax-jdl[cuda]'"
    if backend == "cpu" and os.path.exists("/dev/accel0"):
        return "There is a TPU that JAX does not use: pip install 'jax-jdl[tpu]'"
    return ""


def _size(count: int | None) -> str:
    return "memory unknown" if count is None else f"{count / 2**30:.1f} GiB"
