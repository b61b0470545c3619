import getpass
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="comes with the extra 'test'")

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
RUN = Path(__file__).with_name("run_notebook.py")
QUICK = ("01_quickstart",)
LARGEST = 1_500_000  # bytes of a notebook with its pictures

# Where somebody's files lie, on any system, and where a work directory was.
PATHS = re.compile(
    r"(?<![\w.])(?:/(?:home|Users|root|tmp|var|private|work|mnt|opt)/|[A-Z]:\\)[^\s\"']*"
)


def named(paths):
    return [
        pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
        for path in paths
    ]


def texts(cell):
    """What a code cell showed, as text."""
    for output in cell.get("outputs", ()):
        yield from ([output["text"]] if "text" in output else [])
        yield from output.get("traceback", ())
        for kind, data in output.get("data", {}).items():
            if not kind.startswith("image/"):
                yield data if isinstance(data, str) else str(data)


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= set(QUICK)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_whole_small_and_nobody_s(path):
    assert path.stat().st_size < LARGEST
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert prose
    assert prose[0].source.startswith("# ")
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1)), "run from top to bottom, then committed"
    shown = [output for cell in code for output in cell.outputs]
    assert shown
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert all(output.output_type != "error" for output in shown)
    assert all(output.get("name") != "stderr" for output in shown)
    for cell in notebook.cells:
        assert "execution" not in cell.metadata  # the times of a run
        assert not PATHS.search(cell.source)
        for text in texts(cell):
            assert not PATHS.search(text), PATHS.search(text).group()
            assert "Warning:" not in text
            assert not re.search(rf"(?<!\w){re.escape(getpass.getuser())}(?!\w)", text)


@pytest.mark.parametrize("path", named(NOTEBOOKS))
def test_it_runs_from_top_to_bottom_and_writes_nothing_beside_itself(path, tmp_path):
    pytest.importorskip("nbclient", reason="comes with the extra 'test'")
    folder = tmp_path / "notebooks"
    shutil.copytree(path.parent, folder, ignore=shutil.ignore_patterns("*.ipynb", "__pycache__"))
    before = sorted(folder.rglob("*"))
    # No network: what asks for it anyway is refused at once.
    refused = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")}
    environment = os.environ | refused | {"PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"PYTHONPATH": str(path.parents[1]), "IPYTHONDIR": str(tmp_path / "ipython")}
    for name in ("XLA_FLAGS", "MPLBACKEND"):  # those of this process
        environment.pop(name, None)
    found = subprocess.run(
        [sys.executable, str(RUN), str(path), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    assert sorted(folder.rglob("*")) == before
