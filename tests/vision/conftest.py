import jax.numpy as jnp
import numpy as np
import pytest

from jdl.vision.layers import addressable, conv
from jdl.vision.trunk import Trunk


def _tiny(params, images, note):
    x = note("conv", conv(images, params["conv"]))
    x = note("relu", jnp.maximum(x, 0))
    x = note("square", jnp.square(x))
    note("logits", jnp.mean(x, axis=(1, 2)) @ params["head"])


@pytest.fixture(scope="session")
def tiny():
    """A trunk of one convolution, four channels, and a linear head of three classes."""
    rng = np.random.default_rng(0)
    params = {
        "conv": {
            "kernel": jnp.asarray(rng.normal(size=(3, 3, 3, 4)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=4), jnp.float32),
        },
        "head": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
    }
    return Trunk(
        "tiny",
        ("conv", "relu", "square", "logits"),
        params,
        addressable(_tiny),
        head="logits",
        classes=("cat", "dog", "fish"),
    )


@pytest.fixture(scope="session")
def photograph():
    """Smooth, coloured, 60 × 80."""
    down, across = np.mgrid[0:1:60j, 0:1:80j]
    waves = [np.sin(9 * down + k) * np.cos(7 * across - k) for k in range(3)]
    return (0.5 + 0.4 * np.stack(waves, axis=2)).astype(np.float32)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """A run directory of `jdl train cnn`, a few steps long."""
    from jdl.cli.main import main

    workdir = tmp_path_factory.mktemp("runs") / "cnn"
    assert main(["train", "cnn", "--steps", "4", "--workdir", str(workdir)]) == 0
    return workdir
