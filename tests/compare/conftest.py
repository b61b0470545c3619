"""A problem that takes milliseconds, and studies planted on disk."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tomli_w

from jdl import from_fns, losses
from jdl.compare import Entry, Problem, Target
from jdl.compare.machine import describe
from jdl.compare.store import FORMAT
from jdl.data import from_arrays


@pytest.fixture
def problem():
    """Three Gaussian blobs, separable by a linear map."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 45).astype(np.int32)
    points = (rng.normal(size=(45, 2)) + 4 * np.eye(3)[labels][:, :2]).astype(np.float32)

    def init(key, x):
        return {"w": 0.1 * jax.random.normal(key, (2, 3)), "b": jnp.zeros(3)}

    def data(batch_size, seed, epochs):
        return from_arrays(points, labels, batch_size=batch_size, seed=seed, epochs=epochs)

    return Problem(
        name="blobs",
        model=lambda: from_fns(init, lambda p, x: x @ p["w"] + p["b"][None, :]),
        loss=losses.softmax_cross_entropy,
        train=data,
        test=data,
        size=45,
        target=Target("test_accuracy", "at least", 0.7),
    )


@pytest.fixture
def plant(tmp_path):
    """Writes a study of these rows: {(optimizer, seed): [(seconds, loss, metric), …]}."""

    def planted(
        rows,
        *,
        target=("train_loss", "at most", 0.1),
        statuses=None,
        steps=None,
        words="",
        metric="test_accuracy",
        directions=None,
        kind="seconds",
        problems=("planted",),
    ):
        statuses, steps = statuses or {}, steps or {}
        optimizers = list(dict.fromkeys(name for name, _ in rows))
        seeds = sorted({seed for _, seed in rows})
        study = {
            "format": FORMAT,
            "budget": {"amount": 10.0, "kind": kind},
            "evaluations": 3,
            "seeds": seeds,
            "problems": [
                {
                    "name": problem,
                    "examples": 10,
                    "target": dict(zip(("metric", "goal", "threshold"), target, strict=True)),
                    "directions": directions or {},
                    "about": {"note": words},
                }
                for problem in problems
            ],
            "optimizers": [{"name": name, "settings": {"batch_size": 5}} for name in optimizers],
            "machine": describe(),
        }
        (tmp_path / "study.toml").write_text(tomli_w.dumps(study))
        for problem, ((name, seed), points) in itertools.product(problems, rows.items()):
            directory = tmp_path / problem / f"{name}-seed{seed}"
            directory.mkdir(parents=True)
            lines = [
                {
                    "split": "evaluate",
                    "step": 10 * i,
                    "seconds": seconds,
                    "epoch": 5.0 * i,
                    "work": 2.0 * seconds,
                    "train_loss": loss,
                    metric: value,
                }
                for i, (seconds, loss, value) in enumerate(points)
            ] + steps.get(name, [])
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (directory / "metrics.jsonl").write_text(text)
            status = statuses.get((name, seed), "done")
            result = {"status": status, "words": "" if status == "done" else words or status}
            (directory / "result.json").write_text(json.dumps(result))
        return tmp_path

    return planted


def frozen(name="frozen", batch_size=9):
    """An optimizer that stays where it is."""
    import optax

    return Entry(name, lambda: optax.sgd(0.0), batch_size, options={"learning_rate": 0.0})
