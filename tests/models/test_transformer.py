"""Transformers: sizes as published, attention by hand, causality."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdl.core import check
from jdl.models.transformer import LanguageModel, TransformerBlock, ViT

KEY = jax.random.key(0)


def count(net, x):
    shapes = jax.eval_shape(net.init, KEY, x)["params"]
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def test_the_small_vision_transformer_has_its_published_size():
    assert count(ViT(), jnp.ones((1, 224, 224, 3))) == 22_050_664
    tiny = ViT(width=192, heads=3)
    assert count(tiny, jnp.ones((1, 224, 224, 3))) == 5_717_416


def test_the_language_model_has_gpt2_s_blocks():
    net, tokens = LanguageModel(50_257, 768, 12, 12), jnp.zeros((1, 1024), jnp.int32)
    head = 768 * 50_257 + 50_257  # GPT-2's is its embedding
    assert count(net, tokens) - head == 124_439_808


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_is_what_its_formula_says(causal):
    block = TransformerBlock(heads=2, causal=causal)
    x = np.asarray(jax.random.normal(KEY, (1, 5, 6)))
    found, variables = jax.jit(block.init_with_output)(jax.random.key(1), jnp.asarray(x))
    p = jax.tree.map(np.asarray, variables["params"])
    a = p["MultiHeadDotProductAttention_0"]
    q, k, v = (
        np.einsum("btd,dhf->bhtf", norm(x), a[n]["kernel"]) for n in ("query", "key", "value")
    )
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(3)
    scores = np.where(np.tril(np.ones((5, 5))) > 0, scores, -np.inf) if causal else scores
    y = x + np.einsum("bhtf,hfd->btd", softmax(scores) @ v, a["out"]["kernel"])
    h = norm(y) @ p["Dense_0"]["kernel"]
    h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    np.testing.assert_allclose(found, y + h @ p["Dense_1"]["kernel"], atol=2e-5)


def test_a_later_token_changes_no_earlier_output():
    net = LanguageModel(11, width=8, depth=2, heads=2)
    tokens = jax.random.randint(KEY, (2, 7), 0, 11)
    before, variables = jax.jit(net.init_with_output)(KEY, tokens)
    apply = jax.jit(net.apply)
    for t in range(7):
        after = apply(variables, tokens.at[:, t].set((tokens[:, t] + 1) % 11))
        np.testing.assert_allclose(after[:, :t], before[:, :t], atol=1e-6)
        assert (np.abs(after[:, t:] - before[:, t:]).max(axis=-1) > 1e-3).all()


def test_images_of_any_size_are_filled_up_to_whole_patches():
    net = ViT(3, patch=4, width=8, depth=1, heads=2, class_token=False)
    image = jax.random.normal(KEY, (2, 6, 7, 1))
    found, variables = jax.jit(net.init_with_output)(KEY, image)
    assert variables["params"]["positions"].shape == (1, 4, 8)
    whole = jnp.pad(image, [(0, 0), (1, 1), (0, 1), (0, 0)])
    np.testing.assert_allclose(jax.jit(net.apply)(variables, whole), found, rtol=1e-5, atol=1e-6)


def test_errors_say_what_to_give():
    with pytest.raises(check.ArgumentError, match=r"heads.*a divisor of the width 8"):
        ViT(3, patch=2, width=8, heads=3).init(KEY, jnp.ones((1, 4, 4, 1)))
    with pytest.raises(check.ArgumentError, match=r"tokens.*int\[B, T\]"):
        LanguageModel().init(KEY, jnp.ones((1, 4)))
    with pytest.raises(check.ArgumentError, match=r"\[B, H, W, C\]"):
        ViT(3).init(KEY, jnp.ones((1, 4)))
