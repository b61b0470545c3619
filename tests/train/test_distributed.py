"""Several real processes on loopback: the numbers of one, and none left waiting for another."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.train.processes import checkpoints, final, wait_for

SCRIPT = Path(__file__).with_name("run_distributed.py")
pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(**more):
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | more


def coordinates(port, number, i):
    return environment(
        JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
        JAX_NUM_PROCESSES=str(number),
        JAX_PROCESS_ID=str(i),
    )


def start(number, workdir, steps, *options, script=SCRIPT):
    """That many processes, given their coordinates by hand."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(workdir), str(steps), *options],
            env=coordinates(port, number, i),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(number)
    ]


def outputs(processes, timeout=240):
    return [p.communicate(timeout=timeout)[0] for p in processes]


def run(number, workdir, steps, *options):
    processes = start(number, workdir, steps, *options)
    texts = outputs(processes)
    assert [p.returncode for p in processes] == [0] * number, texts
    return texts


def evaluation(text):
    loss, accuracy, rows = re.search(r"evaluation (\S+) (\S+) (\d+)", text).groups()
    return float(loss), float(accuracy), int(rows)


@pytest.mark.parametrize(
    ("optimizer", "parallel"), [("adam", "jit"), ("adam", "fsdp"), ("hf", "jit"), ("hf", "pmap")]
)
def test_two_processes_give_the_numbers_of_one(optimizer, parallel, tmp_path):
    options = ("--optimizer", optimizer, "--parallel", parallel)
    (alone,) = run(1, tmp_path / "one", 6, *options)
    together = run(2, tmp_path / "two", 6, *options)
    one = evaluation(alone)
    for text in together:
        assert "of 2" in text
        loss, accuracy, _ = evaluation(text)
        assert loss == pytest.approx(one[0], abs=2e-6)
        assert accuracy == pytest.approx(one[1], abs=1e-6)
    assert one[2] == 101
    assert sum(evaluation(text)[2] for text in together) == 101  # each record exactly once
    state, position, rows = final(tmp_path / "one", 6)
    other_state, other_position, other_rows = final(tmp_path / "two", 6)
    assert position == other_position
    assert [r["step"] for r in rows] == [r["step"] for r in other_rows]  # one writer
    for path, x in state.items():
        np.testing.assert_allclose(x, other_state[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    run(1, tmp_path / "whole", 14)
    run(2, tmp_path / "moved", 7)
    run(1, tmp_path / "moved", 9)
    run(2, tmp_path / "moved", 14)
    state, position, _ = final(tmp_path / "whole", 14)
    other, other_position, _ = final(tmp_path / "moved", 14)
    assert position == other_position
    for path, x in state.items():
        np.testing.assert_allclose(x, other[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_processes_that_are_done_end_in_good_order(tmp_path):
    """Their watch would abort one of them, if it went on while Python ends."""
    for _ in range(6):
        processes = start(2, tmp_path, 0, script=SCRIPT.with_name("run_nothing.py"))
        texts = outputs(processes, timeout=60)
        assert [p.returncode for p in processes] == [0, 0], texts


OWN = {
    "raise": (1, "ValueError: this one raises"),
    "mistake": (1, "jdl: error: this is not to be done"),
    "kill": (-signal.SIGKILL, ""),
    "interrupt": (130, "jdl: process {rank} was interrupted"),
    "leave": (1, "jdl: ended, because process {rank} was done 30 s before another"),
}
OTHERS = {
    "raise": "process {rank} failed: ValueError: this one raises",
    "mistake": "process {rank} failed: UserError: this is not to be done",
    "kill": "process {rank}(, which coordinates,)? is gone",
    "interrupt": "process {rank} was interrupted",
    "leave": "process {rank} was done 30 s before another",
}


def clean(text):
    """Whether it has no dump of C++, and no traceback of what another process's end has caused."""
    dumps = "terminate called|stack trace|SIGABRT|absl::|Gloo \\w+ failed"
    return not re.search(dumps, text) and text.count("Traceback") <= text.count("this one raises")


@pytest.mark.parametrize(
    ("kind", "at", "rank"),
    [
        *((kind, "step", rank) for kind in ("raise", "kill", "interrupt") for rank in (0, 1)),
        ("mistake", "data", 1),
        ("raise", "checkpoint", 0),
        ("kill", "checkpoint", 1),
        ("leave", "step", 1),
    ],
)
def test_when_one_fails_all_end_soon_and_name_it(kind, at, rank, tmp_path):
    processes = start(2, tmp_path, 10**6, "--fail", kind, "--at", at, "--rank", str(rank))
    wait_for(lambda: any(p.poll() is not None for p in processes))
    texts = outputs(processes, timeout=60)
    own, other = texts[rank], texts[1 - rank]
    code, line = OWN[kind]
    assert [processes[rank].returncode, processes[1 - rank].returncode] == [code, 1], texts
    assert line.format(rank=rank) in own
    assert own.count("Traceback") == (kind == "raise")
    told = [line for line in other.splitlines() if line.startswith("jdl: ")]
    assert len(told) == 1, other
    assert re.match(f"jdl: ended, because {OTHERS[kind].format(rank=rank)}", told[0]), other
    assert "Traceback" not in other
    assert clean(own), own
    assert clean(other), other


def test_ctrl_c_to_all_ends_all_as_interrupted(tmp_path):
    processes = start(2, tmp_path, 10**6, "--slow", "0.01")
    wait_for(lambda: checkpoints(tmp_path), processes[0])
    for process in processes:
        process.send_signal(signal.SIGINT)
    texts = outputs(processes, timeout=60)
    assert [p.returncode for p in processes] == [130, 130], texts
    assert all(f"jdl: process {i} was interrupted" in text for i, text in enumerate(texts)), texts
    assert all(map(clean, texts)), texts


def test_one_that_is_late_is_waited_for(tmp_path):
    texts = run(2, tmp_path, 8, "--fail", "late")
    assert ["40 s late" in text for text in texts].count(True) == 1, texts
    assert checkpoints(tmp_path)[-1] == 8


def test_sigterm_to_one_saves_on_all_at_the_same_step(tmp_path):
    processes = start(2, tmp_path, 10**6, "--slow", "0.01")
    wait_for(lambda: checkpoints(tmp_path), processes[0])
    processes[1].send_signal(signal.SIGTERM)
    texts = outputs(processes, timeout=60)
    assert [p.returncode for p in processes] == [75, 75], texts
    last = checkpoints(tmp_path)[-1]
    run(2, tmp_path, last + 2)
    assert checkpoints(tmp_path)[-1] == last + 2


def command(tmp_path, *options):
    """`jdl train` in two processes; `options` are those of each."""
    script = "import sys; from jdl.cli.main import main; sys.exit(main())"
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, "train", "mlp", "--distributed", *own],
            env=coordinates(port, 2, i),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i, own in enumerate(options)
    ]


@pytest.mark.parametrize(
    ("options", "mistake", "reason"),
    [
        (["--data", "missing.tar"], "There is no archive 'missing.tar'.", "DataError: There is no"),
        (["--workdir", "file/run"], "{}/run: Not a directory.", "NotADirectoryError: "),
    ],
)
def test_a_mistake_in_one_command_is_told_to_all(options, mistake, reason, tmp_path):
    (tmp_path / "file").touch()
    processes = command(tmp_path, options, ["--workdir", "run"])
    mistaken, other = outputs(processes, timeout=60)
    assert [p.returncode for p in processes] == [2, 1]
    assert mistaken.strip() == f"jdl train: error: {mistake.format('file')}"
    assert f"jdl: ended, because process 0 failed: {reason}" in other


def test_ctrl_c_to_one_command_ends_all(tmp_path):
    options = ["--steps", "1000000", "--save-every", "20", "--workdir", "run"]
    processes = command(tmp_path, options, options)
    wait_for(lambda: checkpoints(tmp_path / "run"), processes[0])
    processes[1].send_signal(signal.SIGINT)
    other, interrupted = outputs(processes, timeout=60)
    assert [p.returncode for p in processes] == [1, 130], (other, interrupted)
    assert re.fullmatch(r"jdl train: interrupted after step \d+; .*", interrupted.splitlines()[-1])
    assert other.splitlines()[-1] == "jdl: ended, because process 1 was interrupted"
    assert clean(other), other
    assert clean(interrupted), interrupted


def test_a_runtime_shut_down_in_good_order_ends_nobody():
    script = """
import time
from jdl.train import distributed
distributed.initialize(expected=2)
import jax
jax.distributed.shutdown()
time.sleep(2)
print("still here")
"""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=coordinates(port, 2, i),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    texts = outputs(processes, timeout=60)
    assert [p.returncode for p in processes] == [0, 0], texts
    assert all("still here" in text for text in texts)


def test_the_launcher_may_have_initialized_already():
    script = """
import os
import jax
jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], 1, 0)
from jdl.train import distributed
distributed.initialize(expected=2)
"""
    found = subprocess.run(
        [sys.executable, "-c", script],
        env=coordinates(free_port(), 1, 0),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "2 processes were to train together, and JAX sees 1." in found.stderr


def launched(command, workdir):
    return subprocess.run(
        [*command, sys.executable, str(SCRIPT), str(workdir), "4"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
def test_mpirun_starts_it(tmp_path):
    found = launched(["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"], tmp_path)
    if "not detected" in found.stderr or "find each other" in found.stderr:
        pytest.skip("JAX does not detect this mpirun")
    assert found.returncode == 0, found.stderr
    assert "process 0 of 2" in found.stdout
    assert "process 1 of 2" in found.stdout


@pytest.mark.skipif(shutil.which("srun") is None, reason="SLURM's srun is not installed")
def test_slurm_starts_it(tmp_path):
    nodes = subprocess.run(["sinfo", "-h"], capture_output=True, text=True, timeout=60, check=False)
    if nodes.returncode != 0 or " idle " not in nodes.stdout:
        pytest.skip("SLURM has no idle node here")
    found = launched(["srun", "--immediate=30", "-n", "2"], tmp_path)
    assert found.returncode == 0, found.stderr
    assert "process 0 of 2" in found.stdout
    assert "process 1 of 2" in found.stdout


@pytest.mark.parametrize("how", ["inside", "config", "copies"])
def test_ray_trains_together_or_says_that_it_does_not(how, tmp_path):
    pytest.importorskip("ray.train", reason="Ray's trainer is not installed")
    found = subprocess.run(
        [sys.executable, str(SCRIPT.with_name("run_ray.py")), str(tmp_path), how],
        env=environment(RAY_DEDUP_LOGS="0", RAY_USAGE_STATS_ENABLED="0"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    text = found.stdout + found.stderr
    if how == "copies":
        assert found.returncode != 0
        assert "The processes do not find each other" in text
        return
    assert found.returncode == 0, text
    assert {line[-14:] for line in text.splitlines() if line.endswith("of 2")} == {
        "process 0 of 2",
        "process 1 of 2",
    }
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]  # one writer
