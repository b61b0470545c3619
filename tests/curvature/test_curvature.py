"""Each instrument against dense linear algebra on a small net, and against ARPACK."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

import jdl
from jdl import curvature, losses
from jdl.core.check import ArgumentError, DataError
from jdl.curvature.dense import _of_objective

rng = np.random.default_rng(0)
ROWS = 96
IMAGES = rng.normal(size=(ROWS, 6)).astype(np.float32)
LABELS = rng.integers(0, 4, ROWS).astype(np.int32)


def predict(params, batch):
    hidden = jnp.tanh(batch["image"] @ params["w1"] + params["b1"][None])
    return hidden @ params["w2"]


def cross_entropy(params, images, labels):
    """The mean loss, written anew."""
    logits = predict(params, {"image": images})
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    return -jnp.mean(picked)


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(1).normal
    shapes = {"w1": (6, 8), "b1": (8,), "w2": (8, 4)}
    return {k: jnp.asarray(draw(size=s), jnp.float32) for k, s in shapes.items()}


def objective(batch):
    return jdl.Objective.from_fns(predict, losses.softmax_cross_entropy, batch, train=False)


@pytest.fixture(scope="module")
def landscape(params):
    cuts = (slice(0, 32), slice(32, 64), slice(64, 96))
    batches = [{"image": IMAGES[c], "label": LABELS[c]} for c in cuts]
    return curvature.Landscape(objective, batches, params)


@pytest.fixture(scope="module")
def dense(params):
    """The whole data set's Hessian by jax.hessian, in double precision of its spectrum."""
    flat, unravel = ravel_pytree(params)
    f = lambda x: cross_entropy(unravel(x), jnp.asarray(IMAGES), jnp.asarray(LABELS))  # noqa: E731
    return np.asarray(jax.jit(jax.hessian(f))(flat), np.float64)


@pytest.fixture(scope="module")
def spectrum(dense):
    return np.linalg.eigvalsh(dense)[::-1]


def test_value_gradient_and_products_average_the_data_set(landscape, params, dense):
    whole = lambda p: cross_entropy(p, jnp.asarray(IMAGES), jnp.asarray(LABELS))  # noqa: E731
    value, grad = jax.value_and_grad(whole)(params)
    assert landscape.value() == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(landscape.gradient(), ravel_pytree(grad)[0], atol=1e-6)
    v = np.random.default_rng(2).normal(size=landscape.size).astype(np.float32)
    np.testing.assert_allclose(landscape.product("hessian", v), dense @ v, atol=1e-4)
    assert landscape.examples() == (3, 96)


def test_averages_keep_double_precision():
    with jax.enable_x64(True):
        land = curvature.Landscape(
            lambda b: jdl.Objective.from_fns(
                lambda w, batch: batch["x"] @ w, lambda out, _: out + 0.5 * out**2, b
            ),
            [{"x": np.full((3, 1), x)} for x in (1.0, 1.0 + 1e-9)],
            jnp.ones(1, jnp.float64),
        )
        assert land.product("hessian", np.ones(1)).dtype == np.float64
        assert land.gradient()[0] - 2.0 == pytest.approx(1.5e-9, rel=1e-4)


def test_padding_does_not_change_an_average(params, landscape):
    padded = [
        {"image": IMAGES[:64], "label": LABELS[:64], "mask": np.ones(64, np.float32)},
        {
            "image": np.concatenate([IMAGES[64:], 9 * IMAGES[:32]]),
            "label": np.concatenate([LABELS[64:], LABELS[:32]]),
            "mask": np.repeat(np.float32([1, 0]), 32),
        },
    ]
    other = curvature.Landscape(objective, padded, params)
    v = np.ones(landscape.size, np.float32)
    for kind in ("hessian", "gauss_newton", "empirical_fisher"):
        np.testing.assert_allclose(
            other.product(kind, v), landscape.product(kind, v), rtol=1e-3, atol=1e-5
        )


def test_gauss_newton_and_fisher_products_against_jacobians(landscape, params):
    outputs = lambda p: predict(p, {"image": jnp.asarray(IMAGES)})  # noqa: E731
    jacobian = curvature.jacobian(outputs, params, chunk_size=7).astype(np.float64)
    flat, unravel = ravel_pytree(params)
    reference = jax.jacrev(lambda x: outputs(unravel(x)).ravel())(flat)
    np.testing.assert_allclose(jacobian, reference, atol=1e-5)
    p = np.asarray(jax.nn.softmax(outputs(params)), np.float64)
    by_row = jacobian.reshape(ROWS, 4, -1)
    weights = np.einsum("bi,ij->bij", p, np.eye(4)) - np.einsum("bi,bj->bij", p, p)
    gauss_newton = np.einsum("bin,bij,bjm->nm", by_row, weights, by_row) / ROWS
    gradients = np.einsum("bi,bin->bn", p - np.eye(4)[LABELS], by_row)
    v = np.random.default_rng(3).normal(size=landscape.size).astype(np.float32)
    np.testing.assert_allclose(landscape.product("gauss_newton", v), gauss_newton @ v, atol=1e-4)
    fisher = gradients.T @ gradients / ROWS
    np.testing.assert_allclose(landscape.product("empirical_fisher", v), fisher @ v, atol=1e-4)


def test_exact_hessians_in_chunks(landscape, params, dense):
    np.testing.assert_allclose(curvature.hessian(landscape, chunk_size=9), dense, atol=1e-5)
    f = lambda p: cross_entropy(p, jnp.asarray(IMAGES), jnp.asarray(LABELS))  # noqa: E731
    np.testing.assert_allclose(curvature.hessian(f, params, chunk_size=200), dense, atol=1e-5)
    wide = curvature.jacobian(lambda p: ravel_pytree(p)[0][:3] ** 2, params)
    assert wide.shape == (3, landscape.size)
    with pytest.raises(ArgumentError, match="top_eigenpairs"):
        curvature.hessian(f, params, max_parameters=10)


def test_an_objective_s_hessian_is_compiled_once_and_a_function_s_closure_is_not_frozen(params):
    batch = {"image": IMAGES[:16], "label": LABELS[:16]}
    of = objective(batch)
    first = curvature.hessian(of, params)
    compiled = _of_objective._cache_size()
    moved = jax.tree.map(lambda x: x + 0.1, params)
    assert not np.allclose(curvature.hessian(of, moved), first)
    assert _of_objective._cache_size() == compiled
    scale = [1.0]
    bowl = lambda x: scale[0] * jnp.sum(x**2)  # noqa: E731
    assert curvature.hessian(bowl, jnp.ones(2))[0, 0] == 2.0
    scale[0] = 3.0
    assert curvature.hessian(bowl, jnp.ones(2))[0, 0] == 6.0


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_eigenpairs_against_dense_ones(which, landscape, dense, spectrum):
    found = curvature.top_eigenpairs(curvature.operator(landscape), 5, which=which)
    expected = {
        "largest": spectrum[:5],
        "smallest": spectrum[::-1][:5],
        "magnitude": spectrum[np.argsort(-np.abs(spectrum), kind="stable")][:5],
    }[which]
    assert found.converged
    np.testing.assert_allclose(found.values, expected, atol=1e-4)
    np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(5), atol=1e-5)
    for value, vector, residual in zip(found.values, found.vectors, found.residuals, strict=True):
        actual = np.linalg.norm(dense @ vector - value * vector)
        assert actual <= residual + 1e-4


def plain(matrix):
    """An operator of a known matrix that counts its products."""
    count = [0]

    def product(v):
        count[0] += 1
        return (matrix @ v).astype(np.float64)

    n = len(matrix)
    return curvature.Operator(product, n, np.dtype(np.float64), lambda x: x), count


def test_no_more_products_than_arpack_for_the_same_accuracy():
    draw = np.random.default_rng(5)
    n, k = 600, 10
    q = np.linalg.qr(draw.normal(size=(n, n)))[0]
    bulk = 0.3 * np.abs(draw.normal(size=n))
    for outliers in (np.linspace(20, 5, 9), 10.0 / np.arange(1, 10)):
        values = np.concatenate([outliers, bulk[: n - 9]])
        matrix = (q * values) @ q.T
        exact = np.sort(values)[::-1][:k]
        op, ours = plain(matrix)
        found = curvature.top_eigenpairs(op, k, tolerance=1e-5)
        counting, theirs = plain(matrix)
        linear = scipy.sparse.linalg.LinearOperator((n, n), matvec=counting.product, dtype=float)
        v0 = np.random.default_rng(0).standard_normal(n)
        arpack = np.sort(scipy.sparse.linalg.eigsh(linear, k, which="LA", tol=1e-5, v0=v0)[0])[::-1]
        assert np.abs(found.values - exact).max() <= max(np.abs(arpack - exact).max(), 1e-8)
        assert ours[0] == found.products
        assert ours[0] <= 1.1 * theirs[0]


def test_a_small_memory_restarts_and_clusters_and_multiple_eigenvalues_are_found():
    draw = np.random.default_rng(6)
    n = 300
    q = np.linalg.qr(draw.normal(size=(n, n)))[0]
    values = np.concatenate([[9.0, 8.0, 7.99, 7.0, 6.0], draw.uniform(0, 4, n - 5)])
    op, _ = plain((q * values) @ q.T)
    found = curvature.top_eigenpairs(op, 5, memory=n * 8 * 14, tolerance=1e-6)
    assert found.memory <= n * 8 * 14
    assert found.converged
    np.testing.assert_allclose(found.values, [9.0, 8.0, 7.99, 7.0, 6.0], atol=1e-6)
    identity, count = plain(2.0 * np.eye(40))
    np.testing.assert_allclose(curvature.top_eigenpairs(identity, 3).values, 2.0, atol=1e-12)
    assert count[0] <= 10
    few = curvature.top_eigenpairs(op, 5, max_products=6)
    assert not few.converged
    assert few.products == 6


@pytest.mark.parametrize("memory", [2**31, 300 * 8 * 14])
def test_repeated_eigenvalues_are_all_found(memory):
    draw = np.random.default_rng(9)
    for tops, k in (([5.0, 5.0, 5.0, 4.0, 4.0, 3.0], 5), ([9.0, 9.0, 8.0, 7.0], 2), ([7.0] * 6, 5)):
        q = np.linalg.qr(draw.normal(size=(300, 300)))[0]
        values = np.concatenate([tops, draw.uniform(0, 2, 300 - len(tops))])
        matrix = (q * values) @ q.T
        found = curvature.top_eigenpairs(plain(matrix)[0], k, tolerance=1e-5, memory=memory)
        assert found.converged
        np.testing.assert_allclose(found.values, tops[:k], atol=1e-6)
        errors = np.linalg.norm(matrix @ found.vectors.T - found.vectors.T * found.values, axis=0)
        assert np.all(errors <= found.residuals + 1e-10)
        assert np.all(errors <= 2e-5 * found.values)


def test_density_integrates_polynomials_of_the_spectrum(landscape, spectrum):
    density = curvature.spectral_density(curvature.operator(landscape), steps=30, probes=20)
    for f in (lambda t: t, np.square):
        mean, error = density.mean_of(f)
        assert abs(mean - f(spectrum).mean()) < 4 * error + 1e-6
    np.testing.assert_allclose(density.weights.sum(axis=1), 1.0, atol=1e-9)
    grid = np.linspace(spectrum[-1] - 1, spectrum[0] + 1, 2000)
    assert np.trapezoid(density.smooth(grid, 0.05), grid) == pytest.approx(1.0, abs=1e-3)
    # Full-length quadrature of one probe is exact: its cumulated weights step at eigenvalues.
    op, _ = plain(np.diag([1.0, 2.0, 5.0]))
    exact = curvature.spectral_density(op, steps=3, probes=1)
    np.testing.assert_allclose(exact.nodes, [[1.0, 2.0, 5.0]], atol=1e-9)


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_trace(method, landscape, spectrum):
    found = curvature.trace(curvature.operator(landscape), method=method, products=60)
    assert found.products == 60
    assert abs(found.value - spectrum.sum()) < 4 * found.error


def test_hutch_plus_plus_is_exact_where_the_rank_is_low():
    draw = np.random.default_rng(7)
    factor = draw.normal(size=(200, 6))
    matrix = factor @ factor.T
    better = curvature.trace(plain(matrix)[0], products=30)
    plain_one = curvature.trace(plain(matrix)[0], method="hutchinson", products=30)
    assert better.value == pytest.approx(np.trace(matrix), rel=1e-9)
    assert plain_one.error > 1e3 * better.error


def test_rayleigh_quotients_batch_by_batch(landscape, params):
    found = curvature.top_eigenpairs(curvature.operator(landscape), 2)
    table = landscape.rayleigh_by_batch("hessian", found.vectors)
    assert table.shape == (3, 2)
    np.testing.assert_allclose(table.mean(axis=0), found.values, rtol=1e-4)
    one = curvature.hessian(objective({"image": IMAGES[:32], "label": LABELS[:32]}), params)
    v = found.vectors[0]
    assert table[0, 0] == pytest.approx(float(v @ one @ v), rel=1e-3)


@pytest.mark.slow
def test_the_noise_scale_of_known_noise():
    # f_b(x) = ⟨x, mean of the batch's rows⟩: gradients are the rows themselves.
    draw = np.random.default_rng(8)
    mean, n, size = np.full(50, 0.3), 4096, 16
    rows = (mean + draw.normal(size=(n, 50))).astype(np.float32)
    batches = [{"x": rows[i : i + size]} for i in range(0, n, size)] + [{"x": rows[:5]}]
    land = curvature.Landscape(
        lambda b: jdl.Objective.from_fns(
            lambda w, batch: batch["x"] @ w, lambda out, batch: out, b
        ),
        batches,
        jnp.zeros(50),
    )
    found = curvature.noise_scale(land)
    assert (found.batches, found.batch_size) == (256, 16)
    assert found.low < found.value < found.high
    assert abs(1 / found.value - np.dot(mean, mean) / 50) < 4 * (1 / found.low - 1 / found.value)
    assert found.variance == pytest.approx(50.0, rel=0.05)


def test_sharpness_of_a_quadratic_is_half_the_top_eigenvalue_times_rho_squared():
    scales = jnp.array([1.0, 4.0, 30.0])
    land = curvature.Landscape(
        lambda b: jdl.Objective.from_fns(
            lambda w, batch: batch["x"] * jnp.sum(scales * w * w)[None],
            lambda out, batch: 0.5 * out,
            b,
        ),
        [{"x": np.ones(1, np.float32)}],
        jnp.array([1e-3, 1e-3, 0.0]),
    )
    top = curvature.top_eigenpairs(curvature.operator(land), 1)
    found = curvature.sharpness(land, rho=0.1, steps=20, direction=top.vectors[0])
    assert found.rise == pytest.approx(0.5 * 30.0 * 0.01, rel=0.02)
    assert found.first_step < found.rise


def test_bad_input_is_refused_in_words(landscape, params):
    op = curvature.operator(landscape)
    with pytest.raises(ArgumentError, match="between 1"):
        curvature.top_eigenpairs(op, 0)
    with pytest.raises(ArgumentError, match="iterated again"):
        curvature.Landscape(objective, iter([]), params)
    with pytest.raises(DataError, match="no batch"):
        curvature.Landscape(objective, [], params).value()
    with pytest.raises(ArgumentError, match="Objective"):
        curvature.operator(lambda p: jnp.sum(p["w1"]), params, kind="empirical_fisher")
    one = [{"image": IMAGES, "label": LABELS}]
    with pytest.raises(ArgumentError, match="at least 3"):
        curvature.noise_scale(curvature.Landscape(objective, one, params))
    with pytest.raises(ArgumentError, match="its own"):
        curvature.hessian(landscape, params)
    with pytest.raises(ArgumentError, match="`params` must be given"):
        curvature.hessian(lambda p: jnp.sum(p["w1"]))
    broken = replace(op, product=lambda v: np.full_like(v, np.nan))
    with pytest.raises(ArgumentError, match="finite"):
        curvature.top_eigenpairs(broken, 2)
