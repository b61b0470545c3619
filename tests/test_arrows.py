"""Imports flow one way, heavy imports stay lazy, and flax stays in its rooms."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import jdl

ROOT = Path(jdl.__file__).parent

# room -> the rooms it may import; `jdl/__init__.py` and `cli` may import all
ARROWS = {
    "core": set(),
    "losses": {"core"},
    "metrics": {"core"},
    "models": {"core", "losses"},
    "optim": {"core"},
    "curvature": {"core", "optim"},
    "data": {"core"},
    "solvers": {"core", "optim"},
    "train": {"core", "losses", "metrics", "models", "optim", "curvature"},
    "recipes": {"core", "metrics", "models", "optim", "data", "train"},
    "vision": {"core", "metrics", "models", "optim", "data", "train", "recipes"},
    "compare": {"core", "losses", "metrics", "models", "optim", "data", "train"},
}


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in ROOT.rglob("*.py")}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            assert not node.level, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {ast.literal_eval(x) for x in node.args if isinstance(x, ast.Constant)}
        elif isinstance(node, ast.Dict):  # a table for a lazy `__getattr__`
            names |= {x.value for x in node.values if getattr(x, "value", None) in MODULES}
    return names


def edges(module: str) -> set[str]:
    """Modules of jdl that a module imports, and the packages whose `__init__` runs with them."""
    found = set()
    for name in imports(MODULES[module]):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]  # an attribute of a module
        found.add(name)
        while (name := name.rpartition(".")[0]) and not module.startswith(f"{name}."):
            found.add(name)
    return found - {module, "jdl", ""}


GRAPH = {module: edges(module) for module in MODULES if module != "jdl"}


def test_imports_flow_one_way():
    used = {
        (room_of(module), room_of(other), module)
        for module, others in GRAPH.items()
        for other in others
        if room_of(module) not in ("cli", "__main__") and room_of(other) != room_of(module)
    }
    assert not sorted(x for x in used if x[1] not in ARROWS[x[0]])
    unused = {(a, b) for a, others in ARROWS.items() for b in others} - {x[:2] for x in used}
    assert not sorted(unused)


def test_no_files_import_each_other_in_a_circle():
    """Imports inside functions and under TYPE_CHECKING count; the error names the circle."""
    assert set(graphlib.TopologicalSorter(GRAPH).static_order()) >= GRAPH.keys()


FLAX_ROOMS = {"models", "vision"}


def test_flax_stays_in_its_rooms():
    wrong = [
        str(path)
        for path in ROOT.rglob("*.py")
        if any(name.split(".")[0] == "flax" for name in imports(path))
        and room_of(dotted(path)) not in FLAX_ROOMS
        and path != ROOT / "core" / "model.py"
    ]
    assert not wrong


def test_importing_jdl_imports_nothing_heavy():
    heavy = ("jax", "flax", "optax", "numpy", "grain", "orbax", "matplotlib", "rich", "tyro", "PIL")
    code = f"import sys, jdl, jdl.cli.main; print([m for m in {heavy} if m in sys.modules])"
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
with jdl.train.lock.run_lock(sys.argv[1]):
    print(len(next(iter(jdl.data.digits(batch_size=8)))["label"]))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout == "8\n", found.stderr
