"""Every benchmark runs, at its smallest size; what it measures then means nothing."""

import gzip
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jdl
from jdl.cli.main import main
from jdl.compare import CATALOGUE, load_results

BENCHMARKS = Path(__file__).parent / "benchmarks"
MAKEFILE = Path(__file__).parent.parent / "Makefile"
# name -> its smallest run; {data} is a folder with small files in MNIST's format
SMALLEST = {
    "classics": "--data {data}/mnist --share 0.0005 --only mlp,autoencoder,adding",
    "data": "--rounds 1 --seconds 0.05",
    "kfac": "--data {data} --seconds 2 --tune 0.5 --optimizers adam",
    "matrix": "--data {data} --share 0.01 --nets transformer,lstm --optimizers adamw,kfac "
    "--out {data}/matrix.jsonl",
    "optim": "--data {data}/mnist --rounds 1 --seconds 2 --method diagonal",
    "paper": "--workdir {data}/paper --only curves --methods kfac --examples 200 "
    "--minutes 0.05 --trials 1 --evaluations 2",
    "pictures": "--only vae --steps 2 --out {data}/pictures",
    "pinn": "--seconds 0.1 --seeds 1 --out {data}/pinn",
    "solvers": "--rounds 1",
    "start": "--rounds 1 --optimizers adam",
    "step": "--rounds 1 --share 0.002",
    "train": "--rounds 1 --steps 1",
    "vision": "--rounds 1 --steps 1 --train-seconds 2",
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The bundled digits, enlarged to 28 × 28, as MNIST's four files."""
    folder = tmp_path_factory.mktemp("data")
    batch = next(iter(jdl.data.digits(batch_size=700, shuffle=True, seed=0)))
    images = np.pad(
        np.kron(batch["image"][..., 0], np.ones((1, 3, 3), np.uint8)), [(0, 0), (2, 2), (2, 2)]
    )
    (folder / "mnist").mkdir()
    for part, rows in {"train": np.arange(5000) % 500, "t10k": np.arange(500, 700)}.items():
        x, y = images[rows].astype(np.uint8), batch["label"][rows].astype(np.uint8)
        for name, array in {"images-idx3": x, "labels-idx1": y}.items():
            header = np.array([0x0800 + array.ndim, *array.shape], ">i4").tobytes()
            path = folder / "mnist" / f"{part}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes()))
    return folder


def test_every_benchmark_is_tried():
    assert {f"bench_{name}.py" for name in SMALLEST} == {
        p.name for p in BENCHMARKS.glob("bench_*.py")
    }


@pytest.mark.parametrize("name", SMALLEST)
def test_it_runs(name, data):
    command = [sys.executable, str(BENCHMARKS / f"bench_{name}.py")]
    command += SMALLEST[name].format(data=data).split()
    environment = os.environ | {"JDL_BENCH_SHARE": "0.05", "JDL_BENCH_DIR": str(data)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"\d", done.stdout)) > 10, done.stdout


def test_the_study_runs_and_reports_tuned_optimizers_alone(tmp_path, capsys):
    recipe = re.search(r"jdl (compare .*?) \$\(ARGS\)", MAKEFILE.read_text(), re.S)[1]
    words = shlex.split(recipe.replace("\\\n", "").replace("$$problem", "quadratic"))
    for option, value in {
        "--workdir": str(tmp_path),
        "--optimizers": "adamw,lbfgs",
        "--seeds": "1",
        "--trials": "2",
        "--seconds": "0.2",
    }.items():
        words[words.index(option) + 1] = value
    assert main(words) == 0, capsys.readouterr().err
    results = load_results(tmp_path)
    assert results.optimizers == ("adamw-tuned", "lbfgs-tuned")
    assert len(results.tuned["quadratic", "lbfgs-tuned"]) == 2
    for problem in re.search(r"PROBLEMS \?= (.*)", MAKEFILE.read_text())[1].split():
        assert problem in CATALOGUE
