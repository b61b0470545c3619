"""Logs: what is written can be read by others, and a run that goes back leaves no doubles."""

import csv
import json
import struct

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
