"""Early stopping, averages, the guard against non-finite steps, range test, profile, dead units."""

import json
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdl
from jdl import curvature
from jdl.core import check
from jdl.data import from_arrays
from jdl.models import GAN, MLP
from jdl.optim import registry
from jdl.recipes import gan_pictures
from jdl.train import dead_units, hooks, range_test
from jdl.train.checkpoint import Checkpoints


def data(n=64, batch_size=16, poisoned=()):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 6)).astype(np.float32)
    labels = np.argmax(x[:, :3], axis=1).astype(np.int32)
    x[list(poisoned)] = np.nan
    return from_arrays(x, labels, batch_size=batch_size, epochs=1, shuffle=False)


def make(optimizer="adam", **options):
    if isinstance(optimizer, str):
        optimizer = registry.by_name(optimizer)
    net = MLP(widths=(8,), num_outputs=3)
    return jdl.classifier(net, optimizer, devices=jax.devices()[:1], **options)


def rows(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_early_stopping_ends_training_and_saves(tmp_path):
    stop = hooks.early_stopping(patience=2)
    estimator = make(optax.sgd(0.0), workdir=tmp_path, hooks=[stop])
    estimator.train(data(), max_steps=100, validation=data(), validate_every=5)
    assert estimator.step == 15  # the first validation is the best, two more are no better
    assert [r["step"] for r in rows(tmp_path) if r["split"] == "validation"] == [5, 10, 15]
    assert make(optax.sgd(0.0), workdir=tmp_path).train(data(), max_steps=15).step == 15


def test_the_best_checkpoint_is_kept_and_taken_up_again(tmp_path):
    options = {"workdir": tmp_path, "keep_best": ("loss", "min")}
    estimator = make(optax.sgd(optax.piecewise_constant_schedule(0.3, {20: 1e3})), **options)
    estimator.train(data(), max_steps=30, validation=data(), validate_every=10)
    best = min((r for r in rows(tmp_path) if r["split"] == "validation"), key=lambda r: r["loss"])
    assert best["step"] == 20
    estimator.restore_best(data())
    assert estimator.step == 20
    assert estimator.evaluate(data())["loss"] == pytest.approx(best["loss"], rel=1e-6)


def test_the_average_of_parameters_is_what_the_formula_says():
    plain, averaged = make("sgd"), make("sgd", ema=0.9)
    feed = data()
    plain.initialize(feed)
    expected = jax.tree.map(np.array, plain.params)
    for t in range(1, 8):
        plain.train(feed, steps=1)
        d = min(0.9, (1 + t) / (10 + t))
        expected = jax.tree.map(lambda a, p, d=d: d * a + (1 - d) * p, expected, plain.params)
    averaged.train(data(), steps=7)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, averaged.evaluation_params, expected)
    jax.tree.map(close, averaged.params, plain.params)
    assert averaged.evaluate(data())["loss"] != plain.evaluate(data())["loss"]


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(check.ArgumentError, match=r"`ema` must be a number in \(0.0, 1.0\)"):
        make(ema=decay)


def test_a_step_that_is_not_finite_is_skipped():
    estimator = make("adam", on_nonfinite="skip", log_every=1)
    poisoned = data(poisoned=[20])  # in the second batch
    estimator.train(poisoned, steps=1)
    before = jax.tree.map(np.array, estimator.params)
    estimator.train(poisoned, steps=1)
    jax.tree.map(np.testing.assert_array_equal, estimator.params, before)
    estimator.train(data(), steps=4)
    assert np.isfinite(estimator.evaluate(data())["loss"])
    assert estimator.step == 6


def growing(rate):
    """w ← w (1 − 2 rate): blows up above a rate of 1, the faster the larger."""
    model = jdl.from_fns(lambda key, x: jnp.full((), 2.0), lambda w, x: w * x)

    def loss(outputs, batch):
        return jnp.square(outputs - batch["label"])

    optimizer = registry.by_name("sgd", rate)
    feed = from_arrays(np.ones(8, np.float32), np.zeros(8, np.float32), batch_size=8, epochs=1)
    return feed, lambda **options: jdl.Estimator(
        model, loss, optimizer, devices=jax.devices()[:1], log_every=1, **options
    )


def test_a_run_that_blows_up_rolls_back_and_goes_on_with_a_smaller_step(tmp_path):
    feed, estimator = growing(2.5)  # 2.5 and 1.25 diverge, 0.625 does not
    run = estimator(workdir=tmp_path, on_nonfinite="rollback", save_every=100)
    run.train(feed, max_steps=1)
    run.train(feed, max_steps=400)
    rates = [r["learning_rate"] for r in rows(tmp_path) if r["split"] == "rollback"]
    assert rates == [1.25, 0.625]
    assert run.evaluate(feed)["loss"] < 1e-6
    with pytest.raises(check.TrainingError, match=r"not finite|loss is"):
        estimator().train(feed, steps=400)


def test_no_rollback_halves_the_rate_of_a_schedule(tmp_path):
    feed, estimator = growing(optax.constant_schedule(2.5))
    run = estimator(workdir=tmp_path, on_nonfinite="rollback", save_every=100)
    run.train(feed, max_steps=1)
    with pytest.raises(check.TrainingError, match="by name with a number"):
        run.train(feed, max_steps=400)


def test_data_that_is_not_finite_ends_the_run_after_some_rollbacks(tmp_path):
    poisoned = data(n=64, poisoned=[40])  # in the third batch of every epoch
    run = make("sgd", workdir=tmp_path, on_nonfinite="rollback", save_every=2, log_every=1)
    with pytest.raises(check.TrainingError, match="checkpoint of step 2 is intact"):
        run.train(poisoned, max_steps=8)
    rates = [r["learning_rate"] for r in rows(tmp_path) if r["split"] == "rollback"]
    assert rates == pytest.approx([0.1 / 2**k for k in range(1, 9)], rel=1e-5)


def test_the_range_test_finds_a_rate_and_leaves_the_estimator_alone():
    estimator = make("sgd").train(data(), steps=1)
    before = jax.tree.map(np.array, estimator.params)
    found = range_test.learning_rate_range_test(estimator, data(), low=1e-4, high=1e4, steps=40)
    assert found.rates == sorted(found.rates)
    assert 1e-3 < found.suggestion < 10
    assert found.rates[-1] < 1e4  # it blew up before
    jax.tree.map(np.testing.assert_array_equal, estimator.params, before)
    with pytest.raises(check.ArgumentError, match="inject_hyperparams"):
        range_test.learning_rate_range_test(make(optax.sgd(0.1)), data())
    scheduled = make(registry.by_name("adam", optax.constant_schedule(0.1)))
    with pytest.raises(check.ArgumentError, match="by name with a number"):
        range_test.learning_rate_range_test(scheduled, data())


def test_norms_and_a_trace_are_written(tmp_path):
    estimator = make("sgd", workdir=tmp_path, log_norms=True, log_every=1, profile=(2, 3))
    estimator.train(data(), max_steps=4)
    found = [r for r in rows(tmp_path) if r["split"] == "train"]
    assert all(r["update_norm"] == pytest.approx(0.1 * r["gradient_norm"], rel=1e-4) for r in found)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_histograms_count_every_parameter(tmp_path):
    write = hooks.parameter_histograms(tmp_path / "h.jsonl", bins=7)
    make("sgd", log_every=2, hooks=[write]).train(data(), steps=4)
    lines = [json.loads(x) for x in (tmp_path / "h.jsonl").read_text().splitlines()]
    assert {x["step"] for x in lines} == {2, 4}
    kernel = next(x for x in lines if x["parameter"] == "Dense_0/kernel")
    assert sum(kernel["counts"]) == 6 * 8
    assert len(kernel["edges"]) == 8


class Dying(nn.Module):
    @nn.compact
    def __call__(self, x):
        shift = self.param("shift", lambda key: jnp.array([[0.0, -100.0, 0.0, -100.0]]))
        return nn.Dense(3)(jnp.maximum(nn.relu(nn.Dense(4)(x) + shift), 0.0))


def test_dead_units_are_counted_by_layer():
    model = jdl.from_linen(Dying())
    x = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
    params, state = model.init(jax.random.key(0), x)
    assert [float(s) for s in dead_units.dead_shares(model, params, state, x)] == [0.5, 0.5]
    seen = []
    net = jdl.classifier(Dying(), "sgd", devices=jax.devices()[:1], log_every=1)
    net._hooks = (hooks.dead_units({"image": x}), seen.append)
    net.train(data(), steps=1)
    assert seen[0]["dead/0"] == pytest.approx(0.5)


def test_dead_units_of_a_batch_leave_out_padding_and_scale_images():
    relu = jdl.from_fns(lambda key, x: jnp.ones(()), lambda w, x: jax.nn.relu(w * (2 - 4 * x)))
    image = np.full((2, 2, 2, 1), 255, np.uint8)  # 1 as the model sees it: the unit is dead
    padded = {"image": np.concatenate([image, 0 * image]), "mask": np.array([1.0, 1, 0, 0])}
    loss = lambda outputs, batch: jnp.mean(outputs, axis=(1, 2, 3))  # noqa: E731
    seen = []
    watch = [hooks.dead_units(padded), seen.append]
    run = jdl.Estimator(relu, loss, optax.sgd(0.0), hooks=watch, log_every=1)
    run.train([{"image": image}], steps=1)
    assert seen[0]["dead/0"] == 1.0


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "kfac"])
def test_sharpness_is_logged(optimizer, tmp_path):
    x = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
    batch = {"image": x, "label": np.arange(32) % 2}
    tops = []

    def exact(row):
        run = row.estimator
        values = np.linalg.eigvalsh(curvature.hessian(run.objective(batch), run.params))
        tops.append((row["step"], values[-1]))

    watch = [hooks.sharpness(batch, every=2, tolerance=1e-3), exact]
    net = MLP(widths=(3,), num_outputs=2, activation="tanh")
    options = {"hooks": watch, "log_every": 1, "workdir": tmp_path}
    jdl.classifier(net, optimizer, devices=jax.devices()[:1], **options).train([batch] * 4, steps=4)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row for row in rows if "sharpness" in row}
    assert list(found) == [2, 4]
    for step, top in tops:
        if step in found:
            assert found[step]["sharpness"] == pytest.approx(top, rel=1e-3)
            assert ("preconditioned_sharpness" in found[step]) == (optimizer != "sgd")


def dead(f, *inputs):
    model = jdl.from_fns(lambda key, x: (), lambda _, *inputs: f(*inputs))
    return [float(s) for s in dead_units.dead_shares(model, (), {}, *inputs)]


def test_dead_units_are_counted_inside_of_every_kind_of_call():
    # By unit: alive at the first step, alive at the last, never, never.
    x = np.array([[[1.0, -1, -1, -1], [-1, 2, -1, -1]], [[0, 0, 0, 0], [-1, -1, -1, -1]]])
    x = jnp.asarray(x, jnp.float32)

    def steps(x):
        return jax.lax.scan(lambda h, row: (h + nn.relu(row), ()), x[:, 0], x.swapaxes(0, 1))[0]

    def loop(x):
        body = lambda c: (c[0] + 1, c[1] + nn.relu(x[:, c[0]]))  # noqa: E731
        return jax.lax.while_loop(lambda c: c[0] < 2, body, (0, jnp.zeros((2, 4))))[1]

    def branch(x, at_least=0.0):
        return jax.lax.cond(x.max() > at_least, lambda: nn.relu(x[:, 0]), lambda: nn.relu(x[:, 1]))

    assert dead(steps, x) == [0.5]
    assert dead(loop, x) == [0.5]
    assert dead(jax.checkpoint(lambda x: nn.relu(x[:, 0])), x) == [0.75]
    assert dead(jax.jit(jnp.maximum), x[:, 0], jnp.zeros((2, 4))) == []
    # Of a branch that is not taken no unit is alive: it is 1 for one of the two.
    assert sorted(dead(branch, x)) == [0.75, 1.0]
    assert sorted(dead(lambda x: branch(x, 9.0), x)) == [0.75, 1.0]

    def every_other(x):  # each branch at one of two steps: neither is left out
        def step(i, row):
            return i + 1, jax.lax.cond(i % 2 == 0, nn.relu, lambda row: nn.relu(row) / 2, row)

        return jax.lax.scan(step, 0, x.swapaxes(0, 1))[1]

    assert dead(every_other, x) == [0.75, 0.75]
    # One entry each, in the order of computation.
    assert dead(lambda x: nn.relu(jax.checkpoint(nn.relu)(x[:, 0]) - 1.5), x) == [0.75, 1.0]


def test_units_of_a_recurrent_layer_are_counted_over_all_steps():
    rnn = nn.RNN(nn.SimpleCell(16, activation_fn=nn.relu))
    x = np.random.default_rng(0).normal(size=(1, 3, 2)).astype(np.float32)
    params = jax.jit(rnn.init)(jax.random.key(0), x)
    hidden = np.asarray(jax.jit(rnn.apply)(params, x))
    expected = np.mean(np.all(hidden <= 0, axis=(0, 1)))
    assert 0 < expected < np.mean(hidden <= 0)
    assert dead(lambda x: rnn.apply(params, x), x) == [pytest.approx(expected)]


def test_dead_units_are_compiled_once():
    model = jdl.from_linen(Dying())
    x = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
    params, state = model.init(jax.random.key(0), x)
    first = dead_units.dead_shares(model, params, state, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "make_jaxpr", None)  # nothing is traced again
        assert dead_units.dead_shares(model, params, state, x) == first


def test_early_stopping_counts_what_the_log_holds_and_the_best_is_kept_first(tmp_path):
    def again(steps):
        stop = hooks.early_stopping(patience=2)
        estimator = make(optax.sgd(0.0), workdir=tmp_path, hooks=[stop])
        return estimator.train(data(), max_steps=steps, validation=data(), validate_every=5)

    assert again(10).step == 10  # one validation has been no better
    assert again(100).step == 15  # a second one, in another process
    unmoved = hooks.early_stopping(patience=1, minimum_change=10.0)
    options = {"workdir": tmp_path / "best", "keep_best": ("loss", "min"), "hooks": [unmoved]}
    estimator = make("adam", **options).train(
        data(), max_steps=50, validation=data(), validate_every=5
    )
    assert estimator.step == 10
    assert estimator.restore_best(data()).step == 10  # where it was stopped it was best
    assert set(estimator.evaluate(data(), name="validation")) == {"loss", "accuracy"}


def test_hooks_add_to_the_rows_of_the_log(tmp_path):
    image = np.ones((8, 6), np.float32)
    make(workdir=tmp_path, hooks=[hooks.dead_units({"image": image})]).train(data(), steps=1)
    assert 0.0 <= rows(tmp_path)[0]["dead/0"] <= 1.0


def test_the_first_step_that_is_not_finite_is_named():
    with pytest.raises(check.TrainingError, match="The loss is nan at step 3"):
        make("sgd").train(data(poisoned=[33]), epochs=1)


def test_parameters_that_are_not_finite_are_told_without_a_directory():
    root = jdl.from_fns(lambda key, x: jnp.zeros(3), lambda w, x: jnp.sqrt(x @ jnp.square(w)))
    loss = jdl.losses.squared_error
    examples = from_arrays(np.ones((4, 3), np.float32), np.zeros(4, np.float32), batch_size=4)
    with pytest.raises(check.TrainingError, match="parameters are not finite after step 1"):
        jdl.Estimator(root, loss, "sgd").train(examples, steps=1)


def test_the_range_test_says_that_the_data_is_at_its_end():
    few = list(data())
    with pytest.raises(check.DataError, match="The data ends after"):
        range_test.learning_rate_range_test(make("sgd"), few, steps=10, high=1e-5)


def stopped_at(estimator, **options):
    options = {"max_steps": 100, "validation": data(), "validate_every": 5} | options
    return estimator.train(data(), **options).step


def test_a_hook_with_memory_starts_fresh_in_each_run():
    image = np.ones((8, 6), np.float32)
    shared = [hooks.early_stopping(patience=2), hooks.dead_units({"image": image}, every=2)]
    runs = []
    for _ in range(2):
        seen = []
        runs.append(make(optax.sgd(0.0), hooks=[*shared, seen.append], log_every=1))
        assert stopped_at(runs[-1], max_steps=10) == 10
        measured = [r["step"] for r in seen if "dead/0" in r]
        assert measured == [2, 4, 6, 8, 10]
    assert [stopped_at(run) for run in runs] == [15, 15]  # two more calls are the same two runs


def test_early_stopping_forgets_the_steps_that_a_run_went_back_from(tmp_path):
    stop = hooks.early_stopping(patience=3)
    rate = optax.piecewise_constant_schedule(0.3, {10: 0.0})
    options = {"workdir": tmp_path, "keep_best": ("loss", "min"), "hooks": [stop]}
    estimator = make(optax.sgd(rate), **options)
    assert stopped_at(estimator, max_steps=20) == 20  # the best is step 10, two are no better
    assert estimator.restore_best(data()).step == 10
    assert stopped_at(estimator, validate_every=20) == 60  # and not 20, with those two


@pytest.mark.parametrize("patience", [2, 3])
def test_a_value_that_is_not_finite_is_no_improvement_before_and_after_a_restart(
    patience, tmp_path
):
    def again(workdir, steps):
        stop = hooks.early_stopping(patience=patience)
        estimator = make("sgd", workdir=workdir, hooks=[stop])
        return stopped_at(estimator, max_steps=steps, validation=data(poisoned=[3]))

    assert again(tmp_path / "whole", 100) == 5 * patience
    assert again(tmp_path / "parted", 5) == 5
    assert again(tmp_path / "parted", 100) == 5 * patience


def first_logit(outputs, batch):
    return outputs[:, 0]


def test_a_metric_that_older_rows_lack_counts_from_now_on(tmp_path, caplog):
    before = make(optax.sgd(0.1), workdir=tmp_path, keep_best=("loss", "min"))
    assert stopped_at(before, max_steps=10) == 10
    options = {"metrics": {"first": first_logit}, "keep_best": ("first", "max")}
    stop = hooks.early_stopping("first", mode="max", patience=2)
    after = make(optax.sgd(0.0), workdir=tmp_path, hooks=[stop], **options)
    with pytest.raises(check.UserError, match=r"best/ holds the best step by loss \(min\)"):
        after.restore_best(data())
    assert stopped_at(after, max_steps=100) == 25
    assert "by loss (min), 10; from here on it is that by first (max)" in caplog.text
    assert after.restore_best(data()).step == 15
    assert caplog.text.count("from here on it is that by") == 1


def test_the_best_of_another_mode_is_not_compared_with(tmp_path):
    def once(rate, keep_best):
        estimator = make(optax.sgd(rate), workdir=tmp_path, keep_best=keep_best)
        settings = {"max_steps": 10, "validation": data(), "validate_every": 10, "save": False}
        return estimator.train(data(), **settings)

    once(0.1, ("loss", "min"))
    worse = once(0.01, ("loss", "max"))  # its loss at step 10 is larger
    expected = jax.tree.map(np.array, worse.params)
    assert worse.restore_best(data()).step == 10
    jax.tree.map(np.testing.assert_array_equal, worse.params, expected)
    once(0.05, ("loss", "max"))  # smaller again: the best stays
    kept = make(optax.sgd(0.1), workdir=tmp_path).restore_best(data())
    jax.tree.map(np.testing.assert_array_equal, kept.params, expected)


def test_a_better_step_takes_the_place_of_the_same_step_of_a_course_that_was_left(tmp_path):
    def once(rate):
        estimator = make(optax.sgd(rate), workdir=tmp_path, keep_best=("loss", "min"))
        settings = {"max_steps": 10, "validation": data(), "validate_every": 10, "save": False}
        return estimator.train(data(), **settings)

    once(0.01)
    better = once(0.1)
    expected = jax.tree.map(np.array, better.params)
    jax.tree.map(np.testing.assert_array_equal, better.restore_best(data()).params, expected)


def test_what_can_never_act_is_told_before_training(caplog, tmp_path):
    caplog.set_level(logging.WARNING, "jdl.train")
    waits = hooks.early_stopping()
    make(hooks=[waits, hooks.early_stopping(split="train"), len]).train(data(), steps=1)
    assert "split 'validation'; this training logs none. Give `validation`" in caplog.text
    caplog.clear()
    estimator = make(hooks=[waits], workdir=tmp_path, keep_best=("loss", "min"))
    estimator.train(data(), steps=1, validation=data(), validate_every=1)
    assert not caplog.records
    estimator.train(data(), steps=1)
    assert "keep_best compares validations, of which there are none" in caplog.text
    with pytest.raises(check.ArgumentError, match="`workdir` must be given with keep_best"):
        make(keep_best=("loss", "min"))


def histograms(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_histograms_of_a_run_cut_short_are_those_of_one_that_was_not(tmp_path):
    def run(folder, steps):
        hook = hooks.parameter_histograms(folder / "h.jsonl", every=3, bins=4)
        image = np.ones((8, 6), np.float32)
        dead = hooks.dead_units({"image": image}, every=2)
        estimator = make("sgd", workdir=folder, hooks=[hook, dead], log_every=1)
        estimator.train(data(), max_steps=steps)
        return estimator

    run(tmp_path / "whole", 12)
    parted = tmp_path / "parted"
    run(parted, 4).train(data(), steps=5, save=False)  # to step 9, and then killed
    with (parted / "h.jsonl").open("a") as file:
        file.write('{"step": 9, "par')
    run(parted, 12)
    found, whole = histograms(parted / "h.jsonl"), histograms(tmp_path / "whole" / "h.jsonl")
    assert [(x["step"], x["parameter"]) for x in found] == [
        (x["step"], x["parameter"]) for x in whole
    ]
    assert sorted({x["step"] for x in found}) == [3, 6, 9, 12]
    dead = [[r["step"] for r in rows(d) if "dead/0" in r] for d in (parted, tmp_path / "whole")]
    assert dead == [[2, 4, 6, 8, 10, 12]] * 2


def test_the_best_stays_where_another_of_its_step_cannot_be_written(tmp_path, monkeypatch):
    options = {"workdir": tmp_path, "keep_best": ("loss", "min")}
    first = make("adam", **options)
    first.train(data(), steps=2, validation=data(), validate_every=2)
    best = tmp_path / "best"
    before = {p.relative_to(best): p.read_bytes() for p in best.rglob("*") if p.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    with pytest.raises(check.TrainingError, match="No space left"):
        Checkpoints(best, 1).replace(2, first.state, {})
    assert {p.relative_to(best): p.read_bytes() for p in best.rglob("*") if p.is_file()} == before


def test_a_hook_may_end_a_training_that_has_just_rolled_back(tmp_path):
    def stop(row):
        if row["split"] == "rollback":
            raise hooks.StopTraining("enough")

    feed, estimator = growing(2.5)
    run = estimator(workdir=tmp_path, on_nonfinite="rollback", hooks=[stop])
    run.train(feed, max_steps=1).train(feed, max_steps=400)
    assert run.step == 1


def test_a_training_to_the_end_of_its_data_ends_there_after_a_way_back_too(tmp_path):
    x = np.zeros((4, 6), np.float32)
    batches = [{"image": x + i, "label": np.arange(4) % 3} for i in (0, 1, np.nan, 3)]
    passes = []

    class Data:
        """One pass over four batches, of which the third is spoilt the first time."""

        epochs = 1

        def __iter__(self):
            passes.append(True)
            assert len(passes) < 9
            return iter(batches if len(passes) == 1 else [*batches[:2], *batches[3:]])

        def repeat(self):
            raise AssertionError("repeated")

        once = shard = None

    run = make("adam", workdir=tmp_path, on_nonfinite="rollback", log_every=1, save_every=1)
    run.train(Data())
    assert 3 <= run.step <= 8


def test_histograms_go_back_with_the_run(tmp_path, caplog):
    feed, estimator = growing(2.5)
    write = hooks.parameter_histograms(tmp_path / "h.jsonl", bins=3)
    run = estimator(workdir=tmp_path, on_nonfinite="rollback", save_every=100, hooks=[write])
    run.train(feed, max_steps=1)
    run.train(feed, max_steps=120)
    steps = [line["step"] for line in histograms(tmp_path / "h.jsonl")]
    assert steps == [r["step"] for r in rows(tmp_path) if r["split"] == "train"]
    assert steps == list(range(1, 121))
    options = {"keep_best": ("loss", "max"), "hooks": [write], "log_every": 2}
    again = make("adam", workdir=tmp_path / "best", **options)
    again.train(data(), steps=12, validation=data(), validate_every=4)
    assert "the histograms of another run now lie in" in caplog.text
    assert [x["step"] for x in histograms(tmp_path / "h-1.jsonl")] == list(range(1, 121))
    again.restore_best(data()).train(data(), steps=3)
    lines = histograms(tmp_path / "h.jsonl")
    assert [x["step"] for x in lines if x["parameter"] == "Dense_0/bias"] == [2, 4, 6, 7]


def test_histograms_leave_out_what_is_not_finite(tmp_path):
    write = hooks.parameter_histograms(tmp_path / "h.jsonl", bins=3)
    with pytest.raises(check.TrainingError, match="The loss is nan at step 3"):
        make("sgd", hooks=[write], log_every=1).train(data(poisoned=[33]), epochs=1)


def test_samples_of_a_gan_are_drawn_at_the_same_steps_after_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(gan_pictures, "draw_from", lambda *_, **__: np.zeros((12, 2, 2, 1)))

    def drawn(folder, *stops):
        for steps in stops:
            hook = gan_pictures.samples_over_time(GAN.of_shape((28, 28, 1)), folder)
            make("sgd", workdir=folder, hooks=[hook], log_every=1).train(data(), max_steps=steps)
        return sorted(int(path.stem) for path in (folder / "samples").iterdir())

    assert drawn(tmp_path / "parted", 6, 20) == drawn(tmp_path / "whole", 20) == [1, 2, 4, 8, 16]


def test_an_evaluation_beside_a_training_leaves_its_histograms_alone(tmp_path):
    write = hooks.parameter_histograms(tmp_path / "h.jsonl")
    make("sgd", workdir=tmp_path, hooks=[write], log_every=1).train(data(), steps=3)
    before = (tmp_path / "h.jsonl").read_text()
    make("sgd", workdir=tmp_path, hooks=[write]).evaluate(data())
    assert (tmp_path / "h.jsonl").read_text() == before
