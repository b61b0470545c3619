"""A run's settings: written, read back, compared; the data and shapes that options mean."""

import dataclasses

import optax
import pytest

from jdl.core.check import ArgumentError, DataError, UserError
from jdl.recipes.datasets import default_split, input_shape, open_images, parse_size
from jdl.recipes.registry import RECIPES
from jdl.recipes.run_config import RunConfig
from jdl.recipes.style_config import StyleConfig

CONFIG = RunConfig(
    model="mlp",
    data="digits",
    optimizer="sgd",
    batch_size=32,
    microbatches=1,
    seed=0,
    image_shape=(8, 8, 1),
    grayscale=True,
    classes=tuple("0123456789"),
    on_error="raise",
    learning_rate=0.1,
    split="train",
)


def test_settings_are_read_as_written(tmp_path):
    CONFIG.save(tmp_path, {"max_steps": 3})
    assert RunConfig.load(tmp_path) == CONFIG
    assert "[command]\nmax_steps = 3" in (tmp_path / "config.toml").read_text()
    changed = dataclasses.replace(CONFIG, seed=1, learning_rate=None)
    changed.save(tmp_path, {})  # nothing has been trained yet
    assert RunConfig.load(tmp_path) == changed


def test_a_trained_run_keeps_its_settings(tmp_path):
    CONFIG.save(tmp_path, {})
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    dataclasses.replace(CONFIG, on_error="skip").save(tmp_path, {})
    with pytest.raises(UserError, match="seed: 0 there, 1 now"):
        dataclasses.replace(CONFIG, seed=1).save(tmp_path, {})


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (None, UserError, "not a run directory of `jdl train`"),
        ("model = ", DataError, "not readable as TOML"),
        ('model = "mlp"', DataError, "lacks batch_size, classes, data"),
        ('model = "mlp"\nprecision = "bfloat16"', DataError, "does not know: precision"),
    ],
)
def test_what_is_no_run(text, error, words, tmp_path):
    if text is not None:
        (tmp_path / "config.toml").write_text(text)
    with pytest.raises(error, match=words):
        RunConfig.load(tmp_path)
    if text is not None and error is DataError:  # another program's file is not replaced
        with pytest.raises(DataError):
            CONFIG.save(tmp_path, {})
        assert (tmp_path / "config.toml").read_text() == text


def test_a_style_run_is_not_a_run_of_jdl_train(tmp_path):
    CONFIG.save(tmp_path, {})
    with pytest.raises(UserError, match="not a run directory of `jdl style train`"):
        StyleConfig.load(tmp_path)


def test_the_learning_rate_reaches_the_optimizer(tmp_path):
    estimator = CONFIG.estimator(tmp_path)
    estimator.initialize(CONFIG.images("digits", "train", batch_size=32))
    rate = optax.tree.get(estimator.state.opt_state, "learning_rate")
    assert float(rate) == pytest.approx(0.1, rel=1e-6)


def test_sizes_splits_and_shapes():
    assert parse_size(None, "digits") == (8, 8)
    assert parse_size(None, "a.tar") == (128, 128)
    assert parse_size("64x48", "digits") == (64, 48)
    with pytest.raises(ArgumentError, match="--size"):
        parse_size("64x", "digits")
    assert default_split("digits", None, "test") == "test"
    assert default_split("digits", "all", "test") is None
    assert input_shape("digits", (8, 8), 3) == (8, 8, 3)
    trees = open_images("trees", size=(8, 8), split="test", batch_size=4)
    assert trees.num_records == 1000
    (vocabulary,) = input_shape("trees", (8, 8), 1)
    assert max(int(next(iter(trees))["word"].max()), 0) < vocabulary


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_a_network(name):
    shape = input_shape(RECIPES[name].data, (8, 8), 1)
    assert RECIPES[name].build(shape, 10) is not None
