"""The named problems, against SciPy and hand-written files; errors for missing data."""

import io
import itertools
import struct
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import interpolate

from jdl import losses
from jdl.compare import CATALOGUE, by_name, catalogue, mnist, texts
from jdl.compare.curves_dataset import _blurred, curves, spline
from jdl.compare.problems import arrays_problem
from jdl.compare.results import Target
from jdl.core.check import ArgumentError, DataError, UserError
from jdl.core.model import as_model
from jdl.models import MLP
from jdl.train.step import scale_images


def rows(batches, name="image"):
    found = []
    for batch in batches:
        kept = np.asarray(batch.get("mask", np.ones(len(batch[name])))) > 0
        found.append(np.asarray(batch[name])[kept])
    return np.concatenate(found)


def idx(path, array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture(scope="module")
def small_mnist(tmp_path_factory):
    """A folder of four files in MNIST's format, 40 and 20 images."""
    folder, rng = tmp_path_factory.mktemp("mnist"), np.random.default_rng(0)
    for part, n in (("train", 40), ("t10k", 20)):
        idx(folder / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28), np.uint8))
        idx(folder / f"{part}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10)
    return folder


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A tar of 40 gray pictures without folders for training and test."""
    path, rng = tmp_path_factory.mktemp("faces") / "faces.tar", np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(40):
            data = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (30, 30), np.uint8)).save(data, "PNG")
            member = tarfile.TarInfo(f"someone/{i}.png")
            member.size = len(data.getvalue())
            tar.addfile(member, io.BytesIO(data.getvalue()))
    return path


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_named_problem_gives_a_loss_an_example(name, small_mnist, faces):
    data = {"MNIST": small_mnist, "faces": faces, "": None}[CATALOGUE[name].needs]
    problem = by_name(name, data)
    own = {"gpt-bytes": "-sums", "lstm-bytes": "-chain"}
    assert problem.name == name + own.get(name, "-digits" if CATALOGUE[name].takes else "")
    assert problem.version == 1
    batch = next(iter(problem.train(min(4, problem.size), 0, 1)))
    model = as_model(problem.model())

    def each(batch):
        batch = scale_images(batch, "image")
        params, state = model.init(jax.random.key(0), batch["image"])
        outputs, _ = model.apply(params, state, batch["image"], key=None, train=False)
        return problem.loss(outputs, batch)

    batch = jax.tree.map(jnp.asarray, dict(batch))
    found = jax.eval_shape(each, batch)
    assert found.shape == (min(4, problem.size),)
    if name in ("logistic", "quadratic", "rosenbrock"):
        assert bool(jnp.isfinite(each(batch)).all())
    metrics = {f"{s}_{m}" for s in problem.evaluated() for m in ("loss", *problem.metrics)}
    assert problem.target.metric in metrics
    if problem.split is not None:
        held = len(rows(problem.split.validation(64, 0, 1)))
        assert held + problem.split.size == problem.size
        assert 0.05 < held / problem.size < 0.35


def test_validation_is_no_part_of_what_tuning_trains_on():
    data = {"image": np.arange(60, dtype=np.float32)[:, None], "label": np.zeros(60, np.int32)}
    problem = arrays_problem(
        "p",
        lambda: None,
        lambda outputs, batch: outputs,
        data,
        target=Target("train_loss", "at most", 0.0),
    )
    train = rows(problem.split.train(7, 0, 1)).ravel()
    validation = rows(problem.split.validation(7, 0, 1)).ravel()
    assert len(validation) == 10
    assert sorted([*train, *validation]) == list(range(60))


def test_the_digits_validation_comes_from_their_training_images():
    problem = by_name("digits-cnn")
    whole = {x.tobytes() for x in rows(problem.train(256, 0, 1))}
    parts = [{x.tobytes() for x in rows(d(256, 0, 1))} for d in problem.split[:2]]
    assert parts[0] | parts[1] == whole
    assert len(rows(problem.split.train(256, 0, 1))) == problem.split.size


def test_splines_are_scipys():
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(2, 22, (50, 3)), axis=1) + 2 * np.arange(3)
    y = rng.uniform(2, 26, (50, 3))
    at = x[:, :1] + (x[:, 2:] - x[:, :1]) * np.linspace(0, 1, 31)
    found = spline(x, y, at)
    for i in range(50):
        exact = interpolate.CubicSpline(x[i], y[i], bc_type="natural")(at[i])
        np.testing.assert_allclose(found[i], exact, atol=1e-9)


def test_curves_are_the_same_whatever_their_number_and_lie_where_points_may():
    few, more = curves(5), curves(1200)
    np.testing.assert_array_equal(few, more[:5])
    assert len({x.tobytes() for x in more}) == 1200
    assert not np.array_equal(few, curves(5, seed=1))
    columns = more[..., 0].sum(axis=(0, 1))
    assert columns[0] == 0 or columns[0] < 0.02 * columns.max()  # blurred, no point lies there
    assert (more.max(axis=(1, 2, 3)) > 40).all()


def test_blurring_keeps_the_ink_inside():
    x = np.zeros((1, 28, 28))
    x[0, 9, 12] = 1.0
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    np.testing.assert_allclose(_blurred(x)[0, 8:11, 11:14], kernel)
    assert _blurred(x).sum() == pytest.approx(1.0)


def test_the_logistic_optimum_is_scipys():
    from scipy import optimize

    data = catalogue._digits("train")
    x = data["image"].reshape(len(data["image"]), -1) / 255.0
    onehot = np.eye(10)[data["label"]]

    def f(v):
        w, b = v[:640].reshape(64, 10), v[640:]
        z = x @ w + b
        shifted = np.exp(z - z.max(axis=1, keepdims=True))
        p = shifted / shifted.sum(axis=1, keepdims=True)
        log_z = np.log(shifted.sum(axis=1)) + z.max(axis=1)
        value = np.mean(log_z - (z * onehot).sum(axis=1)) + 0.5 * catalogue.DECAY * np.sum(w * w)
        g = (p - onehot) / len(x)
        return value, np.concatenate([(x.T @ g + catalogue.DECAY * w).ravel(), g.sum(axis=0)])

    options = {"maxfun": 700}
    found = optimize.minimize(f, np.zeros(650), jac=True, method="L-BFGS-B", options=options)
    assert found.fun == pytest.approx(catalogue.LOGISTIC_OPTIMUM, rel=2e-5)
    assert found.fun > catalogue.LOGISTIC_OPTIMUM * (1 - 1e-9)


def test_the_regularizer_is_part_of_the_training_loss():
    from jdl.compare.feeds import Evaluation

    problem = by_name("logistic")
    evaluation = Evaluation(problem)
    params, state = as_model(problem.model()).init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
    plain = Evaluation(problem._replace(regularizer=None))(params, state)
    found = evaluation(params, state)
    penalty = 0.5e-3 * float(jnp.sum(jnp.square(params["outputs"]["kernel"])))
    assert found["train_loss"] - plain["train_loss"] == pytest.approx(penalty, rel=1e-4)
    assert found["test_loss"] == plain["test_loss"]


def test_sanity_problems_are_what_they_say():
    problem = by_name("rosenbrock")
    batch = jax.tree.map(jnp.asarray, dict(next(iter(problem.train(1, 0, 1)))))
    outputs, _ = as_model(problem.model()).apply({"x": jnp.array([0.5, -1.0])}, {}, batch["image"])
    value = float(problem.loss(outputs, batch)[0])
    assert value == pytest.approx(0.5 * (100 * (-1 - 0.25) ** 2 + 0.25), rel=1e-5)
    problem = by_name("quadratic")
    batch = jax.tree.map(jnp.asarray, dict(next(iter(problem.train(1, 0, 1)))))
    outputs, _ = as_model(problem.model()).apply({"x": jnp.zeros(100)}, {}, batch["image"])
    expected = 0.5 * np.geomspace(1, 1e-4, 100).sum()
    assert float(problem.loss(outputs, batch)[0]) == pytest.approx(expected, rel=1e-4)


def test_sgd_on_the_noisy_quadratic_is_as_its_closed_form_says():
    problem = catalogue.noisy_quadratic(dimension=20)
    data = {k: jnp.asarray(x) for k, x in next(iter(problem.train(8192, 0, 1))).items()}
    apply = problem.model().apply

    def mean_loss(x, rows):
        batch = {k: data[k][rows] for k in ("image", "label")}
        return problem.loss(apply({"x": x}, {}, batch["image"])[0], batch).mean()

    least = float(mean_loss(jnp.ones(20), jnp.arange(8192)))
    assert least == pytest.approx(0.5 * 20 * 1e-3, rel=1e-4)
    rate, size, steps, start = 0.5, 4, 60, np.linspace(-0.2, 0.3, 20)

    def run(key):
        def step(x, key):
            rows = jax.random.randint(key, (size,), 0, 8192)
            return x - rate * jax.grad(mean_loss)(x, rows), None

        x, _ = jax.lax.scan(step, jnp.asarray(1 + start, jnp.float32), jax.random.split(key, steps))
        h = 1.0 / jnp.arange(1.0, 21.0)
        return 0.5 * (h * (x - 1.0) ** 2).sum()

    measured = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 400)))
    expected = catalogue.sgd_excess(start, rate, size, steps)
    spread = measured.std() / 400**0.5
    assert abs(measured.mean() - expected) < 3.5 * spread
    assert spread < 0.02 * expected


def test_the_outputs_for_poisson_s_equation_are_its_residuals():
    problem = by_name("pinn-poisson")
    x = jnp.asarray(rows(problem.train(1024, 0, 1))[:5])
    model = problem.model()
    params, _ = model.init(jax.random.key(0), x)
    apply = jax.jit(lambda x: model.apply(params, {}, x)[0])
    outputs, h = apply(x), 0.03
    near = [apply(x + h * jnp.asarray(d, jnp.float32)[None])["u"] for d in np.eye(2)]
    near += [apply(x - h * jnp.asarray(d, jnp.float32)[None])["u"] for d in np.eye(2)]
    laplacian = (sum(near) - 4 * outputs["u"]) / h**2
    f = 2 * np.pi**2 * np.prod(np.sin(np.pi * np.asarray(x)), axis=1, keepdims=True)
    np.testing.assert_allclose(outputs["residual"], (laplacian + f) / (2 * np.pi**2), atol=2e-2)
    border = apply(jnp.array([[0.0, 0.3], [1.0, 0.2], [0.6, 0.0], [0.1, 1.0]]))["u"]
    np.testing.assert_allclose(border, 0.0, atol=1e-6)


def test_the_outputs_for_burgers_equation_are_its_residuals():
    problem = by_name("pinn-burgers")
    points = jnp.asarray(rows(problem.train(1024, 0, 1))[:5])
    model = problem.model()
    params, _ = model.init(jax.random.key(0), points)
    apply = jax.jit(lambda x: model.apply(params, {}, x)[0])
    outputs, h = apply(points), 0.01
    u = np.asarray(outputs["u"])
    right, left, later, earlier = (
        np.asarray(apply(points + jnp.asarray([step], jnp.float32))["u"])
        for step in ((h, 0), (-h, 0), (0, h), (0, -h))
    )
    slope, bend = (right - left) / (4 * h), (right + left - 2 * u) / (2 * h) ** 2  # x = 2 p - 1
    residual = (later - earlier) / (2 * h) + u * slope - 0.05 * bend
    np.testing.assert_allclose(outputs["residual"], residual, atol=2e-2)
    # At t = 0 and at the ends it has the solution's values.
    edge = np.array([[0.3, 0.0], [0.9, 0.0], [0.0, 0.6], [1.0, 0.8]], np.float32)
    x, t = 2 * edge[:, :1] - 1, edge[:, 1:]
    front = 0.5 - 0.5 * np.tanh((x - t / 2) / 0.2)
    np.testing.assert_allclose(apply(jnp.asarray(edge))["u"], front, atol=1e-6)


def test_the_curve_fit_is_that_of_nist():
    """Lanczos1: y(0) = 2.5134, y(1.15) = 0.0623932 …; the certified parameters give no residual."""
    problem = by_name("curve-fit")
    (batch,) = problem.train(24, 0, 1)
    order = np.argsort(batch["image"][:, 0])
    y = np.asarray(batch["label"])[order]
    np.testing.assert_allclose(y[[0, 1, -1]], [2.5134, 2.04433337, 0.0623931], rtol=1e-5)
    params = {"amplitude": jnp.array([0.0951, 0.8607, 1.5576]), "rate": jnp.array([1.0, 3.0, 5.0])}
    outputs, _ = problem.model().apply(params, {}, jnp.asarray(batch["image"]))
    assert float(jnp.mean(problem.loss(outputs, batch))) < 1e-13


def test_the_least_loss_of_the_markov_chain_is_that_of_its_frequencies():
    x, least = texts.markov(40_000, 12, np.random.default_rng(3))
    counts = np.zeros((8, 8, 8))
    np.add.at(counts, (x[:, :-2], x[:, 1:-1], x[:, 2:]), 1)
    first = np.zeros((8, 8))
    np.add.at(first, (x[:, 0], x[:, 1]), 1)

    def conditional(counts):
        p = counts / counts.sum(-1, keepdims=True).clip(1)
        return -(counts * np.log(p, where=p > 0, out=np.zeros_like(p))).sum() / counts.sum()

    assert (conditional(first) + 10 * conditional(counts)) / 11 == pytest.approx(least, rel=0.01)


def test_all_sums_are_there_and_none_is_in_both_halves():
    problem = by_name("gpt-bytes")
    train, test = (rows(d(64, 0, 1)) for d in (problem.train, problem.test))
    labels = rows(problem.train(64, 0, 1), "label")
    assert ((train[:, 0] + train[:, 1]) % 31 == labels).all()
    sums = {tuple(x) for x in np.concatenate([train, test])}
    assert sums == {(a, b, 31) for a in range(31) for b in range(31)}
    assert len(train) == 672
    assert len(test) == 289


def test_a_text_is_cut_into_pieces_from_all_of_it(tmp_path):
    path = tmp_path / "a text, mine.txt"
    path.write_text("".join(chr(48 + i // 6400 % 60) for i in range(640_000)))
    problem = by_name("gpt-bytes", path)
    assert (problem.name, problem.size) == ("gpt-bytes-a_text_mine", 3584)
    x = np.concatenate([rows(d(512, 0, 1)) for d in (problem.train, problem.test)])
    assert x.shape == (4096, 64)
    assert set(np.unique(x)) == set(range(48, 108))
    assert problem.target.metric == "test_loss"
    path.write_text("ab" * 2048)
    problem = by_name("lstm-bytes", path)
    assert problem.size == 56
    assert problem.target.threshold == pytest.approx(0.75 * np.log(2), rel=5e-3)
    path.write_bytes(b"a" * 4000)
    with pytest.raises(DataError, match="at least 4,096 bytes"):
        by_name("gpt-bytes", path)
    path.write_bytes(b"\0" * 5000)
    with pytest.raises(DataError, match="is not text"):
        by_name("lstm-bytes", path)
    with pytest.raises(DataError, match="is not a text file; lstm-bytes needs one"):
        by_name("lstm-bytes", tmp_path)


@pytest.mark.parametrize("name", ["vit-images", "resnet-images"])
def test_images_may_be_the_user_s(name, faces):
    problem = by_name(name, faces)
    assert problem.size == 40
    assert str(problem.target) == "train accuracy ≥ 90 %"
    assert problem.about["image"] == "64×64×3"


def test_a_full_batch_is_cut_so_that_what_its_gradient_keeps_fits(tmp_path):
    from jdl.compare.feeds import MICROBATCH_BYTES, kept_bytes, training
    from jdl.compare.optimizers import named

    net = MLP(widths=(6,), num_outputs=2, activation="tanh")
    x = np.ones((9, 5), np.float32)
    goal = Target("train_loss", "at most", 0.0)
    data = {"image": x, "label": np.zeros((9, 2), np.float32)}
    problem = arrays_problem("p", lambda: net, losses.squared_error, data, target=goal)
    # The input, the tanh's output or slope, the error.
    assert 4 * (5 + 6 + 2) <= kept_bytes(problem) <= 4 * 3 * (5 + 6 + 2)
    (tmp_path / "text").write_text("some text " * 40_000)
    problem = by_name("gpt-bytes", tmp_path / "text")
    found = training(problem, named("lbfgs"), 0)
    assert found.microbatches == -(-kept_bytes(problem) * problem.size // MICROBATCH_BYTES) > 1


def test_a_batch_is_filled_up_with_its_own_examples():
    from jdl.compare.feeds import _padded

    (batch,) = _padded([{"image": np.array([[1.0], [2.0]])}], 5)
    assert batch["image"].ravel().tolist() == [1.0, 2.0, 1.0, 2.0, 1.0]
    assert batch["mask"].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


TODAY = ("gpt-bytes", "lstm-bytes", "vit-images", "resnet-images", "pinn-poisson")
METHODS = ("adamw", "kfac", "muon", "soap", "shampoo", "hf", "lbfgs")
# Each method and each problem, K-FAC on all; the others before a release.
OFTEN = (
    *(("kfac", name) for name in (*TODAY, "noisy-quadratic")),
    *(("adamw", "noisy-quadratic"), ("lbfgs", "gpt-bytes"), ("shampoo", "gpt-bytes")),
    *(("hf", "lstm-bytes"), ("hf", "pinn-poisson"), ("muon", "vit-images")),
    ("soap", "resnet-images"),
)


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        pytest.param(*pair, marks=pytest.mark.slow if pair in OFTEN else pytest.mark.release)
        for pair in itertools.product(METHODS, (*TODAY, "noisy-quadratic"))
    ],
)
def test_every_kind_of_method_trains_today_s_problems(optimizer, name, tmp_path):
    from jdl.compare import Budget, Study

    budget = Budget(3, "steps")
    options = {"budget": budget, "evaluations": 2, "workdir": tmp_path}
    (trial,) = Study(by_name(name), [optimizer], **options).run().trials
    assert trial.status == "done", trial.words
    loss = [row["train_loss"] for row in trial.evaluations]
    assert np.isfinite(loss).all()
    assert loss[-1] != loss[0]


def test_mnist_is_read_from_files_and_from_a_tar_alike(small_mnist, tmp_path):
    from jdl.data.pack import pack

    found = mnist.read(small_mnist, "x")
    assert (found.x.shape, found.test_x.shape) == ((40, 28, 28, 1), (20, 28, 28, 1))
    pack(str(small_mnist), str(tmp_path / "mnist-%05d.tar"))
    packed = mnist.read(str(next(tmp_path.glob("*.tar"))), "x")
    for name in ("x", "y", "test_x", "test_y"):
        one, other = getattr(found, name), getattr(packed, name)
        order = [np.lexsort(a.reshape(len(a), -1).T) for a in (one, other)]
        np.testing.assert_array_equal(one[order[0]], other[order[1]])


def test_missing_data_are_reported_with_what_to_pass(small_mnist, tmp_path):
    with pytest.raises(DataError, match=r"mnist-mlp needs MNIST.*--data.*train-images-idx3-ubyte"):
        by_name("mnist-mlp")
    with pytest.raises(DataError, match="autoencoder-faces needs"):
        by_name("autoencoder-faces")
    with pytest.raises(UserError):
        by_name("mnist-mlp", tmp_path)
    for path in small_mnist.iterdir():
        if "t10k-labels" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="has no t10k-labels-idx1-ubyte"):
        by_name("mnist-mlp", tmp_path)
    idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(DataError, match="not bytes"):
        by_name("mnist-mlp", tmp_path)
    with pytest.raises(ArgumentError, match="Did you mean 'digits-cnn'"):
        by_name("digit-cnn")


def test_fewer_examples_are_the_first_ones(small_mnist):
    problem = catalogue.autoencoder_mnist(small_mnist, examples=10, validation=0.0)
    assert problem.size == 10
    assert problem.split is None
    np.testing.assert_array_equal(rows(problem.train(4, 0, 1)), mnist.read(small_mnist, "x").x[:10])
    with pytest.raises(ArgumentError, match="at most 40"):
        catalogue.autoencoder_mnist(small_mnist, examples=41)


# ------------------------------------------------------------------ a file of the user's own

GOOD = """
import numpy as np
from beside import WIDTH
from jdl.models import MLP

rng = np.random.default_rng(0)
x = rng.normal(size=(30, WIDTH))
model = MLP(widths=(), num_outputs=2)
loss = "softmax_cross_entropy"
data = {"image": x, "label": (x[:, 0] > 0).astype(np.int64)}
"""


@pytest.fixture
def write(tmp_path):
    (tmp_path / "beside.py").write_text("WIDTH = 3\n")

    def written(text):
        path = tmp_path / "mine.py"
        path.write_text(text)
        return str(path)

    return written


def test_a_problem_file_is_a_problem(write):
    problem = by_name(write(GOOD))
    assert problem.name == "mine"
    assert problem.size == 30
    assert str(problem.target) == "train accuracy ≥ 90 %"
    assert problem.split.size == 25
    told = GOOD + 'target = ("test_loss", "at most", 0.5)\ntest = data\nversion = 3\n'
    problem = by_name(write(told))
    assert problem.target == Target("test_loss", "at most", 0.5)
    assert problem.version == 3


def test_a_problem_file_that_changed_is_reported_from_what_it_was(write):
    abouts = [by_name(write(text)).about for text in (GOOD, GOOD, GOOD + "# another\n")]
    assert abouts[0] == abouts[1] != abouts[2]


def test_without_labels_the_target_is_a_tenth_of_the_first_loss(write):
    problem = by_name(
        write("""
import jax.numpy as jnp
import numpy as np
import jdl

def init(key, x):
    return jnp.full(3, 2.0)

def loss(outputs, batch):
    return jnp.sum(outputs * outputs, axis=1)

model = jdl.from_fns(init, lambda p, x: p[None] * x)
data = {"image": np.ones((4, 3))}
""")
    )
    assert problem.target == Target("train_loss", "at most", 1.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_this_name\n", r"line 1: ModuleNotFoundError: No module named"),
        ("x = 1\ny = (\n", r"line 2: SyntaxError"),
        ("\n\n1 / 0\n", r"line 3: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)\n", r"line 1: SystemExit"),
        ("model = loss = 1\n", "it lacks data"),
        (GOOD + "loss = 'softmax'\n", "must be one of softmax_cross_entropy"),
        (GOOD + "data = [1, 2]\n", "must be a dict of arrays"),
        (GOOD + "data = {'image': x, 'label': x[:4, 0]}\n", "equal length"),
        (GOOD + "inputs = 'picture'\n", "among"),
        (GOOD + "def loss(outputs, batch):\n    return outputs\n", "a value an example"),
        (GOOD + "def loss(outputs, batch):\n    return outputs.nothing\n", "line 12: Attribute"),
        (GOOD + "target = ('test_loss', 'at most', 1)\n", "one of train_loss, train_accuracy"),
        (GOOD + "target = 'low'\n", "such as"),
    ],
)
def test_mistakes_in_a_problem_file_are_reported_in_a_line(write, text, message):
    with pytest.raises(UserError, match=message) as told:
        by_name(write(text))
    assert "\n" not in str(told.value)


TOLD = {  # what a file of 10 lines adds from its line 11 on, and what is said about it
    "strings": ("data['label'] = np.array(['a', 'b'] * 15)", "line 10: .*asks for 'label'.*unique"),
    "objects": ("data['label'] = np.array([{}] * 30)", "line 10: `label` must be an array of num"),
    "ragged": ("data['image'] = [[1, 2]] * 29 + [[3]]", "line 10: ValueError: .*inhomogeneous"),
    "rows": ("data = {'image': x, 'label': x[:4, 0]}", "line 11: .*equal length"),
    "none": ("data = {'image': x[:0]}", "line 11: .*at least 1"),
    "large": ("data['label'][9] = 2**40", "line 10: `label` must be integers of 32 bits"),
    "classes": ("data['label'][9] = 7", r"line 10: .*class numbers in \[0, 2\), got \[7\]"),
    "negative": ("data['label'][9] = -1", r"line 10: .*class numbers in \[0, 2\), got \[-1\]"),
    "in test": (
        "test = {'image': x, 'label': data['label'] + 1}",
        r"line 11: .*class numbers in \[0, 2\), got \[2\]",
    ),
    "another shape": ("test = {'image': x[:, :2], 'label': data['label']}", "line 11: Scope"),
    "floats": ("data['label'] = data['label'] * 1.0", "line 10: .*must be of an integer type"),
    "nan": ("x[9, 1] = np.nan", "line 9: `loss` must be finite.* image from nan to nan"),
    "infinite": ("data['image'][9, 1] = np.inf", "line 9: `loss` must be finite.* to inf"),
    "mean loss": ("def loss(o, b):\n    return (o * o).mean()", r"line 11: .*an example.*got \(\)"),
    "fixed loss": (
        "def loss(o, b):\n    return np.asarray(o).sum(axis=1)",
        "line 12: TracerArrayConversionError",
    ),
    "no loss": ("loss = 3", "line 11: `loss` must be a function or a name, got 3"),
    "model": ("model = lambda: MLP(wide=3)", "line 11: TypeError: .*'wide'"),
    "class": ("model = MLP", "line 11: .*It is a class"),
    "too small": ("from jdl.models import CNN\nmodel = CNN()", r"line 12: .*\[B, H, W, C\]"),
    "no metric": ("metrics = {'f': 1}", "line 11: `metrics` must be a dict of functions, or"),
    "metric": (
        "metrics = {'m': lambda o, b: o.mean()}",
        r"line 11: .*an example.*got \(\).*\['m'\]",
    ),
    "metric error": ("metrics = {'m': lambda o, b: b['x']}", "line 11: .*asks for 'x'"),
    "one metric": ("def metrics(o, b):\n    return o[:, 0]", "line 11: .*that returns a dict"),
    "taken": ("metrics = {'loss': lambda o, b: o[:, 0]}", "line 11: .*named other than 'loss'"),
    "target": ("target = ('train_acuracy', 'at least', 1)", "line 11: .*mean 'train_accuracy'"),
    "goal": ("target = ('train_loss', 'below', 1)", "line 11: .*one of at least, at most"),
    "number": ("target = ('train_loss', 'at most', 'x')", "line 11: ValueError"),
    "validation": ("validation = 2", r"line 11: .*a number in \[0.0, 0.9\], got 2"),
    "version": ("version = '1'", "line 11: `version` must be an integer"),
    "name": ("name = 'my problem'", "line 11: `name` must be letters"),
}


@pytest.mark.parametrize("kind", TOLD)
def test_mistakes_are_found_before_anything_is_trained(write, kind):
    more, message = TOLD[kind]
    path = write(GOOD + more + "\n")
    with pytest.raises(DataError, match=message) as told:
        by_name(path)
    assert str(told.value).startswith(f"{path}, line ")
    assert "\n" not in str(told.value)


def test_text_beside_the_numbers_stays_out_as_in_the_estimator(write):
    problem = by_name(write(GOOD + "data['name'] = ['someone'] * 30\n"))
    assert sorted(next(iter(problem.train(4, 0, 1)))) == ["image", "label", "mask"]


def test_one_function_may_give_all_metrics_as_in_the_estimator(write):
    from jdl.compare.feeds import Evaluation
    from jdl.train.writers import directions

    problem = by_name(
        write(
            GOOD
            + """
import jdl.metrics

@jdl.metrics.direction({"margin": "max"})
def metrics(outputs, batch):
    return {"margin": outputs[:, 0] - outputs[:, 1], "first": outputs[:, 0]}

target = ("train_margin", "at least", 1)
"""
        )
    )
    assert directions(problem.metrics)["margin"] == "max"
    variables = problem.model().init(jax.random.key(1), jnp.ones((1, 3)))
    outputs = problem.model().apply(variables, jnp.asarray(rows(problem.train(7, 0, 1))))
    found = Evaluation(problem)(variables["params"], {})
    expected = np.asarray(outputs[:, 0] - outputs[:, 1]).mean()
    assert found["train_margin"] == pytest.approx(expected, abs=1e-6)


def test_a_problem_file_may_have_a_model_of_its_own_with_annotations(write):
    net = """
import flax.linen as nn

class Net(nn.Module):
    units: int = 2

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.units)(x)

model = Net()
"""
    assert by_name(write("from __future__ import annotations\n" + GOOD + net)).size == 30


def test_a_problem_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="There is no problem file"):
        by_name(str(tmp_path / "none.py"))


def test_a_problem_file_may_have_spaces_and_commas_in_its_path(tmp_path, monkeypatch):
    from jdl.cli.compare import _listed

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my probs, new").mkdir()
    for name in ("my problem.py", "a,b.py"):
        (tmp_path / "my probs, new" / name).write_text("")
    text = " digits-cnn,my probs, new/my problem.py , my probs, new/a,b.py,, logistic"
    paths = ["my probs, new/my problem.py", "my probs, new/a,b.py"]
    assert _listed("--problem", text) == ["digits-cnn", *paths, "logistic"]
    assert _listed("--optimizers", "sgd, adam") == ["sgd", "adam"]
    with pytest.raises(ArgumentError, match="names separated by commas"):
        _listed("--problem", " ,")
