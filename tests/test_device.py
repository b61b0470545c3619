"""The measurements of an accelerator, on the CPU with small sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "device" / "run.py"
PARTS = {"truth", "loop", "clock", "loader", "compile", "vision"}


def run(out, *arguments):
    command = [sys.executable, str(SCRIPT), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_every_part_ends_and_is_within_its_tolerance(tmp_path):
    # The limit is for machines that do other work too.
    done = run(tmp_path, "--tiny", "--minutes", "25")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parts"] == dict.fromkeys(PARTS, "ended")
    assert {p.name for p in tmp_path.iterdir()} == {
        "summary.json",
        "summary.md",
        *(f"{part}.json" for part in PARTS),
    }
    for part in PARTS:
        found = json.loads((tmp_path / f"{part}.json").read_text())
        assert found["complete"]
        assert found["rows"] == summary["results"][part]
        assert not any("error" in row["figures"] for row in found["rows"])
    truth = {row["case"]: row["figures"] for row in summary["results"]["truth"]}
    assert all(figures["within"] for figures in truth.values())
    assert truth["kill and resume, kfac, deterministic"]["resumed_from"] == 16
    assert 0 < truth["optimizer kfac"]["disturbed_1"] < 1e-3
    assert 0 < truth["gnvp against float64"]["cpu_float32"] < 1e-4
    loop = {row["case"]: row["figures"] for row in summary["results"]["loop"]}
    assert all(x["ratio"] > 0 for case, x in loop.items() if not case.startswith("profile"))
    for row in summary["results"]["clock"]:
        if "curve" in row["figures"]:
            curve = row["figures"]["curve"]
            assert curve[-1]["seconds"] > curve[0]["seconds"] == 0


@pytest.mark.slow
def test_a_part_that_runs_out_of_time_leaves_what_it_has_and_the_exit_code_says_so(tmp_path):
    done = run(tmp_path, "--tiny", "--minutes", "0.001", "--only", "vision")
    assert done.returncode == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parts"]["vision"].startswith("killed at its limit")


def test_unknown_parts_are_refused(tmp_path):
    done = run(tmp_path, "--only", "truth,weather")
    assert done.returncode == 2
    assert "weather" in done.stderr
