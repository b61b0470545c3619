"""What `train` takes as data, how far it goes, and what it refuses in words."""

import inspect
import itertools
import logging

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdl
from jdl.core import check
from jdl.data import Dataset, from_arrays
from jdl.models import MLP
from jdl.train import feed
from jdl.train.checkpoint import Checkpoints
from jdl.train.predict import predictions

ONE = jax.devices()[:1]
RNG = np.random.default_rng(0)
X = RNG.normal(size=(70, 6)).astype(np.float32)
Y = np.argmax(X[:, :3], 1).astype(np.int32)


def rows(start, stop):
    return {"image": X[start:stop], "label": Y[start:stop]}


def lists(*sizes):
    edges = [0, *itertools.accumulate(sizes)]
    return [rows(a, b) for a, b in itertools.pairwise(edges)]


def make(optimizer="sgd", **options):
    net = MLP(widths=(8,), num_outputs=3, dropout=0.0)
    return jdl.classifier(net, optimizer, **{"devices": ONE, **options})


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


# ---------------------------------------------------------------------- data that ends


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ({"steps": 10}, "before steps=10: 3 of 10 steps"),
        ({"max_steps": 7}, "before max_steps=7: 3 of 7 steps"),
        ({"seconds": 1e6}, "before seconds=1000000.0: 3 steps"),
        ({"steps": 3}, None),
        ({}, None),
    ],
)
def test_data_that_ends_before_the_limit_is_told_once(caplog, limit, said):
    assert make().train(lists(20, 20, 20), **limit).step == 3
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(told) == (said is not None)
    assert said is None or said in told[0]


@pytest.mark.parametrize("endless", [itertools.cycle, lambda batches: itertools.repeat(batches[0])])
def test_what_has_no_end_is_refused_where_one_pass_is_meant(endless):
    estimator = make().train(lists(20), steps=1)
    with pytest.raises(check.ArgumentError, match="batches that have an end"):
        estimator.evaluate(endless(lists(20)))
    with pytest.raises(check.ArgumentError, match="`steps` must be given"):
        make().train(endless(lists(20)))
    with pytest.raises(check.ArgumentError, match="`steps` must be given"):
        make().train(lambda: from_arrays(X, Y, batch_size=16))


def test_no_batch_of_what_comes_once_is_lost():
    batches = iter(lists(16, 16, 16))
    estimator = make().initialize(batches).train(batches, steps=1).train(batches)
    assert_same(estimator.params, make().train(lists(16, 16, 16)).params)


def test_what_comes_once_is_no_validation():
    with pytest.raises(check.ArgumentError, match="`validation` must be data that can be passed"):
        make().train(lists(20), steps=1, validation=iter(lists(20)), validate_every=1)
    used_up = iter(lists(20))
    estimator = make().train(lists(20))
    estimator.evaluate(used_up)
    with pytest.raises(check.DataError, match="no example: it is empty, or was used up"):
        estimator.evaluate(used_up)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([(X, Y)], r"an iterable of tuple.*such as \{"),
        (rows(0, 9), r"single batch make a list: \[batch\]"),
        (5, "an iterable of dicts of arrays, got 'int'"),
        ([rows(0, 0)], "has no examples"),
        ([{}], "at least one array"),
    ],
)
def test_what_is_no_data_is_told(data, said):
    opened = inspect.unwrap(feed.opened)  # without the tests' own check of types
    with pytest.raises(check.UserError, match=said):
        [feed.entries(batch) for batch in opened(data)]


# ---------------------------------------------------------------------- our own data sets, mapped


def doubled(batch):
    return {**batch, "image": 2 * batch["image"]}


def numbers(**options):
    return from_arrays(X, Y, batch_size=16, seed=3, **options)


def test_a_mapped_data_set_keeps_all_that_it_knew(caplog):
    data = numbers(epochs=1, classes=("a", "b", "c")).map(doubled)
    assert isinstance(data, Dataset)
    assert (data.steps_per_epoch, data.epochs, data.classes) == (5, 1, ("a", "b", "c"))
    assert data.element_spec["image"].shape == (16, 6)
    twice = [b["image"] for b in numbers(epochs=1)]
    assert_same([b["image"] for b in data], [2 * x for x in twice])
    assert_same([b["image"] for b in data.shard(1, 2)], [2 * x[8:] for x in twice])
    assert [float(b["mask"].sum()) for b in data.once()] == [16, 16, 16, 16, 6]
    assert make().train(data, steps=10).step == 10
    assert not caplog.records
    wide = data.map(lambda b: {**b, "image": np.tile(b["image"], (1, 2))})
    assert wide.element_spec["image"].shape == next(iter(wide))["image"].shape == (16, 12)


def test_a_mapped_data_set_is_resumed_bit_for_bit(tmp_path):
    whole = make("adam").train(numbers().map(doubled), steps=7)
    make("adam", workdir=tmp_path).train(numbers().map(doubled), steps=3)
    resumed = make("adam", workdir=tmp_path).train(numbers().map(doubled), max_steps=7)
    assert_same(whole.params, resumed.params)
    plain = make("adam").train(from_arrays(2 * X, Y, batch_size=16, seed=3), steps=7)
    assert_same(whole.params, plain.params)


class Twice(grain.transforms.Map):
    def map(self, element):
        return doubled(element)


def test_grains_map_transformation_is_a_map_and_others_are_refused():
    first = next(iter(numbers().apply(Twice())))
    assert_same(first, doubled(next(iter(numbers()))))
    refused = {
        "filter": (lambda b: True,),
        "batch": (2,),
        "seed": (0,),
        "random_map": (lambda b, rng: b,),
        "map_with_index": (lambda i, b: b,),
        "mp_prefetch": (),
    }
    for name, arguments in refused.items():
        with pytest.raises(check.ArgumentError, match=f"`{name}` would lose.*`map"):
            getattr(numbers(), name)(*arguments)


def test_what_grain_combines_is_not_read_whole_by_every_process(monkeypatch):
    whole = grain.IterDataset.mix([numbers(), numbers()])
    parts = grain.IterDataset.mix([numbers().shard(1, 2), numbers().shard(1, 2)])
    assert make().train(whole, steps=3).step == 3
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(check.ArgumentError, match=r"Call shard\("):
        feed.opened(whole)
    assert feed.opened(parts) is parts


# ---------------------------------------------------------------------- other libraries' data


class LikeHuggingFace:
    """With `datasets.Dataset`'s signatures."""

    def __iter__(self):
        return iter(lists(20, 20, 20))

    def repeat(self, num_times):
        raise AssertionError

    def shard(self, num_shards, index, contiguous=True):
        raise AssertionError


class LikeTensorFlow(LikeHuggingFace):
    """With `tf.data.Dataset`'s."""

    def repeat(self, count=None, name=None):
        raise AssertionError

    def shard(self, num_shards, index, name=None):
        raise AssertionError

    def once(self):  # nobody's, and not the whole protocol
        raise AssertionError


@pytest.mark.parametrize("kind", [LikeHuggingFace, LikeTensorFlow])
def test_methods_of_our_names_in_other_libraries_are_left_alone(kind, monkeypatch):
    estimator = make().train(kind(), steps=2)
    assert_same(estimator.params, make().train(lists(20, 20), steps=2).params)
    expected = np.mean(estimator.predict(lists(60)).argmax(1) == Y[:60])
    assert estimator.evaluate(kind())["accuracy"] == pytest.approx(expected, abs=1e-6)
    assert [p.names[0] for p in predictions(estimator, kind())] == ["0", "20", "40"]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    data = kind()
    assert feed.opened(data) is data


def test_the_protocol_asked_for_is_the_one_written_down():
    assert set(feed.PROTOCOL) <= {*dir(Dataset)}


class Source:
    def __len__(self):
        return 70

    def __getitem__(self, i):
        return {"image": X[i], "label": Y[i]}

    def __repr__(self):
        return "Source()"


class Batched:
    """An iterator of one's own whose state JSON does not have."""

    def __init__(self, shift=0):
        self.at, self.rng = (shift, 0), np.random.Generator(np.random.MT19937(0))

    def __iter__(self):
        return type(self)(self.at[0])

    def __next__(self):
        self.at = (self.at[0], self.at[1] + 1)
        some = self.rng.permutation(70)[:16]
        return {"image": X[some], "label": Y[some]}

    def get_state(self):
        return {
            "at": self.at,
            "rng": self.rng.bit_generator.state,
            3: b"\x00\xff",
            "n": np.int64(1),
        }

    def set_state(self, state):
        assert type(state["at"]) is tuple
        assert state[3] == b"\x00\xff"
        self.at, self.rng.bit_generator.state = state["at"], state["rng"]


def loader():
    sampler = grain.samplers.IndexSampler(70, shuffle=True, seed=1, num_epochs=None)
    batches = [grain.transforms.Batch(16, drop_remainder=True)]
    return grain.DataLoader(data_source=Source(), sampler=sampler, operations=batches)


def map_dataset():
    return grain.MapDataset.source(Source()).seed(1).shuffle().repeat().batch(16)


def iter_dataset():
    return (
        grain.MapDataset.source(Source())
        .seed(1)
        .shuffle()
        .repeat()
        .to_iter_dataset()
        .random_map(lambda b, rng: {**b, "image": b["image"] + np.float32(rng.normal())})
        .batch(16)
    )


@pytest.mark.parametrize(
    "data",
    [loader, pytest.param(map_dataset, marks=pytest.mark.slow), iter_dataset, Batched],
)
def test_any_iterator_with_a_position_is_resumed_bit_for_bit(data, tmp_path):
    whole = make("adam").train(data(), steps=9)
    make("adam", workdir=tmp_path).train(data(), steps=4)
    resumed = make("adam", workdir=tmp_path).train(data(), max_steps=9)
    assert_same(whole.params, resumed.params)


def test_other_data_than_before_begins_at_its_start():
    second = [dict(b) for b in itertools.islice(loader(), 2)]
    found = make("adam").train(loader(), steps=3).train(loader(), steps=2)
    assert_same(found.params, make("adam").train(loader(), steps=3).train(second, steps=2).params)


def test_a_position_of_other_data_or_one_that_cannot_be_kept_is_told(tmp_path, caplog):
    make(workdir=tmp_path).train(numbers(), steps=2)
    with pytest.raises(check.DataError, match="belongs to other data than this"):
        make(workdir=tmp_path).train(loader(), steps=2)
    make(workdir=tmp_path).train(lists(16, 16), steps=2)
    assert "keeps no position" in caplog.text

    class Odd(Batched):
        def get_state(self):
            return {"lock": object()}

    with pytest.raises(check.DataError, match="holds a object, which a checkpoint cannot keep"):
        make().train(Odd(), steps=1)


# ---------------------------------------------------------------------- batches of several sizes


def test_a_smaller_last_batch_trains_as_by_hand(caplog):
    estimator = make(optax.sgd(0.1), log_every=1)
    start = make(optax.sgd(0.1)).initialize(lists(32)).params
    estimator.train(lists(32, 32, 6))
    params = start
    for batch in lists(32, 32, 6):

        def loss(params, batch=batch):
            logits = MLP(widths=(8,), num_outputs=3, dropout=0.0).apply(
                {"params": params}, jnp.asarray(batch["image"])
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        estimator.params,
        params,
    )
    assert [r.getMessage() for r in caplog.records] == [
        "a batch of 6 examples: one more compilation of the step"
    ]
    estimator.train(lists(32, 6), steps=2)
    assert len(caplog.records) == 1  # compiled once


def test_compiling_for_a_smaller_batch_is_in_no_clock():
    traced = []

    def counted(params, x):
        traced.append(x.shape)
        return x @ params

    line = jdl.from_fns(lambda key, x: jnp.zeros((6, 3)), counted)
    clock = {"clock": lambda: float(len(traced))}  # it moves only while the model is traced
    estimator = jdl.classifier(line, "sgd", devices=ONE, **clock).train(lists(32, 32))
    before, traces, compiling = estimator.seconds, len(traced), estimator.compile_seconds
    estimator.train(lists(32, 6))
    assert len(traced) > traces
    assert estimator.seconds == before
    assert estimator.compile_seconds > compiling


@pytest.mark.parametrize("parallel", ["jit", pytest.param("fsdp", marks=pytest.mark.slow), "pmap"])
def test_smaller_batches_over_two_devices_give_the_numbers_of_one(parallel):
    data = lists(32, 32, 6)
    one = make(optax.sgd(0.1)).train(data)
    two = make(optax.sgd(0.1), parallel=parallel, devices=jax.devices()[:2]).train(data)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one.params, two.params
    )
    found, expected = two.evaluate(data), one.evaluate([rows(0, 70)])
    assert found == pytest.approx(expected, rel=1e-4)
    assert_same(two.predict(data).argmax(1), one.predict([rows(0, 70)]).argmax(1))
    with pytest.raises(check.ArgumentError, match=r"`batch_size`.*2 devices.*got 5.*Pad a smaller"):
        two.evaluate(lists(32, 5))
    with pytest.raises(check.ArgumentError, match=r"`batch_size`.*2 devices.*got 5"):
        two.train(lists(32, 5), steps=2)


def test_a_small_batch_that_slices_or_curvature_do_not_fit_is_told():
    with pytest.raises(check.ArgumentError, match=r"`microbatches` must be a divisor.* 6 examples"):
        make(microbatches=4).train(lists(32, 6))
    with pytest.raises(check.ArgumentError, match=r"`curvature_batch_size`.*1 and the batch's 6"):
        make("hf", curvature_batch_size=8).train(lists(32, 6))


# ---------------------------------------------------------------------- bytes


class Words(nn.Module):
    @nn.compact
    def __call__(self, words):
        return nn.Dense(4)(nn.Embed(7, 8)(words).reshape(len(words), -1))


def test_tokens_of_bytes_are_the_tokens_they_are():
    words = RNG.integers(0, 7, (96, 5))
    label = (words[:, 0] % 4).astype(np.int32)
    accuracy = []
    for kind in (np.uint8, np.int32):
        data = from_arrays({"image": words.astype(kind), "label": label}, batch_size=32, seed=0)
        estimator = jdl.classifier(Words(), optax.adam(0.05), devices=ONE)
        accuracy.append(estimator.train(data, steps=60).evaluate(data)["accuracy"])
    assert accuracy[0] == accuracy[1] > 0.9


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_bytes_are_scaled(channels):
    pixels = RNG.integers(0, 256, (8, 3, 2, channels), dtype=np.uint8)
    seen = jdl.from_fns(lambda key, x: jnp.zeros(()), lambda p, x: x.reshape(len(x), -1) + p)
    estimator = jdl.Estimator(seen, jdl.losses.squared_error, "sgd", devices=ONE)
    estimator.initialize([{"image": pixels}])
    found = estimator.predict([{"image": pixels}])
    np.testing.assert_allclose(found, pixels.reshape(8, -1) / 255, rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 6), (8, 3, 2), (8, 3, 2, 12), (8,)])
def test_other_bytes_reach_the_model_as_they_are_and_are_told_of(shape, caplog):
    some = RNG.integers(0, 256, shape, dtype=np.uint8)
    seen = jdl.from_fns(lambda key, x: jnp.zeros(()), lambda p, x: x)
    estimator = jdl.Estimator(seen, jdl.losses.squared_error, "sgd", devices=ONE)
    estimator.initialize([{"image": some}])
    found = estimator.predict([{"image": some}])
    assert found.dtype == np.uint8
    assert_same(found, some)
    assert len(caplog.records) == 1
    assert "0 to 255" in caplog.text


@pytest.mark.parametrize("compute_dtype", [None, "bfloat16"])
def test_bytes_that_may_be_pixels_or_tokens_are_no_numbers_to_a_dense_layer(compute_dtype):
    digits = {"image": RNG.integers(0, 256, (8, 6), dtype=np.uint8), "label": Y[:8]}
    with pytest.raises(check.ArgumentError, match=r"numbers for Dense, got 'uint8\[8, 6\]'"):
        make(compute_dtype=compute_dtype).train([digits])
    scaled = {**digits, "image": digits["image"].astype(np.float32) / 255}
    assert make(compute_dtype=compute_dtype).train([scaled]).step == 1

    def fn(features, labels, mode):
        return jdl.Spec(
            outputs=nn.Dense(3)(features), loss=jnp.zeros(8), optimizer="sgd", predictions=features
        )

    with pytest.raises(check.ArgumentError, match="numbers for Dense"):
        jdl.from_model_fn(fn, compute_dtype=compute_dtype, devices=ONE).train([digits])


# ---------------------------------------------------------------------- entries


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (
            {"adjacency": np.eye(7, dtype="f")},
            r"'image' has 70 rows, got \{'adjacency': \(7, 7\)\}",
        ),
        ({"a temperature": 0.5}, r"'image' has 70 rows, got \{'a temperature': \(\)\}"),
        ({"a name": "train.tar"}, r"'image' has 70 rows, got \{'a name': \(\)\}"),
        ({"names": ["one"]}, r"'image' has 70 rows, got \{'names': \(1,\)\}"),
        ({"ragged": [[1], [2, 3]]}, "entry 'ragged' makes no array"),
    ],
)
@pytest.mark.parametrize("devices", [1, 2])
def test_an_entry_that_has_not_a_row_an_example_is_named(extra, said, devices):
    batch = rows(0, 70) | extra
    estimator = make(devices=jax.devices()[:devices])
    with pytest.raises(check.UserError, match=said):
        estimator.train([batch])
    estimator.initialize([rows(0, 70)])
    with pytest.raises(check.UserError, match=said):
        estimator.evaluate([batch])


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_names_stay_on_the_host_and_come_back_with_the_predictions(parallel):
    names = [f"n{i}" for i in range(70)]
    mask = np.ones(70, np.float32)
    mask[[3, 69]] = 0.0
    batch = rows(0, 70) | {"a name": names, "mask": mask, "label": Y.tolist()}
    options = {"parallel": parallel, "devices": jax.devices()[:2]}
    estimator = make(**options).train([batch, batch])
    assert_same(estimator.params, make(**options).train([rows(0, 70) | {"mask": mask}] * 2).params)
    assert estimator.evaluate([batch])["loss"] > 0
    ((found, outputs),) = estimator.predict_batches([batch])
    kept = [n for n, m in zip(names, mask, strict=True) if m]
    assert found["a name"].tolist() == kept
    assert len(outputs) == len(found["image"]) == 68
    (part,) = predictions(estimator, [batch])
    assert part.names == [n.removeprefix("n") for n in kept]
    with pytest.raises(check.ArgumentError, match="`inputs` must be entries of numbers, got 'a na"):
        make(inputs=("image", "a name")).train([batch])


@pytest.mark.parametrize(
    ("optimizer", "parallel"), [pytest.param("hf", "jit", marks=pytest.mark.slow), ("adam", "pmap")]
)
def test_what_is_carried_is_cut_with_the_rest(optimizer, parallel):
    """Slices and curvature examples take each entry's own rows."""

    def loss(outputs, batch):
        return jdl.losses.softmax_cross_entropy(outputs, batch) * batch["a weight"]

    batch = rows(0, 64) | {"a weight": np.linspace(0, 2, 64, dtype="f")}
    found = []
    for cut in ({}, {"microbatches": 4}):
        net = MLP(widths=(8,), num_outputs=3, dropout=0.0)
        devices = jax.devices()[: 1 + (parallel == "pmap")]
        options = {"parallel": parallel, "devices": devices, **cut}
        found.append(jdl.Estimator(net, loss, optimizer, **options).train([batch] * 2).params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), *found)


def asks(outputs, batch):
    return batch["labels"] + outputs[:, 0]


@pytest.mark.parametrize(
    ("loss", "metrics", "said"),
    [
        (jdl.losses.softmax_cross_entropy, {}, "`loss` asks for 'label'; .* only 'image', 'name'"),
        (asks, {}, "`loss` asks for 'labels'"),
        (
            lambda o, b: o[:, 0],
            {"accuracy": jdl.metrics.accuracy},
            r"metrics\['accuracy'\]. asks f",
        ),
        (lambda o, b: o[:, 0], lambda o, b: {"x": asks(o, b)}, "`metrics` asks for 'labels'"),
        (lambda o, b: o[b["image"].ndim - 2 :, {}["k"]], {}, "`loss` asks for 'k'"),
    ],
)
def test_an_entry_that_loss_or_metrics_miss_is_named(loss, metrics, said):
    batch = {"image": X, "name": Y}
    net = MLP(widths=(8,), num_outputs=3)
    with pytest.raises(check.DataError, match=said):
        jdl.Estimator(net, loss, "sgd", metrics=metrics, devices=ONE).train([batch])
    estimator = jdl.Estimator(net, loss, "sgd", metrics=metrics, devices=ONE)
    with pytest.raises(check.DataError, match=said):
        estimator.initialize([batch]).evaluate([batch])
    with pytest.raises(check.DataError, match=r"`sums\['s'\]` asks for 'labels'"):
        make().initialize([rows(0, 70)]).evaluate([rows(0, 70)], sums={"s": asks})


def test_positions_of_our_own_stay_as_they_were(tmp_path):
    make(workdir=tmp_path).train(numbers(), steps=2)
    assert Checkpoints(tmp_path / "checkpoints").meta()["position"]["record"] == 32
