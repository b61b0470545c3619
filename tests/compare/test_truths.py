"""Planted truths: what is so by construction must come out of a whole study."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from scipy import stats

from jdl.compare import Budget, Entry, Study, Target, load_results, table, write_report
from jdl.compare.results import Results, Trial, cost_to_target, headline, lines
from jdl.compare.statistics import cost_ratio, duel
from jdl.compare.study import CLOCKS
from jdl.compare.tables import pairs


@pytest.fixture
def clock(monkeypatch):
    """The training clock as a list of one number, which passes only as `timed` steps say."""
    now = [0.0]
    monkeypatch.setitem(CLOCKS, "wall", lambda: now[0])
    return now


def timed(name, clock, duration, batch_size=45, learning_rate=0.02):
    """Gradient descent whose steps take `duration()` seconds on the clock."""

    def pass_time(x):
        clock[0] += duration()
        return x

    def make():
        inner = optax.sgd(learning_rate)

        def update(grads, state, params=None, **_):
            leaf = jax.tree.leaves(grads)[0]
            like = jax.ShapeDtypeStruct((), leaf.dtype)
            waited = jax.pure_callback(pass_time, like, leaf.ravel()[0])
            grads = jax.tree.map(lambda g: g + 0.0 * waited, grads)
            return inner.update(grads, state, params)

        return optax.GradientTransformation(inner.init, update)

    return Entry(name, make, batch_size)


def test_twice_the_time_of_a_step_is_twice_the_time_to_the_target(problem, tmp_path, clock):
    problem = problem._replace(target=Target("train_loss", "at most", 0.45))
    entries = [timed("once", clock, lambda: 0.05), timed("twice", clock, lambda: 0.1)]
    budget, work = Budget(12.0), Budget(120, "work")
    results = Study(problem, entries, budget=budget, evaluations=60, workdir=tmp_path / "s").run()
    once, twice = lines(results, "blobs")
    assert (once.reached, twice.reached) == (1, 1)
    # Equal but for the points of evaluation, a factor of 200^(1/59) apart.
    factor = 200 ** (1 / 59)
    assert 2 / factor < twice.costs["seconds"].median / once.costs["seconds"].median < 2 * factor
    assert 1 / factor < twice.costs["work"].median / once.costs["work"].median < factor
    assert headline(results, "blobs").startswith("once reached train loss ≤ 0.45 first")
    results = Study(problem, entries, budget=work, evaluations=60, workdir=tmp_path / "w").run()
    once, twice = lines(results, "blobs")
    assert once.reached == 1
    assert once.costs["work"] == twice.costs["work"]
    assert twice.costs["seconds"].median == pytest.approx(
        2 * once.costs["seconds"].median, rel=1e-9
    )


def planted(costs):
    """A study of {optimizer: [problem, seed] costs to the target}."""
    names = [f"problem{i}" for i in range(len(next(iter(costs.values()))))]
    seeds = list(range(len(next(iter(costs.values()))[0])))
    target = {"metric": "train_loss", "goal": "at most", "threshold": 0.1}
    study = {
        "budget": {"amount": 1e6, "kind": "seconds"},
        "evaluations": 1000,
        "seeds": seeds,
        "problems": [{"name": name, "target": target} for name in names],
        "optimizers": [{"name": name, "settings": {}} for name in costs],
    }

    def trial(optimizer, problem, seed, cost):
        rows = tuple(
            {"step": i, "seconds": at, "epoch": at, "work": at, "train_loss": loss}
            for i, (at, loss) in enumerate([(0.0, 1.0), (float(cost), 0.05)])
        )
        return Trial(problem, optimizer, seed, "done", "", rows, (), 0.0, {})

    trials = [
        trial(optimizer, problem, seed, of[i][seed])
        for optimizer, of in costs.items()
        for i, problem in enumerate(names)
        for seed in seeds
    ]
    return Results(study, tuple(trials))


def test_ten_percent_more_is_found_and_its_interval_covers_it():
    """Problems of different costs, seeds that vary by 10 %; nominal coverage is 95 %."""
    rng, found = np.random.default_rng(0), []
    scale = np.array([[1.0], [30.0], [700.0]])
    for _ in range(200):
        one, other = (
            rng.lognormal(np.log(scale), 0.1, (3, 5)),
            rng.lognormal(sigma=0.1, size=(3, 5)),
        )
        other = 1.1 * scale * other
        found.append(cost_ratio(list(one), list(other)))
    values, low, high = np.array(found).T
    assert np.mean((low <= 1.1) & (high >= 1.1)) >= 0.9
    assert stats.gmean(values) == pytest.approx(1.1, rel=0.02)
    table = pairs(planted({"one": one, "other": other}))  # the report has the last one's
    told = dict(zip(table.header, table.rows[0], strict=True))
    values = [float(x) for x in re.findall(r"[\d.]+", told["cost ratio"])]
    ratio = found[-1] if told["optimizer"] == "one" else (1 / x for x in found[-1])
    assert sorted(values) == pytest.approx(sorted(ratio), rel=5e-3)


@pytest.mark.slow
def test_one_optimizer_under_two_names_is_rarely_called_different():
    rng, called = np.random.default_rng(1), 0
    for _ in range(100):
        same = rng.lognormal(sigma=0.1, size=(2, 1, 8))
        told = headline(planted({"one": same[0], "other": same[1]}), "problem0")
        assert "undecided" in told or "was ahead" in told
        called += "was ahead" in told
    assert called <= 5


@pytest.mark.slow
def test_a_target_that_none_reaches_reads_as_such(problem, tmp_path):
    problem = problem._replace(target=Target("train_loss", "at most", 1e-12))
    entries = [Entry(name, lambda: optax.sgd(0.1), 9) for name in ("a", "b")]
    results = Study(
        problem, entries, seeds=2, budget=Budget(3, "epochs"), evaluations=3, workdir=tmp_path
    ).run()
    told = "No optimizer reached train loss ≤ 1e-12 within 3 epochs."
    assert headline(results, "blobs") == told
    page = write_report(tmp_path).read_text()
    assert told in page
    assert told in (tmp_path / "report.md").read_text()
    header, rows = table(results, "blobs")
    assert {row[header.index("work to target")] for row in rows} == {"not reached"}
    assert "first, after" not in page


@pytest.mark.slow
def test_identical_optimizers_do_not_win_more_often_than_by_chance(problem, tmp_path, clock):
    """Twenty studies of one optimizer under two names, with steps of random duration."""
    problem = problem._replace(target=Target("train_loss", "at most", 0.6))
    rng = np.random.default_rng(0)
    p_values = []
    for k in range(20):
        entries = [
            timed(name, clock, lambda: rng.exponential(1e-3), 9, 0.05) for name in ("one", "other")
        ]
        seeds = list(range(6 * k, 6 * k + 6))
        study = Study(
            problem, entries, seeds=seeds, seconds=0.06, evaluations=25, workdir=tmp_path / str(k)
        )
        costs = cost_to_target(study.run())
        assert np.isfinite(costs["one"]).any()
        p_values.append(duel(costs["one"], costs["other"]).p_value)
    significant = sum(p < 0.05 for p in p_values)
    # At a true rate of 5 %, so many of 20 have a probability above 1 %.
    assert stats.binom.sf(significant - 1, 20, 0.05) > 0.01, p_values


@pytest.mark.slow
def test_a_killed_study_goes_on_from_its_last_checkpoint(tmp_path):
    """SIGKILL in the middle of a trial: the steps before the checkpoint are not made again."""
    script = Path(__file__).with_name("run_killed_study.py")
    workdir = tmp_path / "study"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def start():
        command = [sys.executable, str(script), str(workdir)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

    process = start()
    checkpoints = workdir / "rosenbrock" / "sgd-seed0" / "checkpoints"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if checkpoints.exists() and any(p.name.isdecimal() for p in checkpoints.iterdir()):
            break
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (checkpoints.parent / "result.json").exists()
    saved = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdecimal())
    before = [
        row["step"] for row in load_results(workdir).trials[0].evaluations if row["step"] <= saved
    ]
    again = start()
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0
    trial = load_results(workdir).trials[0]
    assert trial.status == "done"
    steps = [row["step"] for row in trial.evaluations]
    assert steps == sorted(set(steps))
    assert steps[: len(before)] == before
    assert f"went on from {saved}" in out
