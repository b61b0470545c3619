"""Schedules that end with the budget, and optimizers with settings on the command line."""

import itertools
import json
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdl.cli.main import main
from jdl.compare import Budget, Entry, Study, load_results, named, tables, trial
from jdl.compare.optimizers import listed
from jdl.compare.results import command
from jdl.compare.study import CLOCKS
from jdl.core.check import ArgumentError
from jdl.optim import by_name, diagnostics, schedules
from jdl.optim.registry import REGISTRY
from jdl.train.ema import weights_of


def test_the_schedules_are_optax_s():
    x = np.linspace(0.0, 1.0, 41)
    ours = {
        key: [schedules.factor(key, 0.1, float(t)) for t in x]
        for key in ("cosine", "linear", "wsd")
    }
    cosine = optax.warmup_cosine_decay_schedule(0.0, 1.0, 100, 1000)
    linear = optax.join_schedules(
        [optax.linear_schedule(0.0, 1.0, 100), optax.linear_schedule(1.0, 0.0, 900)], [100]
    )
    wsd = optax.join_schedules(
        [
            optax.linear_schedule(0.0, 1.0, 100),
            optax.constant_schedule(1.0),
            optax.linear_schedule(1.0, 0.0, 200),
        ],
        [100, 800],
    )
    for key, theirs in (("cosine", cosine), ("linear", linear), ("wsd", wsd)):
        np.testing.assert_allclose(ours[key], [float(theirs(1000 * t)) for t in x], atol=1e-6)


START = {"x": jnp.array([2.0, -1.0])}


def f(params):
    return 0.5 * jnp.sum(jnp.square(params["x"] - 1.0) * jnp.array([1.0, 3.0]))


def stepped(optimizer, steps):
    """Parameters and state after some steps on a quadratic."""

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(f)(params)
        given = {"value": value, "grad": grad, "value_fn": f}
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grad, state, params, **given)
            return optax.apply_updates(params, updates), state

    params, state = START, optimizer.init(START)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def ours(name, by, by_rate=True, **options):
    """The optimizer with that factor."""
    optimizer = schedules.scheduled(by_name(name, **options), by_rate=by_rate)

    def init(params):
        return optax.tree.set(optimizer.init(params), schedule_factor=jnp.float32(by))

    return optax.GradientTransformationExtraArgs(init, optimizer.update)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "schedule_free_adamw", "muon", "hf"])
def test_the_factor_is_one_on_the_rate(name):
    half = by_name(name, 0.5 * REGISTRY[name].learning_rate)
    if name == "muon":  # which has a second rate, of the same schedule
        half = by_name(name, 0.01, adam_learning_rate=0.0015)
    (x, state), (params, expected) = stepped(ours(name, 0.5), 4), stepped(half, 4)
    np.testing.assert_allclose(x["x"], params["x"], rtol=1e-6)
    assert (diagnostics.read(state) is None) == (diagnostics.read(expected) is None)
    weights = weights_of(state, x)["x"], weights_of(expected, params)["x"]
    np.testing.assert_allclose(*weights, rtol=1e-6)


def test_the_step_of_a_line_search_is_scaled():
    whole = stepped(by_name("lbfgs"), 1)[0]["x"] - START["x"]
    found = stepped(ours("lbfgs", 0.5, by_rate=False), 1)[0]["x"] - START["x"]
    np.testing.assert_allclose(found, 0.5 * whole, rtol=1e-6)


def test_the_ratio_of_a_scaled_step_is_that_of_the_step_taken():
    """On a quadratic the model of hf is exact but for damping: ρ = 1 whatever the factor."""
    _, state = stepped(ours("hf", 0.25, damping=1e-6), 1)
    assert float(diagnostics.read(state).reduction_ratio) == pytest.approx(1.0, abs=1e-3)


def noting(rates, schedule, warmup=0.0, duration=None, clock=None):
    """SGD on a constant gradient that notes the size of each of its steps, as scaled."""

    def note(x):
        rates.append(float(x))
        if clock is not None:
            clock[0] += duration
        return x

    def make():
        inner = optax.sgd(1.0)

        def update(grads, state, params=None, **_):
            leaf = jax.tree.leaves(params)[0].ravel()[0]
            seen = jax.pure_callback(note, jax.ShapeDtypeStruct((), leaf.dtype), leaf)
            grads = jax.tree.map(lambda x: jnp.full_like(x, 0.001) + 0.0 * seen, grads)
            return inner.update(grads, state, params)

        return optax.GradientTransformation(inner.init, update)

    return Entry("noting", make, 9, schedule=schedule, warmup=warmup)


def factors(params):
    return -np.diff(params) / 0.001


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", lambda t: 1.0 - t),
        ("cosine", lambda t: 0.5 * (1.0 + np.cos(np.pi * t))),
        ("wsd", lambda t: np.minimum(1.0, 5.0 * (1.0 - t))),
    ],
)
@pytest.mark.parametrize("kind", ["steps", "epochs"])
def test_a_budget_in_steps_has_the_schedule_s_value_at_the_middle_of_each(
    schedule, expected, kind, problem, tmp_path
):
    seen = []
    amount = 20 if kind == "steps" else 4  # nine of 45 examples a step: 5 steps an epoch
    Study(
        problem,
        [noting(seen, schedule)],
        budget=Budget(amount, kind),
        evaluations=3,
        workdir=tmp_path,
    ).run()
    assert len(seen) == 20
    middles = (np.arange(19) + 0.5) / 20
    np.testing.assert_allclose(factors(seen), expected(middles), atol=2e-3)


def test_a_budget_in_seconds_has_the_schedule_s_value_at_its_end(problem, tmp_path, monkeypatch):
    clock, seen = [0.0], []
    monkeypatch.setitem(CLOCKS, "wall", lambda: clock[0])
    entry = noting(seen, "linear", 0.1, duration=0.1, clock=clock)
    results = Study(problem, [entry], budget=Budget(10.0), evaluations=4, workdir=tmp_path).run()
    (found,) = results.trials
    assert found.status == "done"
    assert found.evaluations[-1]["step"] == len(seen) == 99  # the clock's last half percent is kept
    shares = (np.arange(98) + 0.5) / 100
    line = np.where(shares < 0.1, shares / 0.1, (1.0 - shares) / 0.9)
    np.testing.assert_allclose(factors(seen), line, atol=2e-3)


def test_a_shorter_end_has_a_schedule_of_its_own(problem, tmp_path):
    seen = []
    Study(
        problem,
        [noting(seen, "linear")],
        budget=Budget(20, "steps"),
        ends=(0.5,),
        evaluations=1,
        workdir=tmp_path,
    ).run()
    np.testing.assert_allclose(factors(seen[:10]), 1.0 - (np.arange(9) + 0.5) / 10, atol=2e-3)
    np.testing.assert_allclose(factors(seen[10:]), 1.0 - (np.arange(19) + 0.5) / 20, atol=2e-3)


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_trial_with_a_schedule_that_was_killed_ends_as_if_it_was_not(
    problem, tmp_path, monkeypatch
):
    entry = named("adamw", batch_size=9, schedule="cosine", warmup=0.1, learning_rate=0.05)

    def run(workdir):
        return Study(
            problem, [entry], budget=Budget(130, "steps"), evaluations=6, workdir=workdir
        ).run()

    whole = run(tmp_path / "whole").trials[0]
    monkeypatch.setattr(trial, "SAVE_SECONDS", 0.0)
    made = itertools.count()
    train = trial._Running._train

    def dies(self, **limit):
        train(self, **limit)
        if next(made) == 40:
            raise Killed

    monkeypatch.setattr(trial._Running, "_train", dies)
    with pytest.raises(Killed):
        run(tmp_path / "cut")
    monkeypatch.undo()
    again = run(tmp_path / "cut").trials[0]
    own = json.loads((tmp_path / "cut" / "blobs" / "adamw-seed0" / "result.json").read_text())
    assert own["initial_params"] == ""  # it was resumed
    losses = [[row["train_loss"] for row in x.evaluations] for x in (whole, again)]
    assert losses[0] == losses[1]


def test_the_schedule_is_part_of_a_trial_and_of_the_settings(problem, tmp_path):
    def kinds(**options):
        events = []
        study = Study(
            problem,
            [named("sgd", batch_size=9, **options)],
            budget=Budget(4, "steps"),
            evaluations=1,
            workdir=tmp_path,
            on_event=events.append,
        )
        told = dict(tables.settings(study.run()))["sgd"]
        return {event.kind for event in events} & {"begin", "skip"}, told

    assert kinds()[0] == {"begin"}
    assert "schedule = constant" in kinds()[1]
    found, told = kinds(schedule="wsd", warmup=0.25)
    assert found == {"begin"}
    assert "schedule = wsd, warmup = 0.25" in told
    assert kinds(schedule="wsd", warmup=0.25)[0] == {"skip"}
    assert kinds(schedule="wsd", warmup=0.5)[0] == {"begin"}


def test_warm_up_is_tuned_where_there_is_a_schedule():
    assert [x.parameter for x in named("sgd", schedule="linear").space] == [
        "learning_rate",
        "warmup",
    ]
    assert "warmup" not in [x.parameter for x in named("sgd").space]
    assert named("sgd", schedule="linear").tuned({"warmup": 0.1}).warmup == 0.1
    with pytest.raises(ArgumentError, match="`schedule, warmup` must be left out"):
        named("adam", learning_rate=optax.cosine_decay_schedule(0.1, 5), schedule="cosine")
    with pytest.raises(ArgumentError, match="`schedule` must be one of"):
        named("adam", schedule="cosin")
    with pytest.raises(ArgumentError, match="`warmup` must be"):
        named("adam", warmup=0.9)


def test_optimizers_are_written_as_calls():
    first, second, third, fourth = listed(
        "adamw(learning_rate=3e-3, schedule='cosine'), adamw, hessian-free(batch_size='full'), "
        "schedule_free_adamw",
        schedule="wsd",
        warmup=0.1,
    )
    assert first.name == "adamw-learning_rate=0.003-schedule=cosine"
    assert (first.schedule, first.warmup) == ("cosine", 0.1)
    assert first.settings()["learning_rate"] == 3e-3
    assert (second.name, second.schedule) == ("adamw", "wsd")
    assert (third.name, third.batch_size) == ("hf-batch_size=full", "full")
    assert fourth.schedule == "constant"
    assert second.call == 'adamw(schedule="wsd", warmup=0.1)'
    assert named("adam", mu_dtype=jnp.bfloat16).call == ""  # which no list can say
    assert named("adamw", mask=np.ones(2)).call == ""
    assert listed("kfac(label='my-own-k', damping=0.5)")[0].name == "my-own-k"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adam(3e-3)", "`--optimizers` must be names"),
        ("adam(learning_rate=print)", "`--optimizers` must be names"),
        ("adam(learning_rate=3e-3", "`--optimizers` must be names"),
        ("2, adam", "`--optimizers` must be names"),
        (",", "`--optimizers` must be names"),
        ("adamm(b1=0.5)", "Did you mean 'adam'"),
        ("adam(b3=0.5)", "must be one of"),
        ("adam(learning_rate='fast')", "`--optimizers learning_rate` must be a number, got 'fast'"),
        ("kfac(damping=1, l2reg=1)", "`--optimizers of kfac` must be one of .* 'l2_reg'"),
        ("kfac(weight_decay=0.1)", "`weight_decay` must be left out: kfac .* `--option l2_reg"),
        ("adam(schedule='cosine', decay_to=2.0)", "`decay_to` must be a number in"),
        ("__import__('os').system('true')", "`--optimizers` must be names"),
    ],
)
def test_mistakes_in_the_list_of_optimizers_are_one_error(text, message):
    with pytest.raises(ArgumentError, match=message):
        listed(text)


def test_a_study_of_optimizers_with_options_from_a_file(tmp_path, capsys):
    text = 'problem = "quadratic"\nsteps = 4\n'
    text += "optimizers = \"sgd(weight_decay=0.1, clip=1), sgd(schedule='linear', decay_to=0.5)\"\n"
    (tmp_path / "study.toml").write_text(text)
    arguments = ["--config", str(tmp_path / "study.toml"), "--steps", "3"]
    assert main(["compare", *arguments, "--workdir", str(tmp_path / "study")]) == 0
    results = load_results(tmp_path / "study")
    first, second = (t.settings["optimizer"]["settings"] for t in results.trials)
    assert (first["weight_decay"], first["clip"]) == (0.1, 1.0)
    assert (second["schedule"], second["decay_to"]) == ("linear", 0.5)
    assert results.budget.amount == 3
    shown = capsys.readouterr().out
    assert "sgd-weight_decay=0.1-clip=1" in shown
    assert "sgd-schedule=linear-decay_to=0.5" in shown


@pytest.mark.slow
def test_a_row_is_run_again_by_its_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--problem", "quadratic", "--steps", "6", "--trials", "3", "--ends", "1/2,1"]
    options += ["--optimizers", "sgd,adamw(schedule='cosine')", "--workdir", "first"]
    assert main(["compare", *options]) == 0
    first = load_results("first")
    line = command(first, "quadratic", "adamw-schedule=cosine-tuned")
    assert "adamw(learning_rate=" in line
    assert "b2=" in line
    assert main(shlex.split(line)[1:]) == 0
    again = load_results("runs/again")
    assert again.ends == (0.5, 1.0)
    (one,) = first.of("quadratic", "adamw-schedule=cosine-tuned")
    (other,) = again.of("quadratic", "adamw-schedule=cosine-tuned")
    losses = [[row["train_loss"] for row in x.evaluations] for x in (one, other)]
    assert losses[0] == losses[1]
    assert command(first, "quadratic", "sgd").startswith(
        "jdl compare --problem quadratic --optimizers 'sgd(label=\"sgd\")' --seeds 1 --steps 6"
    )
