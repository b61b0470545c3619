"""Models of texts: their windows, samples against a naive loop, the commands, and mistakes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jdl.cli.main import main
from jdl.core.check import ArgumentError
from jdl.models import RNN, LanguageModel, rnn, transformer
from jdl.recipes import texts
from jdl.recipes.registry import RECIPES
from jdl.recipes.run_config import RunConfig

SYMBOLS, WINDOW = 7, 8
NETS = {
    "gpt": LanguageModel(SYMBOLS, width=8, depth=2, heads=2),
    "lstm": RNN(SYMBOLS, hidden=8, vocabulary=SYMBOLS, every_step=True),
}
GENERATE = {"gpt": transformer.generate, "lstm": rnn.generate}


def random_params(model):
    net, window = NETS[model], jnp.zeros((1, WINDOW), jnp.int32)
    params = jax.jit(net.init)(jax.random.key(3), window)["params"]
    return jax.tree.map(lambda x: 4 * x, params)  # so that texts are varied


def logits_of(model, params, text):
    """Logits [N, K] after each symbol given the last 8, or all: whole passes, without a loop."""
    apply, tokens = jax.jit(NETS[model].apply), np.array(text, np.int32)[None]
    if model == "lstm":
        return apply({"params": params}, tokens)[0]
    windows = np.lib.stride_tricks.sliding_window_view(tokens[0], WINDOW)[1:]
    first = apply({"params": params}, tokens[:, :WINDOW])[0]
    return (
        jnp.concatenate([first, apply({"params": params}, windows)[:, -1]])
        if len(windows)
        else first
    )


@pytest.mark.parametrize("given", [3, WINDOW + 4])
@pytest.mark.parametrize("model", NETS)
def test_at_temperature_0_each_symbol_is_the_most_likely(model, given):
    params = random_params(model)
    prompt = [(3 * i * i + 1) % SYMBOLS for i in range(given)]
    found = texts.continued(NETS[model], params, bytes(prompt), 2, 14, jax.random.key(0), 0.0)
    said = found[0].tolist()
    assert found[1].tolist() == said
    assert len(set(said)) > 1
    likely = np.argmax(logits_of(model, params, prompt + said), axis=-1)
    assert said == likely[given - 1 : -1].tolist()


@pytest.mark.parametrize("model", NETS)
def test_symbols_are_as_frequent_as_softmax_says(model):
    params, prompt = random_params(model), [1, 5, 2, 2, 0, 6, 3, 1]
    prompts = jnp.tile(jnp.array([prompt]), (50, 1))
    draw = jax.jit(lambda key: GENERATE[model](NETS[model], params, prompts, 1, key, 2.5))
    found = np.concatenate([np.asarray(draw(jax.random.key(seed)))[:, 0] for seed in range(80)])
    expected = jax.nn.softmax(logits_of(model, params, prompt)[-1] / 2.5)
    counts = np.bincount(found, minlength=SYMBOLS)
    expected = np.asarray(expected, np.float64)
    assert stats.chisquare(counts, 4000 * expected / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("model", NETS)
def test_a_sample_s_program_does_not_grow_with_its_length(model):
    params, prompt = random_params(model), jnp.ones((1, 2), jnp.int32)

    def program(steps):
        def sample(key):
            return GENERATE[model](NETS[model], params, prompt, steps, key)

        return jax.make_jaxpr(sample)(jax.random.key(0))

    assert len(str(program(5)).splitlines()) == len(str(program(50)).splitlines())
    (loop,) = [
        e for e in program(50).eqns if e.primitive.name == "scan" and e.params["length"] == 50
    ]
    assert loop.outvars[-1].aval.shape == (50, 1)


def test_prompts_are_checked():
    params = random_params("gpt")
    with pytest.raises(ArgumentError, match=r"`prompt` must be numbers in \[0, 7\)"):
        transformer.generate(NETS["gpt"], params, np.array([[7]]), 1, jax.random.key(0))
    with pytest.raises(ArgumentError, match=r"`prompt` must be of shape \[B, N\]"):
        transformer.generate(NETS["gpt"], params, np.zeros((1, 0), int), 1, jax.random.key(0))


def test_a_text_s_end_is_held_out(tmp_path):
    path = tmp_path / "a.txt"
    text = np.random.default_rng(0).integers(1, 256, 4001).astype(np.uint8)
    path.write_bytes(text.tobytes())
    name = str(path)

    def whole(split):
        batches = [*texts.batches_of(name, split=split, batch_size=7)]
        found = [b["tokens"][b.get("mask", np.ones(7)) > 0] for b in batches]
        return np.concatenate(found)

    cut = 4001 - 500
    train, test = whole("train"), whole("test")
    for windows, part in ((train, text[:cut]), (test, text[cut:]), (whole(None), text)):
        np.testing.assert_array_equal(windows[0], part[:128])
        np.testing.assert_array_equal(windows[-1], part[-128:])
        pairs = {tuple(x) for x in np.lib.stride_tricks.sliding_window_view(part, 2).tolist()}
        predicted = np.lib.stride_tricks.sliding_window_view(windows, 2, axis=1).reshape(-1, 2)
        assert {tuple(x) for x in predicted.tolist()} == pairs
    shuffled = texts.batches_of(name, split="train", batch_size=7, shuffle=True, seed=0)
    assert shuffled.num_records == cut - 128 + 1
    every = text[:cut].tobytes()
    for _, batch in zip(range(20), shuffled, strict=False):
        assert all(row.astype(np.uint8).tobytes() in every for row in batch["tokens"])


def test_the_generated_text_is_the_chain_of_the_problem():
    from jdl.compare.catalogue import by_name

    lines = bytes(texts.chain()).split(b"\n")
    assert len(lines) == 4097
    assert lines[-1] == b""
    problem = by_name("lstm-bytes")
    (batch,) = problem.test(512, 0, 1)
    assert [bytes((row + ord("a")).astype(np.uint8)) for row in batch["image"]] == lines[:512]


def test_a_long_text_is_evaluated_in_part(tmp_path):
    path = tmp_path / "long"
    path.write_bytes(b"x" * 5_000_000)
    assert texts.batches_of(str(path), split="train", batch_size=9).num_records == 4096
    more = texts.batches_of(str(path), split="train", batch_size=9, shuffle=True)
    assert more.num_records == 1 << 20


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "must have at least 256 bytes for a model of texts; it has 0"),
        (b"x" * 255, "it has 255"),
        (b"\0" * 999, "is not text: it has bytes of 0"),
        (None, "{path} is not a text file; a model of texts needs one"),
    ],
)
@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_what_is_no_text_is_refused(model, content, said, tmp_path, capsys):
    path = tmp_path / "given"
    path.mkdir() if content is None else path.write_bytes(content)
    run = tmp_path / "run"
    assert main(["train", model, "--data", str(path), "--workdir", str(run)]) == 2
    error = capsys.readouterr().err
    assert said.format(path=path) in error
    assert len(error.splitlines()) == 1
    assert not run.exists()


def configured(path, model, data, shape):
    RunConfig(model, data, "adam", 64, 1, 0, shape, True, (), "raise").save(path, {})


@pytest.mark.parametrize(
    ("command", "given", "said"),
    [
        ("sample", ["--class", "1"], "`--class` must be left out"),
        ("sample", ["--out", "a.png"], "`--out` must be a .txt file, for texts"),
        ("sample", ["--prompt", ""], "`--prompt` must be of at least one byte"),
        ("sample", ["--length", "0"], "`--length` must be at least 1"),
        ("sample", ["--temperature", "-1"], "`--temperature` must be"),
        ("sample", [], "has no checkpoint yet"),
        ("predict", ["--out", "p.npz"], "whose predictions are texts: see `jdl sample`"),
        ("evaluate", ["--top-k", "2"], "--top-k is for classifiers"),
        ("evaluate", ["--split", "validation"], "`--split` must be one of train, test, all"),
        ("evaluate", ["--data", "digits"], "digits is not a text file"),
        ("train", ["--flip"], "`--flip` must be left out: the data are no images"),
        ("train", ["--size", "9"], "`--size` must be left out: a text has no size or color"),
    ],
)
def test_what_a_text_does_not_have_is_said(command, given, said, tmp_path, capsys):
    configured(tmp_path / "run", "gpt", "chain", (128,))
    model = ["gpt"] if command == "train" else []
    assert main([command, *model, "--workdir", str(tmp_path / "run"), *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_pictures_have_no_prompt_and_images_are_no_text(tmp_path, capsys):
    configured(tmp_path, "gan", "digits", (8, 8, 1))
    for given in (["--prompt", "a"], ["--length", "9"]):
        assert main(["sample", "--workdir", str(tmp_path), *given]) == 2
        assert "must be left out: its samples are no texts" in capsys.readouterr().err
    assert main(["train", "cnn", "--data", "chain", "--workdir", str(tmp_path / "a")]) == 2
    assert "`--data` must be images for this model" in capsys.readouterr().err


def test_layers_of_a_text_s_model_are_not_drawn(tmp_path, capsys):
    configured(tmp_path / "run", "gpt", "chain", (128,))
    assert main(["activations", str(tmp_path / "run"), "--list"]) == 2
    assert "holds a gpt that has no image inputs" in capsys.readouterr().err


def test_a_summary_counts_the_parameters_of_a_text_s_model(capsys):
    assert main(["summary", "lstm", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["image_shape"] == [128]
    assert found["parameters"] == 4 * (256 * 256 + 256 * 256 + 256) + 256 * 256 + 256


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "net"),
    [
        ("gpt", LanguageModel(width=16, depth=1, heads=2)),
        ("lstm", RNN(256, hidden=16, vocabulary=256, every_step=True)),
    ],
)
def test_a_model_learns_a_text_and_says_it(model, net, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, model, RECIPES[model]._replace(build=lambda *_: net))
    (tmp_path / "a.txt").write_text("abcdéf\n" * 80, encoding="utf-8")
    given = ["--data", "a.txt", "--batch-size", "8", "--learning-rate", "3e-2"]
    run = f"runs/{model}-a.txt-adam"
    for steps in ("40", "80"):  # the second goes on
        assert main(["train", model, *given, "--steps", steps]) == 0
    assert "windows of 128 bytes of a.txt, adam" in capsys.readouterr().out
    assert main(["evaluate", "--workdir", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / np.log(2), rel=1e-5)
    assert found["bits_per_byte"] < 0.5

    def said(*flags):
        assert main(["sample", "--workdir", run, *flags]) == 0
        printed = capsys.readouterr().out
        return (tmp_path / run / "sampled.txt").read_text(encoding="utf-8"), printed

    cold, printed = said("--count", "1", "--temperature", "0", "--prompt", "cdé", "--length", "156")
    assert cold == "cdéf\n" + 19 * "abcdéf\n" + "ab\n"
    assert printed == cold + f"1 text: {run}/sampled.txt\n"
    warm = ["--temperature", "3", "--length", "40"]
    first, again, other = (said(*warm, "--seed", seed)[0] for seed in "112")
    assert first == again != other
    assert first.startswith("--- 1 ---\n")
