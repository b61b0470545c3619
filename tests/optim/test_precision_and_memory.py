"""Products in full precision whatever the platform, and no more memory than is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdl.core.objective import Objective
from jdl.losses import softmax_cross_entropy
from jdl.optim import by_name
from jdl.optim.registry import REGISTRY

SECOND = sorted(name for name in REGISTRY if REGISTRY[name].second_order)
CURVED = [name for name in SECOND if name not in ("lbfgs", "cg")]


def predict(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["v"])
    return hidden @ params["w"]


def problem(inputs, hidden, rows):
    rng = np.random.default_rng(0)
    shapes = {"v": (inputs, hidden), "w": (hidden, 10)}
    params = {k: jnp.asarray(0.1 * rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    batch = {
        "x": jnp.asarray(rng.normal(size=(rows, inputs)), jnp.float32),
        "label": jnp.asarray(rng.integers(10, size=rows)),
    }
    return Objective.from_fns(predict, softmax_cross_entropy, batch), params


def products(jaxpr):
    """Every dot_general, the sub-programs' too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)


def update(optimizer):
    def step(grad, state, params, value, objective):
        return optimizer.update(
            grad,
            state,
            params,
            value=value,
            grad=grad,
            value_fn=objective.value,
            objective=objective,
        )

    return step


@pytest.mark.parametrize("name", CURVED)
def test_curvature_is_in_the_highest_precision(name):
    """What is left at the platform's own are values and gradients: trials, and K-FAC's draws."""
    objective, params = problem(7, 6, 12)
    optimizer = by_name(name)
    value, grad, _ = objective.value_and_grad(params)
    state = optimizer.init(params)
    jaxpr = jax.make_jaxpr(update(optimizer))(grad, state, params, value, objective)
    full = (jax.lax.Precision.HIGHEST,) * 2
    found = list(products(jaxpr.jaxpr))
    own = [e for e in found if e.params["precision"] != full]
    shapes = [tuple(v.aval.shape for v in e.invars) for e in own]
    matrices = [s for s in shapes if all(len(x) == 2 for x in s)]
    gradients = jax.make_jaxpr(jax.grad(objective.value))(params)
    known = {tuple(v.aval.shape for v in e.invars) for e in products(gradients.jaxpr)}
    # With fewer rows, or the operands in the other order, it is the same product.
    known |= {pair[::-1] for pair in known}
    assert len(found) - len(own) >= 3
    assert set(matrices) <= known
    assert not any(a == b for a, b in matrices)  # as a moment's would be


# Gradients' worth of memory: what stays in the state, and what a step needs at most beside it.
GRADIENTS = {"lbfgs": (22, 8), "cg": (2, 4), "hf": (1, 14), "natural_gradient": (1, 5)}


@pytest.mark.parametrize("name", sorted(GRADIENTS))
def test_memory_is_what_is_said(name):
    objective, params = problem(512, 512, 16)
    one = sum(x.nbytes for x in jax.tree.leaves(params))
    optimizer = by_name(name)
    value, grad, _ = objective.value_and_grad(params)
    state = optimizer.init(params)
    program = jax.jit(update(optimizer)).lower(grad, state, params, value, objective).compile()
    memory = program.memory_analysis()
    kept = sum(x.nbytes for x in jax.tree.leaves(state))
    state_size, temporary = GRADIENTS[name]
    assert kept / one == pytest.approx(state_size, rel=1e-3)
    assert 1 < memory.temp_size_in_bytes / one < temporary


@pytest.mark.slow
def test_logistic_regression_ends_at_scikit_learns_optimum(minimize):
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 8))
    labels = np.argmax(x @ rng.normal(size=(8, 3)) + rng.normal(size=(200, 3)), axis=1)
    decay = 1e-2
    theirs = linear_model.LogisticRegression(
        C=1 / (decay * len(x)), fit_intercept=False, tol=1e-10, max_iter=10_000
    ).fit(x, labels)
    batch = {"x": jnp.asarray(x, jnp.float32), "label": jnp.asarray(labels)}

    def f(w):
        loss = softmax_cross_entropy(batch["x"] @ w, batch)
        return jnp.mean(loss) + 0.5 * decay * jnp.sum(jnp.square(w))

    least = float(f(jnp.asarray(theirs.coef_.T, jnp.float32)))
    for name, steps in (("lbfgs", 60), ("cg", 80), ("hf", 30), ("newton", 20)):
        run = minimize(by_name(name), f, jnp.zeros((8, 3)), steps=steps)
        np.testing.assert_allclose(run.values[-1], least, rtol=2e-6, err_msg=name)
        np.testing.assert_allclose(run.params, theirs.coef_.T, atol=5e-3, err_msg=name)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("name", ["lbfgs", "cg", "hf", "newton"])
def test_units_of_parameters_and_values_do_not_hang_or_mislead(name, scale, minimize):
    """f(x / scale) and scale·f(x): down, in bounded work, with an ending that has a name."""
    inner = jnp.array([3.0, -2.0])

    def bowl(x):
        return jnp.sum(jnp.square(x - 1.0) * jnp.array([1.0, 10.0]))

    for f, x in ((lambda x: bowl(x / scale), scale * inner), (lambda x: scale * bowl(x), inner)):
        # Hessian-free's λ is in units of the curvature, and takes its time to come down.
        steps = 70 if name == "hf" else 25
        run = minimize(by_name(name), f, x, steps=steps)
        assert run.values[-1] < run.values[0]
        assert np.all(np.isfinite(run.params))
        assert int(run.diagnostics.evaluations) <= 45 * steps
