"""Real processes killed, stopped, doubled, starved of disk: nothing is lost, nothing differs."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.processes import checkpoints, final, wait_for

SCRIPT = Path(__file__).with_name("run_training.py")
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

pytestmark = pytest.mark.slow


def start(workdir, optimizer, steps, *options):
    command = [sys.executable, str(SCRIPT), str(workdir), optimizer, str(steps), *options]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(workdir, optimizer, steps, *options):
    process = start(workdir, optimizer, steps, *options)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


@pytest.mark.parametrize(("optimizer", "kills"), [("adam", 8), ("lbfgs", 6), ("hf", 6)])
def test_killed_at_random_moments_ends_like_uninterrupted(optimizer, kills, tmp_path):
    steps = 60
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finish(whole, optimizer, steps)[0] == 0
    chance = random.Random(optimizer)
    killed = 0
    while killed < kills:
        before = checkpoints(broken)[-1:] or [0]
        process = start(broken, optimizer, steps, "--slow", "0.05")
        # Each stretch gets at least one checkpoint further, then anything may happen.
        wait_for(lambda before=before: (checkpoints(broken)[-1:] or [0]) > before, process)
        time.sleep(chance.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1
        if checkpoints(broken)[-1] >= steps - 8:
            break
    assert killed >= 3
    code, output = finish(broken, optimizer, steps)
    assert code == 0, output
    state, position, rows = final(whole, steps)
    other_state, other_position, other_rows = final(broken, steps)
    assert state.keys() == other_state.keys()
    for path, x in state.items():
        np.testing.assert_array_equal(x, other_state[path], err_msg=path)
    assert position == other_position
    assert rows == other_rows


def test_sigterm_saves_and_ends_with_its_own_code(tmp_path):
    process = start(tmp_path, "adam", 100000, "--slow", "0.01")
    wait_for(lambda: checkpoints(tmp_path), process)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    last = checkpoints(tmp_path)[-1]
    assert finish(tmp_path, "adam", last + 3)[0] == 0
    assert checkpoints(tmp_path)[-1] == last + 3


def test_two_runs_in_one_directory_are_refused(tmp_path):
    first = start(tmp_path, "adam", 100000, "--slow", "0.01")
    wait_for(lambda: checkpoints(tmp_path), first)
    code, output = finish(tmp_path, "adam", 100000)
    first.kill()
    first.communicate()
    assert code == 1
    assert f"Process {first.pid} is training in" in output
    assert finish(tmp_path, "adam", checkpoints(tmp_path)[-1] + 1)[0] == 0


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path):
    assert finish(tmp_path, "adam", 4, "--width", "4096")[0] == 0
    code, output = finish(tmp_path, "adam", 40, "--width", "4096", "--filesize", "20000")
    assert code == 1, output
    assert "refused: " in output
    assert "That of step 4 is whole" in output
    assert checkpoints(tmp_path) == [4]
    assert finish(tmp_path, "adam", 8, "--width", "4096")[0] == 0
    assert checkpoints(tmp_path)[-1] == 8


READER = """
import sys
from pathlib import Path
from jdl.recipes.run_config import RunConfig

workdir = Path(sys.argv[1])
config = RunConfig.load(workdir)
digits = config.images(config.data, config.split, batch_size=64)
shuffled = config.images(config.data, config.split, batch_size=64, shuffle=True, seed=0)
for _ in range(12):
    estimator = config.estimator(workdir)
    assert estimator.evaluate(digits)["loss"] > 0
    assert len(estimator.predict(digits)) == digits.num_records
    assert config.estimator(workdir).initialize(shuffled).step >= estimator.step
"""


def test_a_training_that_saves_all_the_time_is_not_disturbed_by_readers(tmp_path):
    run = str(tmp_path / "run")
    jdl = [sys.executable, "-m", "jdl"]
    training = subprocess.Popen(
        [*jdl, "train", "mlp", "--workdir", run, "--save-every", "2", "--steps", "1000000"],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(lambda: checkpoints(tmp_path / "run"), training)
    at_first = checkpoints(tmp_path / "run")[-1]
    readers = [
        [*jdl, "evaluate", "--workdir", run],
        [*jdl, "predict", "--workdir", run, "--out", str(tmp_path / "p.jsonl")],
        [*jdl, "curvature", "--workdir", run, "--images", "128"],
        [*jdl, "runs", str(tmp_path)],
        [sys.executable, "-c", READER, run],
    ]
    for command in readers:
        done = subprocess.run(
            command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, cwd=tmp_path
        )
        assert done.returncode == 0, (command, done.stderr)
        assert training.poll() is None, training.communicate()[0]
    at_last = checkpoints(tmp_path / "run")[-1]
    training.terminate()
    output, _ = training.communicate(timeout=60)
    assert training.returncode == 75, output
    assert at_last > at_first + 20
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))


def test_a_run_that_may_only_be_read_is_evaluated_and_predicted(tmp_path):
    run, jdl = tmp_path / "run", [sys.executable, "-m", "jdl"]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write anywhere, and there is no setpriv to give that up")
        jdl = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *jdl]
    subprocess.run(
        [*jdl, "train", "mlp", "--workdir", str(run), "--steps", "3"], env=ENVIRONMENT, check=True
    )
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for path in [*files, run]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for command in (["evaluate"], ["predict", "--out", str(tmp_path / "p.jsonl")], ["curvature"]):
        done = subprocess.run(
            [*jdl, *command, "--workdir", str(run)], env=ENVIRONMENT, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stderr)
        if command == ["evaluate"]:
            assert "accuracy" in done.stdout
            assert "the evaluation is not logged: " in done.stderr
            assert "Permission denied" in done.stderr
        if command == ["curvature"]:
            assert "trace " in done.stdout
            assert "is read-only (Permission denied), nothing is written" in done.stderr
    trained = subprocess.run(
        [*jdl, "train", "mlp", "--workdir", str(run), "--steps", "5"],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert trained.returncode == 2, trained.stderr
    assert "Permission denied" in trained.stderr
    assert "Traceback" not in trained.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == files
