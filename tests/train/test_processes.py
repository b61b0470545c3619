"""Real processes killed, stopped, doubled, starved of disk: nothing is lost, nothing differs."""

import os
import random
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
