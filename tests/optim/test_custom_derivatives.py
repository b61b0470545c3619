"""Optimizers on nets with their own derivative rules, against the same nets without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex
from jax.interpreters import mlir

import jdl
from jdl import losses
from jdl.core.check import ArgumentError
from jdl.optim import hessian_free, kfac, lbfgs, levenberg_marquardt, natural_gradient, newton
from tests.core.rules import safe_root
from tests.optim.loops import run


@jax.custom_vjp
def tanh(x):
    return jnp.tanh(x)


tanh.defvjp(lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, g: ((1.0 - y * y) * g,))

backward_p = jex.Primitive("kernel_backward")  # as a kernel of cuDNN: no derivative
backward_p.def_abstract_eval(lambda y, g: y)
mlir.register_lowering(
    backward_p, mlir.lower_fun(lambda y, g: (1.0 - y * y) * g, multiple_results=False)
)


@jax.custom_vjp
def fused(x):
    return jnp.tanh(x)


fused.defvjp(lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, g: (backward_p.bind(y, g),))


squares = functools.partial(losses.squared_error, target="y")


def problem(activation, size=12, weight=lambda w: w):
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(size, 3)), "y": rng.normal(size=(size, 2))}
    params = {"w": rng.normal(size=(3, 4)), "v": rng.normal(size=(4, 2))}
    batch, params = jax.tree.map(jnp.asarray, (batch, params))

    def predict(p, batch):
        return activation(batch["x"] @ weight(p["w"])) @ weight(p["v"])

    return jdl.Objective.from_fns(predict, squares, batch), params


OPTIMIZERS = {  # with an activation whose rule each of them can use
    "kfac": (kfac, lambda x: tanh(safe_root(jax.nn.relu(x)))),
    "hessian_free": (hessian_free, tanh),
    "natural_gradient": (natural_gradient, tanh),
    "lbfgs": (lbfgs, fused),  # takes no derivative of it
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_net_with_its_own_rules_trains(name):
    optimizer, activation = OPTIMIZERS[name]
    _, state, values = run(optimizer(), *problem(activation), 4)
    assert values[-1] < 0.95 * values[0]
    if name == "kfac":
        assert min(state.kronecker.refreshes) > 0  # finite at the root's zeros


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_true_rule_trains_as_the_function_itself(name):
    optimizer = OPTIMIZERS[name][0]
    mine, expected = (run(optimizer(), *problem(f), 4)[2] for f in (tanh, jnp.tanh))
    np.testing.assert_allclose(mine, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "optimizer", [kfac, hessian_free, natural_gradient, newton, levenberg_marquardt]
)
def test_optimizers_that_need_a_rules_derivative_name_it_and_what_works(optimizer):
    with pytest.raises(ArgumentError, match=r"that of fused at .*adam, lbfgs, cg"):
        run(optimizer(), *problem(fused), 1)
