import jax.numpy as jnp
import optax
import pytest

from jdl.core.check import ArgumentError
from jdl.optim import diagnostics, lbfgs, result
from jdl.optim.result import ResultCode

UNIFORM = (
    "iterations",
    "evaluations",
    "gradient_equivalents",
    "step_size",
    "last_damping",
    "reduction_ratio",
    "linear_iterations",
    "termination",
)


def test_the_uniform_fields_come_first():
    assert diagnostics.Diagnostics._fields[:8] == UNIFORM


def test_work_is_the_sum_of_counts_times_costs():
    d = diagnostics.init()
    d = diagnostics.advance(d, step_size=1.0, termination=1, values=3, hessian_products=2.5)
    d = diagnostics.advance(d, step_size=1.0, termination=1, gauss_newton_products=3, reused=True)
    costs = diagnostics.COSTS
    expected = (
        3 * costs["values"]
        + 1 * costs["gradients"]
        + 2.5 * costs["hessian_products"]
        + 3 * costs["gauss_newton_products"]
    )
    assert float(d.gradient_equivalents) == pytest.approx(expected)
    assert (int(d.iterations), int(d.evaluations)) == (2, 4)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda o: o,
        lambda o: optax.chain(optax.clip_by_global_norm(1.0), o),
        lambda o: optax.chain(optax.chain(o), optax.scale(0.5)),
        lambda o: optax.masked(o, True),
        lambda o: optax.partition({"all": o}, "all"),
        lambda o: optax.named_chain(("it", o)),
    ],
)
def test_read_finds_it_wherever_optax_nests_it(wrap):
    state = wrap(lbfgs()).init({"w": jnp.zeros(2)})
    found = diagnostics.read(state)
    assert isinstance(found, diagnostics.Diagnostics)


def test_read_says_none_for_first_order():
    assert diagnostics.read(optax.adam(1e-3).init(jnp.zeros(2))) is None


def test_every_code_has_words_and_others_are_refused():
    sentences = {result.words(code) for code in ResultCode}
    assert len(sentences) == len(ResultCode)
    with pytest.raises(ArgumentError, match="code"):
        result.words(99)
