"""Imports flow one way, heavy imports stay lazy, and flax stays in its rooms."""

import ast
import subprocess
import sys
from pathlib import Path

import jdl

ROOT = Path(jdl.__file__).parent

# room -> the rooms it may import
ARROWS = {
    "core": set(),
    "losses": {"core"},
    "metrics": {"core"},
    "models": {"core"},
    "optim": {"core"},
    "curvature": {"core"},
    "data": {"core"},
    "solvers": {"core", "optim"},
    "train": {"core", "losses", "metrics", "models", "optim", "curvature"},
    "vision": {"core", "losses", "metrics", "models", "optim", "solvers", "train", "data"},
    "compare": {"core", "losses", "metrics", "models", "optim", "train", "data", "vision"},
}
FLAX_ROOMS = {"models", "vision"}


def rooms_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_flow_one_way():
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = rooms_of(path)
        if room in ("__init__", "__main__", "cli"):
            continue
        used = {name.split(".")[1] for name in imports(path) if name.startswith("jdl.")}
        used &= {*ARROWS, "cli"}
        wrong += [f"{path}: {room} -> {other}" for other in used - ARROWS[room] - {room}]
    assert not wrong


def test_flax_stays_in_its_rooms():
    wrong = [
        str(path)
        for path in ROOT.rglob("*.py")
        if any(name.split(".")[0] == "flax" for name in imports(path))
        and rooms_of(path) not in FLAX_ROOMS
        and path != ROOT / "core" / "model.py"
    ]
    assert not wrong


def test_importing_jdl_imports_nothing_heavy():
    heavy = ("jax", "flax", "optax", "numpy", "grain", "orbax", "matplotlib", "rich", "tyro", "PIL")
    code = f"import sys, jdl, jdl.cli; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_is_importable():
    for name in jdl.__all__:
        assert getattr(jdl, name) is not None


def test_every_module_imports_where_posix_is_missing(tmp_path):
    """As on Windows; what jdl is built on is imported first and answers for itself."""
    code = """
import importlib, os, pkgutil, sys
import flax.linen, grain.python, matplotlib.pyplot, orbax.checkpoint, PIL.Image

for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("fork", "pread", "pwrite", "sched_getaffinity", "sysconf", "O_NONBLOCK", "O_CLOEXEC"):
    delattr(os, name)

import jdl

for module in pkgutil.walk_packages(jdl.__path__, "jdl."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
with jdl.train.lock.RunLock(sys.argv[1]):
    print(len(next(iter(jdl.data.digits(batch_size=8)))["label"]))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout == "8\n", found.stderr
