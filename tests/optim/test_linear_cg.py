import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

from jdl.optim import linear_cg as cg
from jdl.optim.linear_cg import linear_cg


def system(n=30, condition=100.0, seed=0):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    a = (q * np.geomspace(1.0, condition, n)) @ q.T
    return a.astype(np.float32), rng.normal(size=n).astype(np.float32)


def as_tree(x):
    return {"a": x[:12].reshape(3, 4), "b": (x[12:],)}


def as_vector(t):
    return jnp.concatenate([t["a"].reshape(-1), t["b"][0]])


def tree_product(a):
    return lambda v: as_tree(jnp.asarray(a) @ as_vector(v))


@pytest.mark.parametrize("warm", [False, True])
def test_solves_over_pytrees(warm):
    a, b = system()
    x0 = as_tree(jnp.asarray(0.1 * b)) if warm else None
    found = jax.jit(
        lambda: linear_cg(tree_product(a), as_tree(jnp.asarray(b)), x0, tolerance=1e-5)
    )()
    np.testing.assert_allclose(as_vector(found.x), np.linalg.solve(a, b), atol=1e-4)
    assert int(found.reason) == cg.CONVERGED
    assert int(found.products) == int(found.iterations) + warm  # one product an iteration
    x = np.asarray(as_vector(found.x), float)
    assert float(found.model) == pytest.approx(0.5 * x @ a @ x - b @ x, rel=1e-4)


def test_takes_as_many_iterations_as_scipy():
    a, b = (x.astype(np.float64) for x in system())
    calls = []
    scipy.sparse.linalg.cg(a, b, rtol=1e-6, callback=calls.append)
    with jax.enable_x64(True):
        found = linear_cg(lambda v: jnp.asarray(a) @ v, jnp.asarray(b), tolerance=1e-6)
        assert abs(int(found.iterations) - len(calls)) <= 1


def test_k_eigenvalues_take_k_iterations():
    diagonal = jnp.asarray(np.repeat([1.0, 5.0, 20.0], 10), jnp.float32)
    found = linear_cg(lambda v: diagonal * v, jnp.ones(30), tolerance=1e-4)
    assert int(found.iterations) == 3


def test_an_exact_preconditioner_takes_one_iteration():
    diagonal = jnp.asarray(np.geomspace(1.0, 1e4, 30), jnp.float32)
    found = linear_cg(
        lambda v: diagonal * v, jnp.ones(30), preconditioner=lambda r: r / diagonal, tolerance=1e-4
    )
    assert int(found.iterations) == 1


def test_progress_stop_ends_earlier_and_near_the_minimum():
    a, b = system(n=200, condition=1e4)
    product = lambda v: jnp.asarray(a) @ v  # noqa: E731
    full = linear_cg(product, jnp.asarray(b), tolerance=1e-4, max_iterations=600)
    short = linear_cg(product, jnp.asarray(b), progress=5e-4, max_iterations=600)
    assert int(short.reason) == cg.PROGRESS
    assert int(short.iterations) < 0.8 * int(full.iterations)
    assert float(short.model) < 0.9 * float(full.model) < 0


def test_kept_iterates_are_spaced_geometrically_and_end_with_the_last():
    a, b = system(n=60, condition=1e3)
    found = linear_cg(
        lambda v: jnp.asarray(a) @ v, jnp.asarray(b), max_iterations=40, num_kept=32, spacing=1.5
    )
    count = int(found.kept_count)
    assert count == len([1, 2, 3, 5, 8, 12, 18, 27, 40])
    newest = (count - 1) % 32
    np.testing.assert_array_equal(found.kept[newest], found.x)
    models = np.asarray(found.kept_model)[:count]
    assert np.all(np.diff(models) < 0)
    x = np.asarray(found.kept[4], float)
    assert models[4] == pytest.approx(0.5 * x @ a @ x - b @ x, rel=1e-3)


def test_the_ring_of_kept_iterates_forgets_the_oldest():
    a, b = system(n=60, condition=1e3)
    found = linear_cg(
        lambda v: jnp.asarray(a) @ v, jnp.asarray(b), max_iterations=40, num_kept=3, spacing=1.5
    )
    assert int(found.kept_count) == 9
    assert float(found.kept_model[8 % 3]) == float(found.model)
    assert np.isfinite(found.kept_model).all()


@pytest.mark.parametrize("radius", [1e-2, 0.3, 100.0])
def test_steihaug_stays_in_the_region_and_solves_inside_it(radius):
    a, b = system()
    found = linear_cg(
        lambda v: jnp.asarray(a) @ v, jnp.asarray(b), radius=jnp.asarray(radius), tolerance=1e-5
    )
    exact = np.linalg.norm(np.linalg.solve(a, b))
    if exact > radius:
        assert int(found.reason) == cg.BOUNDARY
        assert float(jnp.linalg.norm(found.x)) == pytest.approx(radius, rel=1e-4)
    else:
        assert int(found.reason) == cg.CONVERGED


def test_the_region_is_measured_in_the_preconditioner():
    a, b = system()
    m = jnp.asarray(np.diag(a))
    found = linear_cg(
        lambda v: jnp.asarray(a) @ v,
        jnp.asarray(b),
        radius=jnp.asarray(0.5),
        preconditioner=lambda r: r / m,
    )
    assert float(jnp.sqrt(found.x @ (m * found.x))) == pytest.approx(0.5, rel=1e-4)


def test_negative_curvature_is_followed_to_the_boundary():
    diagonal = jnp.array([3.0, 1.0, -1.0])
    found = linear_cg(lambda v: diagonal * v, jnp.ones(3), radius=jnp.asarray(10.0))
    assert int(found.reason) == cg.CURVATURE
    assert float(jnp.linalg.norm(found.x)) == pytest.approx(10.0, rel=1e-4)
    assert float(found.model) < 0


def test_without_a_region_negative_curvature_ends_the_loop():
    diagonal = jnp.array([3.0, 1.0, -1.0])
    b = jnp.array([1.0, 1.0, 0.1])
    found = linear_cg(lambda v: diagonal * v, b)
    assert int(found.reason) == cg.CURVATURE
    assert float(found.x @ b) > 0
    first = linear_cg(lambda v: -v, b)
    np.testing.assert_array_equal(first.x, b)  # b itself is all that is known


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_products_that_are_not_finite_end_the_loop(bad):
    found = linear_cg(lambda v: bad * v, jnp.ones(3), max_iterations=50)
    assert int(found.iterations) <= 1
    assert int(found.reason) == cg.BROKEN
    assert np.isfinite(found.x).all()


def test_a_zero_right_hand_side_or_inactivity_needs_no_product():
    for b, active in ((jnp.zeros(3), True), (jnp.ones(3), False), (jnp.full(3, jnp.nan), True)):
        found = linear_cg(lambda v: v, b, active=active)
        assert int(found.products) == 0
        np.testing.assert_array_equal(found.x, jnp.zeros(3))


def test_one_place_in_the_program_makes_products():
    b = jnp.ones(3)
    text = str(jax.make_jaxpr(lambda: linear_cg(jnp.sin, b, 0.1 * b))())
    assert text.count(" sin ") == 1
