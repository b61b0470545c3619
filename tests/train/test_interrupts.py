"""Ctrl-C and SIGTERM at any moment: nothing that was trained is lost, and nothing is swallowed."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jdl
from jdl.data import from_arrays
from jdl.models import MLP
from jdl.train.signals import Interrupted, Signals, Stopped

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


@pytest.fixture
def ctrl_c():
    """Python's own handler, whatever the test runner has put there; presses Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def data(**options):
    x = np.random.default_rng(0).normal(size=(70, 6)).astype(np.float32)
    labels = np.argmax(x[:, :3], 1).astype(np.int32)
    return from_arrays(x, labels, batch_size=16, shuffle=True, seed=0, **options)


def make(**options):
    net = MLP(widths=(8,), num_outputs=3, dropout=0.2)
    return jdl.classifier(net, "adam", devices=jax.devices()[:1], log_every=1, **options)


def at_step(number, act, split="train"):
    return lambda row: act() if (row["step"], row["split"]) == (number, split) else None


@pytest.mark.parametrize("on_disk", [False, True])
def test_ctrl_c_keeps_the_model_and_training_goes_on_as_if_nothing_had_been(
    on_disk, ctrl_c, tmp_path
):
    workdir = tmp_path / "run" if on_disk else None
    rows = []
    estimator = make(hooks=[rows.append, at_step(3, ctrl_c)], workdir=workdir)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted after step [45]") as caught:
        estimator.train(data(), steps=9)
    stopped = estimator.step
    assert stopped in (4, 5)  # the step at hand may be one or two further than its log
    assert int(estimator.state.step) == stopped
    seconds = estimator.seconds
    time.sleep(0.02)
    assert estimator.seconds == seconds  # the clock of training stands still
    assert np.isfinite(estimator.evaluate(data(epochs=1))["loss"])
    if on_disk:
        assert f"saved in {workdir / 'checkpoints'}" in str(caught.value)
        assert (workdir / "checkpoints" / str(stopped)).is_dir()
        estimator = make(hooks=[rows.append], workdir=workdir)
    estimator.train(data(), max_steps=9)
    whole = make().train(data(), steps=9)
    jax.tree.map(np.testing.assert_array_equal, whole.params, estimator.params)
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 10))


def test_the_same_data_goes_on_after_ctrl_c_without_losing_a_batch(ctrl_c):
    seen = []

    def batches():
        x = np.eye(6, dtype=np.float32)
        for i in range(100):
            seen.append(i)
            yield {"image": np.roll(x, i, 0), "label": np.arange(6) % 3}

    def numbers(stop_at):
        generator, estimator = batches(), make(hooks=[at_step(stop_at, ctrl_c)])
        if stop_at:
            with pytest.raises(KeyboardInterrupt):
                estimator.train(generator, steps=8)
        return estimator.train(generator, max_steps=8).params

    jax.tree.map(np.testing.assert_array_equal, numbers(0), numbers(3))


def test_a_second_ctrl_c_ends_a_hook_and_a_wait_for_data(ctrl_c):
    ended = []

    def twice():
        ctrl_c()
        ctrl_c()
        ended.append("not ended")

    estimator = make(hooks=[at_step(2, twice)])
    with pytest.raises(Interrupted):
        estimator.train(data(), steps=9)
    assert not ended
    assert np.isfinite(estimator.evaluate(data(epochs=1))["loss"])

    def stuck():
        yield from data(epochs=1)
        twice()

    with pytest.raises(Interrupted):
        make().train(stuck, steps=9)

    def stuck_at_once():
        twice()
        yield

    with pytest.raises(Interrupted, match="after step 0"):
        make().train(stuck_at_once, steps=9)
    assert not ended


@pytest.mark.parametrize("length", [1, 4])  # steps in one dispatch
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_batch_that_was_being_made_is_made_again(number, length, ctrl_c, tmp_path):
    del ctrl_c
    made, pressed = [], []

    class Numbers:
        """Batch i holds the number i; it takes for ever to make the fourth, the first time."""

        def __init__(self):
            self.at = 0

        def __iter__(self):
            return self

        def __next__(self):
            i, self.at = self.at, self.at + 1
            if i == 3 and not pressed:
                pressed.append(True)
                signal.raise_signal(number)
                signal.raise_signal(number)
            made.append(i)
            return {"image": np.full((4, 6), i, np.float32), "label": np.zeros(4, np.int32)}

        def get_state(self):
            return {"at": self.at}

        def set_state(self, state):
            self.at = state["at"]

    numbers, estimator = Numbers(), make(workdir=tmp_path, steps_per_dispatch=length)
    with pytest.raises((KeyboardInterrupt, Stopped)):
        estimator.train(numbers, steps=6)
    assert estimator.step == (3 if length == 1 else 0)  # the other three wait in memory
    estimator.train(numbers, max_steps=6)
    assert made == list(range(6))


def test_sigterm_just_before_a_wait_for_data_ends_it():
    signals, waited = Signals(saves=True), []

    def train():
        with signals:
            signal.raise_signal(signal.SIGTERM)  # as it might in the midst of a step
            with signals.window("data"):
                waited.append(True)

    with pytest.raises(Stopped):
        train()
    assert not waited


def test_a_loss_that_is_not_finite_does_not_hide_ctrl_c(ctrl_c, tmp_path):
    x = np.zeros((4, 6), np.float32)
    numbers = [0, 1, 2, 3, 4, np.nan, np.nan, np.nan, np.nan]
    batches = [{"image": x + number, "label": np.arange(4) % 3} for number in numbers]
    estimator = make(
        workdir=tmp_path, on_nonfinite="rollback", save_every=2, hooks=[at_step(4, ctrl_c)]
    )
    with pytest.raises(KeyboardInterrupt):
        estimator.train(batches, steps=9)
    assert estimator.step <= 6


def test_a_hook_that_saves_leaves_the_signals_to_the_training(ctrl_c):
    del ctrl_c
    handlers = []

    def hook(row):
        row.estimator.save()
        handlers.append(signal.getsignal(signal.SIGINT))

    make(hooks=[hook]).train(data(), steps=3)
    assert len(set(handlers)) == 1
    assert handlers[0] is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_ones_own_is_called_between_two_steps_and_put_back(ctrl_c):
    del ctrl_c
    calls = []
    signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    estimator = make(hooks=[at_step(2, lambda: signal.raise_signal(signal.SIGINT))])
    assert estimator.train(data(), steps=5).step == 5
    assert calls == [signal.SIGINT]
    signal.raise_signal(signal.SIGINT)
    assert len(calls) == 2


def test_a_run_goes_on_in_its_directory_when_the_current_one_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    estimator = make(workdir="run").train(data(), steps=2)
    monkeypatch.chdir(tmp_path / "elsewhere")
    estimator.train(data(), steps=2)
    assert not list((tmp_path / "elsewhere").iterdir())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["2", "4"]


# ------------------------------------------------------------------ real processes


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in memory", "on disk"])
@pytest.mark.parametrize("optimizer", ["adam", "hf", "kfac"])
def test_interrupts_at_random_moments_change_nothing(optimizer, where, tmp_path):
    options = ["--workdir", str(tmp_path / "run")] if where == "on disk" else []
    script = HERE / "run_interrupted.py"
    done = subprocess.run(
        [sys.executable, str(script), optimizer, "17", *options],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("17 interrupts"), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_the_command_saves_says_where_and_ends_with_its_code(number, code, tmp_path):
    # A shell ignores Ctrl-C for what it runs in the background, and all that comes of it.
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from jdl.cli.main import main; raise SystemExit(main())"
    )
    command = [sys.executable, "-c", script, "train", "mlp", "--workdir", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*command, "--steps", "100000"], env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    log = tmp_path / "run" / "metrics.jsonl"
    from tests.train.processes import checkpoints, wait_for

    wait_for(log.exists)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == code, (out, error)
    (step,) = checkpoints(tmp_path / "run")
    assert f"after step {step}" in error
    assert "Traceback" not in error
    assert "goes on from there" in error
    if number == signal.SIGINT:
        assert f"saved in {tmp_path / 'run' / 'checkpoints'}" in error
    again = subprocess.run(
        [*command, "--steps", str(step + 1)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert checkpoints(tmp_path / "run")[-1] == step + 1


@pytest.mark.slow
def test_sigterm_without_a_run_directory_ends_the_program():
    script = """
        import numpy as np, jdl
        from jdl.models import MLP

        x = np.zeros((8, 3), np.float32)
        data = jdl.data.from_arrays(x, np.arange(8) % 2, batch_size=8)
        net = jdl.classifier(MLP(widths=(4,), num_outputs=2), "sgd", hooks=[print])
        net.train(data, steps=10**7)
        """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], env=ENVIRONMENT, stdout=subprocess.PIPE
    )
    assert process.stdout.readline()  # it trains
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
