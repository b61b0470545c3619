"""Recursive nets against a plain recursion, and the readers against what is wrong with files."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdl import losses, metrics
from jdl.core import check
from jdl.data import from_arrays
from jdl.models import trees
from jdl.models.recursive import RecursiveNet, TreeLSTM, root_accuracy, tree_cross_entropy
from jdl.models.trees import LOGIC, Layout, Tree, grow, pack, parse, read_bracketed, read_conllu
from jdl.train.estimator import Estimator

INPUTS = ("word", "children", "schedule")
WORDS = trees.vocabulary([Tree((*LOGIC.constants, *LOGIC.operators), (-1,), ("",))])
NETS = {
    "child_sum": TreeLSTM(num_outputs=2, vocabulary=8, hidden=5, every_node=True),
    "nary": TreeLSTM(num_outputs=2, vocabulary=8, hidden=5, kind="nary", every_node=True),
    "plain": RecursiveNet(num_outputs=2, vocabulary=8, hidden=5, every_node=True),
}


def expressions(n, depths, seed=0):
    rng = np.random.default_rng(seed)
    return [grow(LOGIC, depths[i % len(depths)], rng) for i in range(n)]


def sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def plain_recursion(kind, params, tree, most):
    """Σ −log p(label) over the tree's nodes, by recursion in Python, from the papers' equations."""
    p = params
    total = 0.0

    def visit(node):
        nonlocal total
        below = [visit(k) for k, parent in enumerate(tree.parents) if parent == node]
        x = p["embedding"]["embedding"][WORDS[tree.words[node]]]
        d = p["outputs"]["kernel"].shape[0]
        if kind == "plain":
            h, c = x, None
            if below:
                h = x + p["bias"]
                for k, (hk, _) in enumerate(below):
                    h = h + hk @ p["composition"][k * d : (k + 1) * d]
                h = jnp.tanh(h)
        else:
            a = x @ p["input"]["kernel"] + p["input"]["bias"]
            blocks = range(most) if kind == "nary" else [0] * len(below)
            gates = a[: 3 * d] + sum(
                (
                    hk @ p["gates"][k * d : (k + 1) * d]
                    for k, (hk, _) in zip(blocks, below, strict=False)
                ),
                start=jnp.zeros(3 * d),
            )
            i, o, u = gates[:d], gates[d : 2 * d], gates[2 * d :]
            c = sigmoid(i) * jnp.tanh(u)
            for k, (hk, ck) in enumerate(below):
                if kind == "nary":
                    f = sum(
                        hl @ p["forget"][m * d : (m + 1) * d, k * d : (k + 1) * d]
                        for m, (hl, _) in enumerate(below)
                    )
                else:
                    f = hk @ p["forget"]
                c = c + sigmoid(a[3 * d :] + f) * ck
            h = sigmoid(o) * jnp.tanh(c)
        logits = h @ p["outputs"]["kernel"] + p["outputs"]["bias"]
        label = int(tree.labels[node])
        total = total + jnp.log(jnp.sum(jnp.exp(logits))) - logits[label]
        return h, c

    visit(tree.parents.index(-1))
    return total


@pytest.mark.parametrize(
    "kind", [pytest.param("child_sum", marks=pytest.mark.slow), "nary", "plain"]
)
def test_value_and_gradient_equal_a_recursion_in_python(kind):
    some = expressions(3, (0, 1, 3))
    batch = pack(some, WORDS, ["0", "1"])
    with jax.enable_x64(True):
        net = NETS[kind]
        params = net.init(jax.random.key(1), *(batch[name] for name in INPUTS))["params"]
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)

        def ours(params):
            outputs = net.apply({"params": params}, *(batch[name] for name in INPUTS))
            return jnp.sum(tree_cross_entropy(outputs, batch))

        def theirs(params):
            return sum(plain_recursion(kind, params, tree, 2) for tree in some)

        value, grads = jax.jit(jax.value_and_grad(ours))(params)
        expected, expected_grads = jax.jit(jax.value_and_grad(theirs))(params)
        np.testing.assert_allclose(value, expected, rtol=1e-10)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETS)
def test_padding_changes_nothing(kind):
    some = expressions(4, (1, 3))
    tight = pack(some, WORDS, ["0", "1"])
    nodes, levels, width, children, inner = Layout.of(some)
    layout = Layout(nodes + 7, levels + 3, width + 4, children, inner + 5)
    wide = pack(some, WORDS, ["0", "1"], layout)
    net = NETS[kind]
    params = net.init(jax.random.key(1), *(tight[name] for name in INPUTS))

    def value_and_grad(batch):
        def value(params):
            outputs = net.apply(params, *(batch[name] for name in INPUTS))
            return jnp.sum(tree_cross_entropy(outputs, batch)), root_accuracy(outputs, batch)

        return jax.jit(jax.value_and_grad(value, has_aux=True))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        value_and_grad(tight),
        value_and_grad(wide),
    )


def test_order_matters_to_nary_and_not_to_child_sum():
    a, b = parse("(1 (0 true) (1 false))"), parse("(1 (0 false) (1 true))")
    for kind, same in (("child_sum", True), ("nary", False), ("plain", False)):
        batch = pack([a, b], WORDS, ["0", "1"])
        inputs = [batch[name] for name in INPUTS]
        net = NETS[kind]
        outputs = net.apply(net.init(jax.random.key(0), *inputs), *inputs)[:, 0]
        assert np.allclose(outputs[0], outputs[1], atol=1e-6) == same


@pytest.mark.slow
def test_learns_logic_and_is_right_on_deeper_trees():
    train, deeper = expressions(2000, (1, 2, 3, 4)), expressions(200, (6, 7), seed=1)
    layout = Layout.of([*train, *deeper])
    arrays = pack(train, WORDS, ["0", "1"], layout)
    data = from_arrays(arrays, batch_size=50, shuffle=True, seed=0)
    net = TreeLSTM(num_outputs=2, vocabulary=8, hidden=24, kind="nary", every_node=True)
    estimator = Estimator(
        net,
        tree_cross_entropy,
        optax.adam(1e-2),
        metrics={"accuracy": root_accuracy},
        inputs=INPUTS,
    )
    estimator.train(data, steps=120)
    held = pack(deeper, WORDS, ["0", "1"], layout)
    found = estimator.evaluate(lambda: iter([held]))
    assert found["accuracy"] >= 0.98


def test_a_root_net_is_a_classifier():
    batch = pack(expressions(6, (2,)), WORDS, ["0", "1"])
    inputs = [batch[name] for name in INPUTS]
    net = TreeLSTM(num_outputs=2, vocabulary=8, hidden=5)
    logits = net.apply(net.init(jax.random.key(0), *inputs), *inputs)
    assert losses.softmax_cross_entropy(logits, batch).shape == (6,)
    assert metrics.accuracy(logits, batch).shape == (6,)


# ------------------------------------------------------------------ trees as data


MODULO_7 = trees.Grammar(
    {str(i): i for i in range(7)},
    {"+": (2, lambda a, b: (a + b) % 7), "*": (2, lambda a, b: a * b % 7)},
)


@pytest.mark.parametrize("grammar", [LOGIC, MODULO_7])
@pytest.mark.parametrize("depth", [0, 1, 5])
def test_generated_expressions_say_their_value(grammar, depth):
    rng = np.random.default_rng(3)
    names = {"false": "0", "true": "1", "xor": "!=", "not": "not "}
    for _ in range(20):
        tree = grow(grammar, depth, rng)
        assert trees.heights(tree).max() == depth

        def written(node, tree=tree):
            word = names.get(tree.words[node], tree.words[node])
            below = [written(k) for k, parent in enumerate(tree.parents) if parent == node]
            if len(below) < 2:
                return f"({word}{''.join(below)})"
            return f"({below[0]} {word} {below[1]})"

        value = int(eval(written(0)))  # our own text of digits and operators
        modulus = 7 if grammar is not LOGIC else 2
        assert tree.labels[0] == str(value % modulus)


def test_flat_tokens_can_be_read_as_the_tree():
    tree = grow(LOGIC, 4, np.random.default_rng(0))
    tokens = trees.expression(tree)
    assert [t for t in tokens if t not in "()"] == list(tree.words)
    depth = np.cumsum([{"(": 1, ")": -1}.get(t, 0) for t in tokens])
    assert depth.max() == 4
    assert depth[-1] == 0


def test_reads_the_sentiment_format(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("(3 (2 It) (4 (2 's) (4 (3 a) (4 lovely))))\n\n(1 bad)\n", encoding="utf-8")
    first, second = read_bracketed(path)
    assert first.words == ("", "It", "", "'s", "", "a", "lovely")
    assert first.parents == (-1, 0, 0, 2, 2, 4, 4)
    assert first.labels == ("3", "2", "4", "2", "4", "3", "4")
    assert second == Tree(("bad",), (-1,), ("1",))


CONLLU = (
    "# text = Vamos nos\n1-2\tVámonos\t_\t_\t_\t_\t_\t_\t_\t_\n"
    "1\tVamos\tir\tVERB\t_\t_\t0\troot\t_\t_\n2\tnos\tnos\tPRON\t_\t_\t1\tobj\t_\t_\n"
    "2.1\tempty\t_\t_\t_\t_\t_\t_\t_\t_\n"
)


def test_reads_conllu(tmp_path):
    path = tmp_path / "a.conllu"
    path.write_text(CONLLU + "\n" + CONLLU, encoding="utf-8")
    assert list(read_conllu(path)) == [Tree(("Vamos", "nos"), (-1, 0), ("root", "obj"))] * 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("()", "empty"),
        ("(3 (2 a)", "never closed"),
        ("(3 a))", "after a tree's end"),
        ("3 a", "no opening bracket"),
        ("(3 a (2 b))", "the word 'a' and children"),
        ("(3 (2 a) b)", "beside its children"),
        ("(3", "never closed"),
        ("(3)", "neither a word nor children"),
    ],
)
def test_refuses_brackets_that_are_no_tree(line, said, tmp_path):
    path = tmp_path / "bad.txt"
    path.write_text("(1 good)\n" + line + "\n", encoding="utf-8")
    with pytest.raises(check.DataError, match=r"line 2: .*" + said):
        list(read_bracketed(path))


def test_words_end_at_ascii_blanks_alone(tmp_path):
    # A word of the Stanford treebank's own train file has a no-break space inside.
    path = tmp_path / "train.txt"
    text = "(3 (2 for) (2 8\N{NO-BREAK SPACE}1\\/2))\r\n(1\tbad)\r\n"
    path.write_bytes(text.encode("utf-8-sig"))
    first, second = read_bracketed(path)
    assert first.words == ("", "for", "8\N{NO-BREAK SPACE}1\\/2")
    assert second.words == ("bad",)


def test_trees_that_are_none_are_named_by_line_and_can_be_left_out(tmp_path):
    brackets, sentences = tmp_path / "a.txt", tmp_path / "a.conllu"
    brackets.write_text("(1 good)\n(3 (2 a)\n(0 bad)\n", encoding="utf-8")
    bad = [row(1, 0) + row(2, 0), row(1, "_") + row(2, 1), row(2, 0) + row(2, 0)]
    sentences.write_text(
        "\n".join(["\N{ZERO WIDTH NO-BREAK SPACE}# a" + "\n" + CONLLU, *bad, CONLLU]),
        encoding="utf-8",
    )
    for read, path, lines in (
        (read_bracketed, brackets, ["line 2"]),
        (read_conllu, sentences, ["line 8", "line 11", "line 14"]),
    ):
        with pytest.raises(check.DataError, match=lines[0]):
            list(read(path))
        left_out = []
        assert len(list(read(path, on_error=left_out.append))) == 2
        assert len(left_out) == len(lines)
        for error, line in zip(left_out, lines, strict=True):
            assert f"{path}, {line}" in str(error).replace("sentence at ", "")


@pytest.mark.parametrize(
    ("name", "stray"), [("word", -1), ("word", 8), ("children", -1), ("schedule", 99)]
)
def test_words_and_nodes_that_do_not_exist_are_refused(name, stray):
    batch = pack(expressions(2, (1,)), WORDS, ["0", "1"])
    net = NETS["plain"]
    params = net.init(jax.random.key(0), *(batch[n] for n in INPUTS))
    batch[name] = batch[name].copy()
    batch[name].flat[0] = stray
    with pytest.raises(check.ArgumentError, match=f"`{name}` must be"):
        net.apply(params, *(batch[n] for n in INPUTS))
    if name == "word":
        found = jax.jit(net.apply)(params, *(batch[n] for n in INPUTS))
        assert np.isnan(found[:, 0]).any(1).tolist() == [True, False]


def test_a_node_s_label_that_is_no_class_is_an_error_and_nan_under_jit():
    for stray in (-2, 4):
        batch = {"labels": jnp.array([[3, -1], [0, stray]]), "label": jnp.array([0, -1])}
        with pytest.raises(check.ArgumentError, match=r"class numbers in \[0, 4\)"):
            tree_cross_entropy(jnp.zeros((2, 2, 4)), batch)
        found = jax.jit(tree_cross_entropy)(jnp.zeros((2, 2, 4)), batch)
        assert np.isnan(found).tolist() == [False, True]
        assert np.isnan(root_accuracy(jnp.zeros((2, 2, 4)), batch)).tolist() == [False, True]


def test_the_memory_of_a_flat_tree_is_that_of_its_children():
    n = 1500
    flat = Tree(("w",) * (n + 1), (-1,) + (0,) * n, ("0",) * (n + 1))
    batch = pack([flat], {"w": 2}, ["0"])
    assert batch["children"].nbytes == 4 * n
    inputs = [batch[name] for name in INPUTS]
    net = TreeLSTM(num_outputs=1, vocabulary=3, hidden=64)
    params = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    step = jax.jit(jax.grad(lambda p: jnp.sum(net.apply(p, *inputs))))
    assert step.lower(params).compile().memory_analysis().temp_size_in_bytes < 100e6


def row(number, head):
    return f"{number}\tw\tw\tX\t_\t_\t{head}\tdep\t_\t_\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (row(1, 2) + row(2, 1), "cycle"),
        (row(1, 0) + row(2, 2), "cycle"),
        (row(1, 0) + row(2, 0), "2 roots"),
        (row(1, 0) + row(2, 9), "the parent 8"),
        (row(1, 0) + row(3, 1), "number 2"),
        ("1\tword\n", "10 tab-separated fields"),
        (row(1, "_"), "its head a number"),
    ],
)
def test_refuses_heads_that_make_no_tree(text, said, tmp_path):
    path = tmp_path / "bad.conllu"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(check.DataError, match=said):
        list(read_conllu(path))


def test_deep_and_hostile_text_neither_recurses_nor_grows():
    deep = "(0 " * 5000 + "(1 x)" + ")" * 5000
    assert trees.heights(parse(deep)).max() == 5000
    with pytest.raises(check.DataError, match="more than"):
        parse("(" * (trees.MAX_NODES + 1))


def test_refuses_what_does_not_fit():
    tree = expressions(1, (3,))
    with pytest.raises(check.DataError, match="more than"):
        pack(tree, WORDS, ["0", "1"], Layout(2, 1, 1, 2, 1))
    with pytest.raises(check.DataError, match="none of"):
        pack(tree, WORDS, ["yes", "no"])
    with pytest.raises(check.DataError, match="empty"):
        pack([Tree((), (), ())], WORDS, ["0"])
    with pytest.raises(check.ArgumentError, match="at least one tree"):
        Layout.of([])
