"""Operators' algebra, Kronecker factors and XTrace against dense matrices in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
from jax.flatten_util import ravel_pytree

import jdl
from jdl import curvature, losses
from jdl.core.check import ArgumentError
from jdl.optim.kronecker import factors, moments

ROWS = 24
draw = np.random.default_rng(0)
IMAGES = draw.normal(size=(ROWS, 4))
LABELS = draw.integers(0, 3, ROWS).astype(np.int32)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def predict(params, batch):
    x = batch["image"] * params["scale"][None]
    for layer in ("a", "b"):
        x = x @ params[layer]["kernel"] + params[layer]["bias"][None]
        x = jnp.tanh(x) if layer == "a" else x
    return x


def make(batch):
    return jdl.Objective.from_fns(predict, losses.softmax_cross_entropy, batch, train=False)


def parameters():
    normal = np.random.default_rng(1).normal
    shapes = {"a": {"kernel": (4, 5), "bias": (5,)}, "b": {"kernel": (5, 3), "bias": (3,)}}
    shapes["scale"] = (4,)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(normal(size=s)), shapes, is_leaf=is_shape)


def landscape():
    halves = (slice(0, 12), slice(12, ROWS))
    batches = [{"image": IMAGES[c], "label": LABELS[c]} for c in halves]
    return curvature.Landscape(make, batches, parameters())


def jacobians(params):
    """∂(outputs of an example)/∂θ, [B, K, n]."""
    flat, unravel = ravel_pytree(params)
    f = lambda x: predict(unravel(x), {"image": jnp.asarray(IMAGES)})  # noqa: E731
    return np.asarray(jax.jacrev(f)(flat))


def output_hessians(params):
    p = np.asarray(jax.nn.softmax(predict(params, {"image": jnp.asarray(IMAGES)})))
    return np.einsum("bi,ij->bij", p, np.eye(3)) - np.einsum("bi,bj->bij", p, p)


def gauss_newton(params):
    j = jacobians(params)
    return np.einsum("bin,bij,bjm->nm", j, output_hessians(params), j) / ROWS


def matrix_of(op):
    return np.stack([op.product(e) for e in np.eye(op.size)])


def test_operators_add_scale_and_have_submatrices():
    land = landscape()
    op = curvature.operator(land, kind="gauss_newton")
    dense = gauss_newton(land.params)
    hessian = curvature.operator(land)
    np.testing.assert_allclose(op.dense(), dense, atol=1e-12)
    both = matrix_of(0.5 * op + np.float64(2.0) * hessian)
    np.testing.assert_allclose(both, 0.5 * dense + 2.0 * hessian.dense(), atol=1e-12)
    # In ravel_pytree's order: a/bias, a/kernel, b/bias, b/kernel, scale.
    head = op.submatrix("b")
    np.testing.assert_allclose(matrix_of(head), dense[25:43, 25:43], atol=1e-12)
    assert head.unravel(np.zeros(18))["b/kernel"].shape == (5, 3)
    index = [*range(5), *range(43, 47)]
    two = op.submatrix("scale", "a/bias")
    np.testing.assert_allclose(matrix_of(two), dense[np.ix_(index, index)], atol=1e-12)
    np.testing.assert_allclose(matrix_of(two.submatrix("scale")), dense[43:, 43:], atol=1e-12)
    with pytest.raises(ArgumentError, match="b/kernel"):
        op.submatrix("b/kernels")
    with pytest.raises(ArgumentError, match="of size 47"):
        op + head


def test_inverses_by_iteration():
    op = curvature.operator(landscape(), kind="gauss_newton")
    dense = matrix_of(op)
    v = np.random.default_rng(2).normal(size=op.size)
    for method in ("cg", "lsmr"):
        found = op.inverse(0.1, method=method, tolerance=1e-12).product(v)
        np.testing.assert_allclose(found, np.linalg.solve(dense + 0.1 * np.eye(47), v), rtol=1e-8)
    hessian = curvature.operator(landscape())  # indefinite
    found = hessian.inverse(method="lsmr", tolerance=1e-13, max_iterations=5000).product(v)
    # Singular, as softmax does not change with a shift of all outputs.
    least_squares = np.linalg.pinv(matrix_of(hessian), rcond=1e-10) @ v
    np.testing.assert_allclose(found, least_squares, rtol=1e-5, atol=1e-5)
    with pytest.raises(ArgumentError, match="max_iterations"):
        op.inverse(1e-6, max_iterations=3).product(v)


def blocks(params):
    """K-FAC's matrix, written anew: A ⊗ G of each layer, the exact diagonal of `scale`."""
    params = jax.tree.map(np.asarray, params)
    x = IMAGES * params["scale"]
    hidden = np.tanh(x @ params["a"]["kernel"] + params["a"]["bias"])
    j, h = jacobians(parameters()), output_hessians(parameters())
    out = np.zeros((47, 47))
    biases = {"a": slice(0, 5), "b": slice(25, 28)}
    places = {"a": np.arange(0, 25), "b": np.arange(25, 43)}
    for layer, inputs in (("a", x), ("b", hidden)):
        ones = np.concatenate([inputs, np.ones((ROWS, 1))], axis=1)
        a = ones.T @ ones / ROWS
        at_y = j[:, :, biases[layer]]  # the bias's Jacobian is that of the layer's outputs
        g = np.einsum("bin,bij,bjm->nm", at_y, h, at_y) / ROWS
        k = len(g)
        order = np.r_[k : len(places[layer]), 0:k]  # leaf order has the bias first, A has it last
        at = places[layer][order]
        out[np.ix_(at, at)] = np.kron(a, g)
    diagonal = np.diag(gauss_newton(params))[43:]
    out[range(43, 47), range(43, 47)] = diagonal
    return out


def test_kfac_operator_against_kronecker_products():
    land = landscape()
    op = curvature.kfac_operator(land)
    dense = blocks(land.params)
    np.testing.assert_allclose(matrix_of(op), dense, atol=1e-12)
    values = np.linalg.eigvalsh(dense)
    np.testing.assert_allclose(np.sort(op.eigenvalues), values, atol=1e-12)
    assert op.trace() == pytest.approx(np.trace(dense), rel=1e-12)
    damped = dense + 0.03 * np.eye(47)
    assert op.logdet(0.03) == pytest.approx(np.linalg.slogdet(damped)[1], rel=1e-12)
    inverse = op.inverse(0.03)
    np.testing.assert_allclose(matrix_of(inverse), np.linalg.inv(damped), rtol=1e-8, atol=1e-9)
    root = matrix_of(inverse.map(np.sqrt))
    np.testing.assert_allclose(root @ root @ damped, np.eye(47), atol=1e-8)
    assert (ROWS * op).logdet(1.0) == pytest.approx(
        np.linalg.slogdet(ROWS * dense + np.eye(47))[1], rel=1e-12
    )


def test_ekfac_has_the_best_diagonal_in_its_eigenvectors():
    land = landscape()
    plain, corrected = (curvature.kfac_operator(land, eigen=e) for e in (False, True))
    dense = gauss_newton(land.params)
    q = np.stack([np.asarray(corrected.back(jnp.asarray(e))) for e in np.eye(47)]).T
    np.testing.assert_allclose(q.T @ q, np.eye(47), atol=1e-12)
    np.testing.assert_allclose(corrected.eigenvalues, np.diag(q.T @ dense @ q), atol=1e-12)
    assert corrected.trace() == pytest.approx(np.trace(dense), rel=1e-12)
    errors = [np.linalg.norm(matrix_of(op) - dense) for op in (corrected, plain)]
    assert errors[0] < errors[1]


def test_a_kfac_operator_of_wide_sides_has_diagonals_there():
    land = landscape()
    op = curvature.kfac_operator(land, max_size=5)
    dense = blocks(land.params)
    a = np.einsum("iaja->ij", dense[28:43, 28:43].reshape(5, 3, 5, 3))
    g = np.einsum("aiaj->ij", dense[28:43, 28:43].reshape(5, 3, 5, 3))
    expected = np.kron(np.diag(np.diag(a)), g) / np.trace(a)
    np.testing.assert_allclose(matrix_of(op)[28:43, 28:43], expected, atol=1e-12)


def test_decomposed_operators():
    op = curvature.operator(landscape())
    dense = matrix_of(op)
    found = curvature.decompose(op)
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(dense), atol=1e-12)
    np.testing.assert_allclose(matrix_of(found), dense, atol=1e-12)


def plain(matrix):
    n = len(matrix)
    return curvature.Operator(lambda v: matrix @ v, n, np.dtype(np.float64), lambda x: x)


def test_xtrace_is_the_mean_of_what_each_vector_says_of_the_others():
    normal = np.random.default_rng(3).normal
    q = np.linalg.qr(normal(size=(40, 40)))[0]
    matrix = (q * 0.8 ** np.arange(40)) @ q.T
    k = 6
    omega = np.random.default_rng(7).standard_normal((40, k))
    each = []
    for i in range(k):
        basis = np.linalg.qr(matrix @ np.delete(omega, i, axis=1))[0]
        rest = omega[:, i] - basis @ (basis.T @ omega[:, i])
        quotient = rest @ matrix @ rest / (rest @ rest)
        each.append(np.trace(basis.T @ matrix @ basis) + (40 - k + 1) * quotient)
    found = curvature.trace(plain(matrix), method="xtrace", products=12, seed=7)
    assert found.products == 12
    assert found.value == pytest.approx(np.mean(each), rel=1e-9)
    assert found.error == pytest.approx(np.std(each, ddof=1) / np.sqrt(k), rel=1e-6)


def test_xtrace_is_exact_where_the_rank_is_low_and_beats_the_others_where_it_nearly_is():
    normal = np.random.default_rng(4).normal
    factor = normal(size=(100, 5))
    low = plain(factor @ factor.T)
    found = curvature.trace(low, method="xtrace", products=20)
    assert found.value == pytest.approx(np.trace(factor @ factor.T), rel=1e-9)
    assert curvature.trace(plain(np.zeros((9, 9))), method="xtrace", products=6).value == 0.0
    q = np.linalg.qr(normal(size=(200, 200)))[0]
    values = 1.0 / np.arange(1, 201) ** 1.5
    op = plain((q * values) @ q.T)

    def error(method):
        found = [curvature.trace(op, method=method, products=30, seed=s).value for s in range(20)]
        return np.sqrt(np.mean(np.square(np.array(found) - values.sum())))

    errors = {method: error(method) for method in ("xtrace", "hutch++", "hutchinson")}
    assert errors["xtrace"] < errors["hutch++"] < errors["hutchinson"]


@pytest.mark.parametrize("which", ["full", "kfac", "last layer"])
def test_laplace_against_the_dense_posterior(which):
    land = landscape()
    g, at = gauss_newton(land.params), np.arange(47)
    op = curvature.operator(land, kind="gauss_newton")
    if which == "full":
        matrix = curvature.decompose(op)
    elif which == "kfac":
        matrix, g = curvature.kfac_operator(land), blocks(land.params)
    else:
        matrix, at = curvature.decompose(op.submatrix("b")), np.arange(25, 43)
    posterior = curvature.Laplace(land, matrix, precision=0.7)
    precision = ROWS * g[np.ix_(at, at)] + 0.7 * np.eye(len(at))
    covariance = np.linalg.inv(precision)
    np.testing.assert_allclose(matrix_of(posterior.covariance), covariance, atol=1e-9)
    flat = np.asarray(ravel_pytree(land.params)[0])[at]
    evidence = -ROWS * land.value() - 0.35 * flat @ flat
    evidence += 0.5 * len(at) * np.log(0.7) - 0.5 * np.linalg.slogdet(precision)[1]
    assert posterior.log_marginal_likelihood() == pytest.approx(evidence, rel=1e-10)
    mean, found = posterior.predict({"image": IMAGES})
    np.testing.assert_allclose(mean, predict(land.params, {"image": jnp.asarray(IMAGES)}))
    j = jacobians(land.params)[:, :, at]
    np.testing.assert_allclose(found, j @ covariance @ j.mT, atol=1e-9)


def test_the_laplace_posterior_of_a_linear_model_is_its_posterior():
    normal = np.random.default_rng(5).normal
    x, y = normal(size=(12, 3)), normal(size=12)
    loss = lambda out, batch: 0.5 * (out - batch["y"]) ** 2 + 0.5 * np.log(2 * np.pi)  # noqa: E731
    make = lambda b: jdl.Objective.from_fns(lambda w, b: b["x"] @ w["w"], loss, b)  # noqa: E731
    best = np.linalg.solve(x.T @ x + 2.0 * np.eye(3), x.T @ y)
    land = curvature.Landscape(make, [{"x": x, "y": y}], {"w": jnp.asarray(best)})
    matrix = curvature.decompose(curvature.operator(land, kind="gauss_newton"))
    posterior = curvature.Laplace(land, matrix, precision=2.0)
    exact = scipy.stats.multivariate_normal(np.zeros(12), np.eye(12) + x @ x.T / 2.0).logpdf(y)
    assert posterior.log_marginal_likelihood() == pytest.approx(exact, rel=1e-10)
    drawn = np.asarray(posterior.sample(20_000, seed=1)["w"])
    np.testing.assert_allclose(drawn.mean(axis=0), best, atol=0.01)
    expected = np.linalg.inv(x.T @ x + 2.0 * np.eye(3))
    np.testing.assert_allclose(np.cov(drawn.T), expected, atol=0.005)
    outputs = posterior.predict_sampled({"x": x}, count=7, seed=1)
    again = np.asarray(posterior.sample(7, seed=1)["w"])
    np.testing.assert_allclose(outputs, again @ x.T, atol=1e-12)


def test_the_most_likely_precision_of_a_posterior():
    land = landscape()
    posterior = curvature.Laplace(land, curvature.kfac_operator(land))
    worse = lambda t: -posterior.log_marginal_likelihood(float(np.exp(t)))  # noqa: E731
    best = scipy.optimize.minimize_scalar(worse, (-3.0, 3.0), tol=1e-10).x
    assert posterior.precision == pytest.approx(np.exp(best), rel=1e-4)
    with pytest.raises(ArgumentError, match="landscape's parameters"):
        curvature.Laplace(land, curvature.decompose(plain(np.eye(5))))


def optimizer_state(optimizer, steps=3):
    """A state after a few steps, the parameters there, and the objective."""
    whole = make({"image": jnp.asarray(IMAGES), "label": jnp.asarray(LABELS)})
    params = parameters()
    with jdl.optim.kronecker.told(whole, params):
        state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        value, grad, _ = whole.value_and_grad(params)
        extras = {"value": value, "grad": grad, "objective": whole}
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grad, state, params, **extras)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return whole, params, state


def test_the_preconditioned_hessian_of_adam_and_rmsprop():
    for optimizer in (optax.adam(1e-2, b1=0.8, b2=0.99), optax.rmsprop(1e-2, eps=1e-4)):
        chained = optax.with_extra_args_support(optax.chain(optax.clip(9.0), optimizer))
        whole, params, state = optimizer_state(chained)
        options = {"eps": 1e-4}
        if isinstance(state[1][0], optax.ScaleByAdamState):
            nu, options = ravel_pytree(state[1][0].nu)[0], {"b1": 0.8, "b2": 0.99}
            inverse = (1 - 0.8**3) * (np.sqrt(nu / (1 - 0.99**3)) + 1e-8)
        else:
            inverse = np.sqrt(ravel_pytree(state[1][0].nu)[0] + 1e-4)
        found = curvature.preconditioned(whole, state, params, **options)
        hessian = curvature.hessian(whole, params)
        expected = scipy.linalg.eigh(hessian, np.diag(inverse), eigvals_only=True)
        np.testing.assert_allclose(
            np.linalg.eigvalsh(matrix_of(found)), expected, rtol=1e-6, atol=1e-9
        )
    with pytest.raises(ArgumentError, match="Adam, RMSprop or K-FAC"):
        curvature.preconditioned(whole, optax.sgd(0.1).init(params), params)


@pytest.mark.parametrize("eigen", [False, True])
def test_the_preconditioned_hessian_of_kfac(eigen):
    whole, params, state = optimizer_state(jdl.optim.kfac(eigen=eigen, max_size=5))
    found = moments.find_layers(whole, params)
    flat, unravel = ravel_pytree(params)

    def applied(v):
        with jax.numpy_dtype_promotion("standard"):
            out = factors.apply(found, state.kronecker, unravel(v), state.damping)
        return ravel_pytree(out)[0]

    m = np.stack([applied(e) for e in jnp.eye(flat.size)])
    values = np.linalg.eigvals(m @ curvature.hessian(whole, params))
    op = curvature.preconditioned(whole, state, params)
    mine = np.linalg.eigvalsh(matrix_of(op))
    np.testing.assert_allclose(np.sort(values.real), mine, rtol=1e-4, atol=1e-5)


def test_sharpness_is_followed_by_a_product_at_a_time():
    whole, params, state = optimizer_state(optax.with_extra_args_support(optax.adam(1e-2)))
    track, count = curvature.SharpnessTracker(tolerance=1e-4, max_products=40), []
    land = curvature.Landscape(lambda _: whole, [{}], params)
    product = land.product
    land.product = lambda *args: [count.append(1), product(*args)][1]
    first = track(land, None, state)
    top = np.linalg.eigvalsh(curvature.hessian(whole, params))[-1]
    scaled = np.linalg.eigvalsh(matrix_of(curvature.preconditioned(whole, state, params)))[-1]
    assert first["sharpness"] == pytest.approx(top, rel=1e-6)
    assert first["preconditioned_sharpness"] == pytest.approx(scaled, rel=1e-6)
    before = len(count)
    assert track(land, None, state) == pytest.approx(first)
    assert len(count) == before + 2


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "kfac", "ekfac"])
def test_sharpness_of_an_objective_is_the_top_dense_eigenvalue(optimizer):
    """Residuals of 1e-5 of the eigenvalue; its own error is about their square."""
    made = {
        "adam": optax.with_extra_args_support(optax.adam(1e-2)),
        "rmsprop": optax.with_extra_args_support(optax.rmsprop(1e-2)),
        "kfac": jdl.optim.kfac(),
        "ekfac": jdl.optim.kfac(eigen=True),
    }[optimizer]
    whole, params, state = optimizer_state(made)
    found = curvature.SharpnessTracker(tolerance=1e-5, max_products=100)(whole, params, state)
    top = np.linalg.eigvalsh(curvature.hessian(whole, params))[-1]
    scaled = np.linalg.eigvalsh(matrix_of(curvature.preconditioned(whole, state, params)))[-1]
    assert found["sharpness"] == pytest.approx(top, rel=1e-9)
    assert found["preconditioned_sharpness"] == pytest.approx(scaled, rel=1e-9)


def quadratic(matrix):
    """½ wᵀ A w of one example."""
    bend = lambda w, b: 0.5 * jnp.sum(b["x"][0] * jnp.outer(w, w), keepdims=True)[0]  # noqa: E731
    return jdl.Objective.from_fns(bend, lambda out, _: out, {"x": jnp.asarray(matrix)[None]})


@pytest.mark.parametrize(
    "values",
    [[3.0], [0.0, 0.0], [0.0, -1e4], [-3.0, -2.0, -1.0], [2.0, 2.0, 2.0, -5.0], [*range(-30, 30)]],
)
def test_sharpness_of_any_spectrum(values):
    n = len(values)
    q = scipy.stats.ortho_group.rvs(n, random_state=0) if n > 1 else np.eye(1)
    matrix = q @ np.diag(values) @ q.T
    track = curvature.SharpnessTracker(tolerance=1e-6, max_products=200)
    for _ in range(2):
        found = track(quadratic(matrix), jnp.ones(n))["sharpness"]
        assert found == pytest.approx(max(values), rel=1e-10, abs=1e-9)


def test_sharpness_is_sought_on_from_the_last_vector():
    """Two products at each of 30 calls: as many as one call has with 60, which finds the top."""
    whole, params, _ = optimizer_state(optax.with_extra_args_support(optax.sgd(1e-2)))
    few = curvature.SharpnessTracker(tolerance=1e-5, max_products=2)
    top = np.linalg.eigvalsh(curvature.hessian(whole, params))[-1]
    first = few(whole, params)["sharpness"]
    assert first < 0.95 * top
    found = [few(whole, params)["sharpness"] for _ in range(30)]
    assert found[-1] == pytest.approx(top, rel=1e-6)


def test_sharpness_with_microbatches_and_in_float32():
    whole, params, _ = optimizer_state(optax.with_extra_args_support(optax.sgd(1e-2)))
    top = np.linalg.eigvalsh(curvature.hessian(whole, params))[-1]
    cut = dataclasses.replace(whole, microbatches=4)
    track = curvature.SharpnessTracker(tolerance=1e-4, max_products=100)
    assert track(cut, params)["sharpness"] == pytest.approx(top, rel=1e-7)
    single = lambda a: jax.tree.map(  # noqa: E731
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, a
    )
    track = curvature.SharpnessTracker(tolerance=1e-3, max_products=100)
    assert track(single(whole), single(params))["sharpness"] == pytest.approx(top, rel=1e-5)


def test_sharpness_is_found_again_after_a_nan():
    track = curvature.SharpnessTracker(tolerance=1e-6)
    matrix = np.diag([1.0, 3.0])
    assert np.isnan(track(quadratic(np.nan * matrix), jnp.ones(2))["sharpness"])
    assert track(quadratic(matrix), jnp.ones(2))["sharpness"] == pytest.approx(3.0)


def test_a_curve_avoids_the_barrier_between_two_minima_and_a_plane_shows_it():
    ring = lambda w, b: b["x"] * (jnp.sum(w * w) - 1.0)  # noqa: E731
    f = jdl.Objective.from_fns(ring, lambda out, _: out**2, {"x": jnp.ones(1)})
    ends = jnp.array([1.0, 0.1]), jnp.array([-1.0, 0.1])
    bend = curvature.connect(f, *ends, steps=800)
    t, (a, b) = np.linspace(0, 1, 21)[:, None], map(np.asarray, ends)
    curve = (1 - t) ** 2 * a + 2 * t * (1 - t) * bend + t**2 * b
    assert max(float(f.value(jnp.asarray(x))) for x in curve) < 0.1
    x, y = np.array([-1.0, 0.0, 0.5]), np.array([0.0, 2.0])
    plane = curvature.loss_plane(f, np.eye(2), x, y, jnp.zeros(2))
    expected = (x[None] ** 2 + y[:, None] ** 2 - 1) ** 2
    np.testing.assert_allclose(plane, expected, atol=1e-12)


def test_filters_of_a_random_direction_have_the_lengths_of_the_parameters():
    params = parameters()
    unravel = ravel_pytree(params)[1]
    first, second = (unravel(curvature.filter_normalized(params, seed)) for seed in (0, 1))
    for layer in ("a", "b"):
        own, drawn = (np.linalg.norm(p[layer]["kernel"], axis=0) for p in (params, first))
        np.testing.assert_allclose(drawn, own, rtol=1e-12)
        assert not np.any(first[layer]["bias"])
        assert not np.allclose(first[layer]["kernel"], second[layer]["kernel"])
