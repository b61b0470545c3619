"""Logs: what is written can be read by others, and a run that goes back leaves no doubles."""

import csv
import gc
import importlib.machinery
import json
import os
import struct
import subprocess
import sys
import types

import pytest

from jdl.core import check
from jdl.train import plot
from jdl.train.writers import (
    JsonlWriter,
    TensorBoardWriter,
    Writers,
    read_jsonl,
)


def row(step, split="train", **values):
    return {"step": step, "seconds": step / 2, "epoch": None, "split": split, **values}


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def scalars(folder):
    """step -> value of each tag, as TensorBoard reads its own files: void from a START on."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = {}
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == event_pb2.SessionLog.START:
                for steps in found.values():
                    for step in [s for s in steps if s >= event.step]:
                        del steps[step]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_csv_widens_for_new_names_and_keeps_the_old_rows(tmp_path):
    writers = Writers(tmp_path, ["csv"])
    writers.write(row(1, loss=0.5))
    writers.write(row(2, loss=float("nan"), histogram=[1, 2]))
    writers.write(row(2, "test, held out", accuracy=0.25))
    rows = read_csv(tmp_path / "metrics.csv")
    assert [r["loss"] for r in rows] == ["0.5", "", ""]
    assert json.loads(rows[1]["histogram"]) == [1, 2]
    assert (rows[2]["split"], rows[2]["accuracy"]) == ("test, held out", "0.25")


def test_csv_goes_back_also_behind_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.csv"
    for step in (1, 2, 3):
        Writers(tmp_path, ["csv"]).write(row(step, loss=float(step)))
    with path.open("a") as file:
        file.write("4,2.0,")
    writers = Writers(tmp_path, ["csv"])
    writers.rewind(2)
    writers.write(row(3, loss=9.0))
    assert [(r["step"], r["loss"]) for r in read_csv(path)] == [
        ("1", "1.0"),
        ("2", "2.0"),
        ("3", "9.0"),
    ]


def test_tensorboard_has_each_step_once_after_going_back(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = TensorBoardWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(row(step, loss=float(step), note="words"))
    writer.write(row(2, "test", accuracy=0.5))
    resumed = TensorBoardWriter(tmp_path)
    resumed.rewind(2)
    resumed.write(row(3, loss=30.0))
    found = scalars(tmp_path / "train")
    assert found["loss"] == {1: 1.0, 2: 2.0, 3: 30.0}
    assert found["seconds"][2] == 1.0
    assert "note" not in found
    assert scalars(tmp_path / "test")["accuracy"] == {2: 0.5}


def test_all_writers_hold_the_same_rows(tmp_path):
    pytest.importorskip("tensorboardX")
    writers = Writers(tmp_path, ("csv", "tensorboard"))
    writers.rewind(0)
    for step in (10, 20):
        writers.write(row(step, loss=1.0 / step))
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    table = read_csv(tmp_path / "metrics.csv")
    events = scalars(tmp_path / "tensorboard" / "train")
    assert [r["loss"] for r in lines] == [float(r["loss"]) for r in table] == [0.1, 0.05]
    assert events["loss"] == pytest.approx({10: 0.1, 20: 0.05})


def test_an_unknown_log_is_refused_and_the_nearest_told(tmp_path):
    with pytest.raises(check.ArgumentError, match="Did you mean 'tensorboard'"):
        Writers(tmp_path, ["tensorbord"])


def test_jsonl_goes_back_behind_a_line_cut_short(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    for step in (1, 2):
        writer.write(row(step, loss=float("inf")))
    with writer.path.open("a") as file:
        file.write('{"step": 3, "lo')
    writer.rewind(1)
    assert read_jsonl(writer.path) == [row(1, loss=None)]


def test_a_log_goes_on_behind_a_line_cut_short_and_what_is_no_row(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(row(1))
    with writer.path.open("a") as file:
        file.write('3\n{"step": "x"}\n{"step": 2, "lo')  # killed; then an evaluation beside
    for step in (2, 3):
        writer.write(row(step))
    assert read_jsonl(writer.path) == [row(1), {"step": "x"}, row(2), row(3)]
    writer.rewind(2)
    assert read_jsonl(writer.path) == [row(1), {"step": "x"}, row(2)]


def test_a_table_goes_on_behind_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.csv"
    Writers(tmp_path, ["csv"]).write(row(1, loss=0.25))
    with path.open("a") as file:
        file.write("2,0.5,,train,0.")
    Writers(tmp_path, ["csv"]).write(row(3, loss=0.125))
    found = read_csv(path)
    assert [(r["step"], r["loss"]) for r in found] == [("1", "0.25"), ("3", "0.125")]


def test_curves_are_drawn_of_what_is_a_number_and_of_metrics_that_came_later(tmp_path, monkeypatch):
    rows = [row(1, loss=2.0), row(2, loss=None, note="odd", flag=True), row(3, loss=1.0, late=0.5)]
    log = tmp_path / "m.jsonl"
    log.write_text("\n".join(map(json.dumps, [*rows, {"loss": 3.0}])) + '\n{"step": 4, "lo')
    drawn = {}
    panel = plot._panel

    def spy(axes, rows, name):
        panel(axes, rows, name)
        drawn[name] = [line.get_xydata().tolist() for line in axes.lines]

    monkeypatch.setattr(plot, "_panel", spy)
    plot.draw(log, tmp_path / "m.png")
    assert drawn == {"loss": [[[1.0, 2.0], [3.0, 1.0]]], "late": [[[3.0, 0.5]]]}


def test_two_processes_write_one_table(tmp_path):
    """An evaluation beside a training may bring columns that the training does not know."""
    training, evaluation = Writers(tmp_path, ["csv"]), Writers(tmp_path, ["csv"])
    training.write({"step": 1, "split": "train", "loss": 0.5})
    evaluation.write({"step": 1, "split": "test", "f1": 0.25, "loss": 0.75})
    training.write({"step": 2, "split": "train", "loss": 0.125})
    training.write({"step": 3, "split": "train", "loss": 0.125, "norm": 2.0})
    rows = read_csv(tmp_path / "metrics.csv")
    assert [{k: v for k, v in row.items() if v and k != "split"} for row in rows] == [
        {"step": "1", "loss": "0.5"},
        {"step": "1", "loss": "0.75", "f1": "0.25"},
        {"step": "2", "loss": "0.125"},
        {"step": "3", "loss": "0.125", "norm": "2.0"},
    ]


# ---------------------------------------------------------------------- services


def module(monkeypatch, name, **contents):
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="here")
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)


def fake_wandb(monkeypatch):
    """The arguments of each `init`, and what was logged to it; the ids of finished runs."""
    runs, finished = [], []

    def init(**given):
        runs.append((given, logged := []))
        log = lambda values, step: logged.append((step, values))  # noqa: E731
        return types.SimpleNamespace(log=log, finish=lambda: finished.append(given["id"]))

    module(monkeypatch, "wandb", init=init)
    return runs, finished


def fake_mlflow(monkeypatch):
    """name of a call -> the arguments of each."""
    calls = {}

    class Client:
        def __getattr__(self, name):
            def call(*args, **more):
                calls.setdefault(name, []).append((*args, more))
                if name == "create_run":
                    return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
                return None if name.startswith("get") else "7" if "experiment" in name else Done()

            return call

    class Done:
        def wait(self):
            calls.setdefault("wait", []).append(())

    entities = {"Metric": lambda *x: x, "Param": lambda *x: x}
    module(monkeypatch, "mlflow", MlflowClient=Client)
    module(monkeypatch, "mlflow.entities", **entities)
    return calls


def a_run(folder, service):
    """Three rows, of which the last two come again in a run that goes on from step 1."""
    (folder / "config.toml").write_text('model = "mlp"\n[option]\ndamping = 1.0\n')
    writers = Writers(folder, [service])
    writers.rewind(0)
    for step in (1, 2):
        writers.write(row(step, loss=1.0 / step, note="words", bad=float("nan")))
    writers.write(row(2, "test, held/out", accuracy=0.25))
    resumed = Writers(folder, [service])
    resumed.rewind(1)
    resumed.write(row(2, loss=0.5))
    resumed.write(row(2, "test, held/out", accuracy=0.25))
    resumed.write(row(3, loss=0.125))
    assert len(read_jsonl(folder / "metrics.jsonl")) == 4


def test_wandb_has_each_row_once_in_one_run_with_the_settings(tmp_path, monkeypatch):
    runs, finished = fake_wandb(monkeypatch)
    monkeypatch.setenv("WANDB_PROJECT", "pets")
    a_run(tmp_path, "wandb")
    (first, before), (second, after) = runs
    assert first == second
    assert finished == [first["id"]]  # before it goes on in the same process
    assert first["config"] == {"model": "mlp", "option": {"damping": 1.0}}
    assert (first["project"], first["resume"], first["dir"]) == ("pets", "allow", str(tmp_path))
    assert first["id"] == (tmp_path / "wandb.id").read_text()
    assert before == [
        (1, {"train/seconds": 0.5, "train/loss": 1.0}),
        (2, {"train/seconds": 1.0, "train/loss": 0.5}),
        (2, {"test, held-out/seconds": 1.0, "test, held-out/accuracy": 0.25}),
    ]
    assert after == [(3, {"train/seconds": 1.5, "train/loss": 0.125})]


def test_mlflow_has_each_row_once_in_one_run_with_the_settings(tmp_path, monkeypatch):
    calls = fake_mlflow(monkeypatch)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "pets")
    a_run(tmp_path, "mlflow")
    gc.collect()
    assert calls["create_experiment"] == [("pets", {})]
    assert calls["create_run"] == [("7", {"run_name": tmp_path.name})]
    assert calls["update_run"] == [("r1", {"status": "RUNNING"})]
    assert calls["set_terminated"] == [("r1", {})] * 2
    (_, settings), *rows = calls["log_batch"]
    assert settings == {"params": [("model", "mlp"), ("option", "{'damping': 1.0}")]}
    assert all(more["synchronous"] is False for _, more in rows)
    assert [(n, v, step) for _, more in rows for n, v, _, step in more["metrics"]] == [
        ("train/seconds", 0.5, 1),
        ("train/loss", 1.0, 1),
        ("train/seconds", 1.0, 2),
        ("train/loss", 0.5, 2),
        ("test_ held-out/seconds", 1.0, 2),
        ("test_ held-out/accuracy", 0.25, 2),
        ("train/seconds", 1.5, 3),
        ("train/loss", 0.125, 3),
    ]


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_a_missing_package_is_told_also_beside_a_folder_of_its_name(service, tmp_path, monkeypatch):
    (tmp_path / service).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    find = importlib.machinery.PathFinder.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: find(name, [str(tmp_path)]))
    with pytest.raises(check.MissingExtraError, match=f"jax-jdl.{service}."):
        Writers(tmp_path, [service])


def test_a_service_that_refuses_is_told_without_a_traceback(tmp_path, monkeypatch):
    def init(**_):
        raise ConnectionError("no route")

    module(monkeypatch, "wandb", init=init)
    with pytest.raises(check.UserError, match="Weights & Biases does not begin the run: no route"):
        Writers(tmp_path, ["wandb"]).rewind(0)


SCRIPT = """
import sys
from pathlib import Path
from tests.train.test_writers import a_run
a_run(Path(sys.argv[1]), sys.argv[2])
"""


def of_a_process(folder, service, **environment):
    """Runs `a_run` in a process of its own, at whose end the services' data are whole."""
    command = [sys.executable, "-c", SCRIPT, str(folder), service]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr


def test_wandb_offline_keeps_the_runs_records(tmp_path):
    pytest.importorskip("wandb")
    of_a_process(tmp_path, "wandb", WANDB_MODE="offline")
    identity = (tmp_path / "wandb.id").read_text()
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{identity}.wandb"))
    records = b"".join(path.read_bytes() for path in files)
    assert b"train/loss" in records
    assert b"test, held-out/accuracy" in records
    assert b"damping" in records


def test_mlflow_keeps_the_runs_metrics_in_a_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    where = {"MLFLOW_TRACKING_URI": f"file:{tmp_path / 'store'}", "MLFLOW_ALLOW_FILE_STORE": "true"}
    of_a_process(tmp_path, "mlflow", **where)
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    client = mlflow.MlflowClient(where["MLFLOW_TRACKING_URI"])
    identity = (tmp_path / "mlflow.id").read_text()
    history = client.get_metric_history(identity, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 1.0), (2, 0.5), (3, 0.125)]
    run = client.get_run(identity)
    assert run.data.params["model"] == "mlp"
    assert run.info.status == "FINISHED"
