"""Kronecker factors against dense Gauss-Newton matrices in float64, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdl.core.objective import Objective
from jdl.losses import squared_error
from jdl.optim.kronecker import factors, moments
from jdl.optim.kronecker.probes import Probe
from tests.core.rules import rounded

pytestmark = pytest.mark.usefixtures("float64")


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def dense(objective, params):
    """The Gauss-Newton matrix of all leaves, [P, P]: that of a linear model's squared error."""
    flat, restore = jax.flatten_util.ravel_pytree(params)
    jac = jax.jacobian(lambda f: objective.apply(restore(f), objective.batch, None)[0])(flat)
    jac = jac.reshape(-1, flat.size)
    return np.asarray(jac.T @ jac / objective.num_examples(objective.batch))


def approximated(objective, params, **options):
    """The matrix that factors and diagonals stand for, [P, P], where it stands for one; layers."""
    found = moments.find_layers(objective, params)
    leaves = jax.tree.leaves(params)
    starts = np.cumsum([0, *(x.size for x in leaves)])
    probes = {}
    for i, layer in found.known.items():
        first, last = map(jnp.zeros, factors.sides(layer, factors.Options()))
        probes[i] = Probe(first, last, jnp.zeros(first.shape[:1]))
    drawn, diagonals = jax.jit(
        lambda p: moments.second_moments(
            objective, p, found, probes, {}, jax.random.key(0), "gauss_newton", **options
        )
    )(params)
    out = np.full((starts[-1], starts[-1]), np.nan)
    whole = lambda x: np.asarray(x if x.ndim == 3 else jax.vmap(jnp.diag)(x))  # noqa: E731
    for i, layer in found.known.items():
        n, d, k = layer.shape
        first, last = whole(drawn[i].first), whole(drawn[i].last)[:, :k, :k]
        numbers = np.arange(leaves[i].size).reshape(leaves[i].shape)
        places = np.asarray(layer.matrices(jnp.asarray(numbers))) + starts[i]
        if layer.bias is not None:
            bias = starts[layer.bias] + np.arange(n * k).reshape(n, 1, k)
            places = np.concatenate([places, bias], axis=1)
        side = d + (layer.bias is not None)
        for own, a, g in zip(places.reshape(n, -1), first[:, :side, :side], last, strict=True):
            out[np.ix_(own, own)] = np.kron(a, g)
    for i in found.unknown:
        own = np.arange(starts[i], starts[i + 1])
        out[own, own] = np.asarray(diagonals[i]).reshape(-1)
    return out, found


def assert_exact(predict, params, batch, kinds, **options):
    """That each block of a known layer, and each other diagonal, is the dense matrix's."""
    batch = batch | {"label": jnp.zeros(predict(params, batch).shape)}
    objective = Objective.from_fns(predict, squared_error, batch)
    got, found = approximated(objective, params, **options)
    known = ~np.isnan(got)
    assert known.any(axis=1).all()
    want = dense(objective, params)
    np.testing.assert_allclose(got[known], want[known], rtol=1e-6, atol=1e-9)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert {names[i].strip("[]'"): layer.kind for i, layer in found.known.items()} == kinds
    return found


def conv(x, w, numbers=("NHWC", "HWIO", "NHWC"), strides=(1, 1), padding="SAME", **options):
    return jax.lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=numbers, **options
    )


X, IMAGE = numbers(4, 3), numbers(3, 4, 5, 2)
HEADS, WORDS = numbers(4, 2, 3), np.array([[0, 3, 3], [1, 0, 4], [3, 3, 3], [2, 1, 0]])
# name -> (predict of parameters and x, parameters, x, kinds of layers); linear in the parameters
CASES = {
    "dense": (lambda p, x: x @ p["w"] + p["b"][None], {"w": (3, 2), "b": (2,)}, X, "w"),
    "[out, in], one example at a time": (
        lambda p, x: jax.vmap(lambda x: p["w"] @ x + p["b"])(x),
        {"w": (2, 3), "b": (2,)},
        X,
        "w",
    ),
    "heads [D, H, K]": (
        lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]) + p["b"][None],
        {"w": (3, 2, 2), "b": (2, 2)},
        X,
        "w",
    ),
    "heads [H, D, K]": (
        lambda p, x: jnp.einsum("bd,hdk->bhk", x, p["w"]) + p["b"][None],
        {"w": (2, 3, 2), "b": (2, 2)},
        X,
        "w",
    ),
    "merge of heads": (
        lambda p, x: jnp.einsum("bhk,hkd->bd", x, p["w"]) + p["b"][None],
        {"w": (2, 3, 4), "b": (4,)},
        HEADS,
        "w",
    ),
    "a kernel in another shape": (
        lambda p, x: jnp.einsum("bd,hdk->bhk", x, p["w"].reshape(3, 2, 2).transpose(1, 0, 2)),
        {"w": (3, 4)},
        X,
        "w",
    ),
    "half of a kernel": (lambda p, x: x @ p["w"][1:4, ::-1], {"w": (5, 2)}, X, "w"),
    "a rounded kernel, straight through": (
        lambda p, x: x @ rounded(p["v"]) @ rounded(p["w"]),
        {"w": (3, 2), "v": (3, 3)},
        X,
        "v w",
    ),
    "a vector": (lambda p, x: (x @ p["w"])[:, None], {"w": (3,)}, X, "w"),
    "positions share a kernel": (
        lambda p, x: x @ p["w"] + p["b"][None, None],
        {"w": (3, 2), "b": (2,)},
        HEADS,
        "w",
    ),
    "experts": (
        lambda p, x: jnp.einsum("bed,edk->bek", x, p["w"]) + p["b"][None],
        {"w": (2, 3, 2), "b": (2, 2)},
        HEADS,
        "w",
    ),
    "a stack by index": (
        lambda p, x: jnp.stack([x @ p["w"][i] + p["b"][i][None] for i in (0, 1)], 1),
        {"w": (2, 3, 2), "b": (2, 2)},
        X,
        "w",
    ),
    "one of a stack, and half of it": (
        lambda p, x: x[:, 1:] @ p["w"][2, :2] + p["b"][2][None],
        {"w": (3, 4, 2), "b": (3, 2)},
        X,
        "w",
    ),
    "a packed kernel, cut along its last axis": (
        lambda p, x: x @ p["w"][..., 0] + x[:, ::-1] @ p["w"][..., 2],
        {"w": (3, 2, 3)},
        X,
        "w",
    ),
    "every second column": (
        lambda p, x: x @ jax.lax.slice(p["w"], (0, 1), (3, 4), (1, 2)),
        {"w": (3, 4)},
        X,
        "w",
    ),
    "a packed kernel, cut": (
        lambda p, x: jnp.stack(
            [jnp.einsum("bd,dhk->bhk", x, p["w"][:, i]) + p["b"][i][None] for i in (0, 1)], 1
        ),
        {"w": (3, 2, 2, 2), "b": (2, 2, 2)},
        X,
        "w",
    ),
    "scale and shift": (
        lambda p, x: x * p["s"][None] + p["b"][None],
        {"s": (3,), "b": (3,)},
        X,
        "",
    ),
    "scale, shift and table of positions": (
        lambda p, x: (
            x * p["s"][None, None] + jax.lax.slice_in_dim(p["t"], 0, 2)[None] + p["b"][None, None]
        ),
        {"s": (3,), "t": (5, 3), "b": (3,)},
        HEADS,
        "",
    ),
    "a scale and a shift used twice": (
        lambda p, x: (
            (x * p["s"][None] + p["b"][None]) + 2 * (x[:, ::-1] * p["s"][None] + p["b"][None])
        ),
        {"s": (3,), "b": (3,)},
        X,
        "",
    ),
    "a scale and a shift at each step of a scan": (
        lambda p, x: jax.lax.scan(
            lambda h, x: (0.5 * h + x * p["s"][None] + p["b"][None], h),
            0 * x[:, 0],
            x.swapaxes(0, 1),
        )[0],
        {"s": (3,), "b": (3,)},
        HEADS,
        "",
    ),
    "scales and shifts of a stack": (
        lambda p, x: jax.lax.scan(
            lambda h, sb: (h + x * sb[0][None] + 2 * sb[1][None], None), x, (p["s"], p["b"])
        )[0],
        {"s": (2, 3), "b": (2, 3)},
        X,
        "",
    ),
    "as many positions as examples, time first": (
        lambda p, x: (x.swapaxes(0, 1) * p["s"][None, None] + p["t"][:, None]).swapaxes(0, 1),
        {"s": (3,), "t": (4, 3)},
        numbers(4, 4, 3),
        "",
    ),
    "a scale of as many positions as examples": (
        lambda p, x: x[:, :, None] + (numbers(4, 3) * p["s"][None])[None],
        {"s": (3,)},
        numbers(4, 4),
        "",
    ),
    "a scale of flattened positions": (
        lambda p, x: (x.reshape(-1, 3) * p["s"][None]).reshape(x.shape) + x,
        {"s": (3,)},
        HEADS,
        "",
    ),
    "a scalar": (lambda p, x: x * p["s"], {"s": ()}, X, ""),
    "a scale of statistics": (
        lambda p, x: x * (np.array([1.0, 2.0, 0.5]) * p["s"])[None],
        {"s": (3,)},
        X,
        "",
    ),
    "convolution": (
        lambda p, x: conv(x, p["w"]) + p["b"][None, None, None],
        {"w": (3, 2, 2, 2), "b": (2,)},
        IMAGE,
        "w:conv",
    ),
    "convolution of NCHW by OIHW": (
        lambda p, x: (
            conv(x.transpose(0, 3, 1, 2), p["w"], ("NCHW", "OIHW", "NCHW"), (2, 1))
            + p["b"][None, :, None, None]
        ),
        {"w": (3, 2, 2, 2), "b": (3,)},
        IMAGE,
        "w:conv",
    ),
    "dilated convolution": (
        lambda p, x: conv(x, p["w"], padding="VALID", rhs_dilation=(2, 1)),
        {"w": (2, 2, 2, 3)},
        IMAGE,
        "w:conv",
    ),
    "grouped convolution": (
        lambda p, x: conv(x, p["w"], feature_group_count=2) + p["b"][None, None, None],
        {"w": (2, 2, 1, 4), "b": (4,)},
        IMAGE,
        "w:conv",
    ),
    "depthwise convolution": (
        lambda p, x: conv(x, p["w"], feature_group_count=2),
        {"w": (2, 2, 1, 2)},
        IMAGE,
        "w:conv",
    ),
    "transposed convolution": (
        lambda p, x: jax.lax.conv_transpose(x, p["w"], (2, 2), "SAME"),
        {"w": (3, 2, 2, 2)},
        IMAGE,
        "w:conv",
    ),
    "transposed kernel of a transposed convolution": (
        lambda p, x: jax.lax.conv_transpose(x, p["w"], (2, 1), "VALID", transpose_kernel=True),
        {"w": (3, 2, 3, 2)},
        IMAGE,
        "w:conv",
    ),
    "local convolution": (
        lambda p, x: jax.lax.conv_general_dilated_local(
            x, p["w"], (1, 1), "VALID", (2, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        {"w": (3, 4, 8, 2)},
        IMAGE,
        "w",
    ),
    "embedding": (lambda p, x: jnp.take(p["w"], x, axis=0), {"w": (5, 2)}, WORDS, "w:embed"),
    "embedding by indexing": (lambda p, x: p["w"][x], {"w": (5, 2)}, WORDS, "w:embed"),
    "embedding, one index at a time": (
        lambda p, x: jax.vmap(jax.vmap(lambda i: p["w"][i]))(x),
        {"w": (5, 2)},
        WORDS,
        "w:embed",
    ),
    "embedding of columns": (
        lambda p, x: jnp.take(p["w"], x, axis=1).transpose(1, 2, 0),
        {"w": (2, 5)},
        WORDS,
        "w:embed",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_of_a_linear_layer_the_block_or_diagonal_is_exact(name):
    predict, shapes, x, kinds = CASES[name]
    params = {k: jnp.asarray(numbers(*shape, seed=1)) for k, shape in shapes.items()}
    pairs = (kind.split(":") for kind in kinds.split())
    kinds = {pair[0]: (*pair, "dense")[1] for pair in pairs}
    assert_exact(lambda p, b: predict(p, b["x"]), params, {"x": jnp.asarray(x)}, kinds)
