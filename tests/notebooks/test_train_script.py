"""The training script beside the notebooks, run as its users run it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "notebooks" / "train_script.py"
SMALL = {"--width": 16, "--depth": 1, "--heads": 2, "--patch": 4}
SMALL |= {"--batch-size": 32, "--log-every": 1, "--warmup": 2}


def command(workdir, *flags):
    small = [str(part) for flag in SMALL.items() for part in flag]
    return [sys.executable, str(SCRIPT), "--workdir", str(workdir), *small, *flags]


def environment(devices):
    xla = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu"}


def script(workdir, *flags, devices=1, code=0):
    done = subprocess.run(
        command(workdir, *flags),
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


def rows(workdir, split):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def last_object(text):
    return json.loads(text.splitlines()[-1])


@pytest.mark.slow
def test_it_trains_on_a_mesh_and_goes_on_where_it_was(tmp_path):
    flags = ["--save-every", "2", "--validate-every", "3"]
    first = script(tmp_path, "--max-steps", "4", *flags, devices=2)
    assert "1438 training images of 10 classes, 2 device(s)" in first.stdout
    assert "at step 0 of 4" in first.stdout
    assert last_object(first.stdout)["step"] == 4

    second = script(tmp_path, "--max-steps", "6", *flags, devices=2)
    assert "at step 4 of 6" in second.stdout
    found = last_object(second.stdout)
    assert found["step"] == 6
    assert np.isfinite(found["loss"])
    assert 0 <= found["accuracy"] <= 1
    assert [row["step"] for row in rows(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(tmp_path, "validation")] == [3, 6]
    assert json.loads((tmp_path / "flags.json").read_text())["max_steps"] == "6"


@pytest.mark.parametrize(("flag", "value"), [("--data", "nowhere.tar"), ("--patch", "9")])
def test_a_mistake_is_told_in_one_line(flag, value, tmp_path):
    done = script(tmp_path, flag, value, code=2)
    assert len(done.stderr.strip().splitlines()) == 1
    assert value in done.stderr
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_stopped_by_sigterm_it_ends_as_if_it_had_not_been(tmp_path):
    flags = ["--max-steps", "300", "--log-every", "10", "--ema", "0.9"]
    with subprocess.Popen(
        command(tmp_path / "stopped", *flags),
        env=environment(1),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step     20"):
                process.send_signal(signal.SIGTERM)
                break
        process.stdout.read()
        assert process.wait(timeout=120) == 75
    reached = rows(tmp_path / "stopped", "train")[-1]["step"]
    assert 20 <= reached < 300

    script(tmp_path / "stopped", *flags)
    script(tmp_path / "whole", *flags)
    timing = {"seconds", "data_wait"}
    for split in ("train", "validation", "test"):
        stopped, whole = (
            [{k: v for k, v in row.items() if k not in timing} for row in rows(folder, split)]
            for folder in (tmp_path / "stopped", tmp_path / "whole")
        )
        assert stopped == whole


@pytest.mark.slow
def test_it_learns_and_evaluates_alone(tmp_path):
    model = ["--width", "48", "--depth", "2", "--patch", "2", "--log-every", "50"]
    trained = last_object(script(tmp_path, *model, "--max-steps", "600").stdout)
    assert trained["accuracy"] > 0.9
    started = time.time()
    evaluated = script(tmp_path, *model, "--evaluate")
    found = last_object(evaluated.stdout)
    assert {k: found[k] for k in ("step", "loss", "accuracy")} == {
        k: trained[k] for k in ("step", "loss", "accuracy")
    }
    assert (tmp_path / "flags.json").stat().st_mtime < started  # left alone
