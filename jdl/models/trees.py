r"""Trees as data: read, generated, and packed by level into arrays of static shape.

A node's height is 0 for a leaf, else one more than its highest child's. Nodes of one height are
independent, so that a net computes them at once; a batch of trees takes as many steps as the
highest has levels. `pack` numbers a tree's nodes by decreasing height, the root first:

    word      int32[n, N]     each node's word; 0 for none, 1 for an unknown word
    children  int32[n, I, K]  the children of nodes with any, in order; N for none
    schedule  int32[n, L, W]  the nodes of height 1, of height 2, …; N for none
    label     int32[n]        the root's class; −1 for none
    labels    int32[n, N]     each node's class; −1 for none and for padding

N, K, L, W and I are a `Layout`. All trees packed in one layout run through one compiled program.
"""

import functools
import itertools
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jdl.core import check

MAX_NODES = 100_000  # of one tree; larger ones are refused
MAX_DEPTH = 200  # of a generated tree
_UNKNOWN = 1
_BLANKS = " \t\r\n\f\v"

OnError = Callable[[check.DataError], None]


class Tree(NamedTuple):
    """A tree, or dependency structure, as tuples with one entry for each node."""

    words: tuple[str, ...]  # "" for a node without a word
    # the index of each node's parent; −1 for the root. Children are ordered by index
    parents: tuple[int, ...]
    labels: tuple[str, ...]  # names of classes, "" for none


class Layout(NamedTuple):
    """The static shape of packed trees.

    Attributes:
      nodes: N, the maximum number of nodes of a tree.
      levels: L, the maximum height.
      width: W, the maximum number of nodes of one height, without leaves.
      children: K, the maximum number of children of a node.
      inner: I, the maximum number of nodes with children.
    """

    nodes: int
    levels: int
    width: int
    children: int
    inner: int

    @classmethod
    def of(cls, trees: Iterable[Tree]) -> "Layout":
        """The smallest layout that holds all of these trees.

        >>> Layout.of([parse("(3 (2 It) (4 (2 really) (3 works)))")])
        Layout(nodes=5, levels=2, width=1, children=2, inner=2)
        """
        shapes = [_shape(tree, heights(tree)) for tree in trees]
        check.argument(bool(shapes), "trees", "at least one tree", shapes)
        return cls(*(max(sizes) for sizes in zip(*shapes, strict=True)))


def _shape(tree: Tree, height: np.ndarray) -> tuple[int, ...]:
    widths = np.bincount(height)[1:]
    counts = Counter(tree.parents)
    counts.pop(-1, None)
    width, most = int(np.max(widths, initial=1)), max(counts.values(), default=1)
    return len(height), max(int(height.max()), 1), width, most, max(len(counts), 1)


def heights(tree: Tree) -> np.ndarray:
    """Each node's height, int[n].

    Raises:
      DataError: it is not a tree: no nodes, several roots or none, a parent that does not exist, a
        cycle.

    >>> heights(Tree(("a", "b", "c"), (1, -1, 1), ("", "", ""))).tolist()
    [0, 1, 0]
    >>> heights(Tree(("a", "b", "c"), (1, 0, -1), ("", "", "")))
    Traceback (most recent call last):
        ...
    jdl.core.check.DataError: A tree has a cycle: from nodes 0, 1 no root is reached.
    """
    n = len(tree.parents)
    if n == 0:
        raise check.DataError("A tree is empty: it has no nodes.")
    if not len(tree.words) == len(tree.labels) == n:
        raise check.DataError("A tree's words, parents and labels differ in number.")
    waiting = [0] * n
    roots = []
    for node, parent in enumerate(tree.parents):
        if parent == -1:
            roots.append(node)
        elif 0 <= parent < n:
            waiting[parent] += 1
        else:
            raise check.DataError(f"Node {node} of a tree of {n} nodes has the parent {parent}.")
    if len(roots) > 1:
        raise check.DataError(f"A tree has {len(roots)} roots, nodes {_some(roots)}.")
    height = np.zeros(n, np.int64)
    ready = [node for node in range(n) if not waiting[node]]
    for node in ready:  # grows as parents become ready
        parent = tree.parents[node]
        if parent >= 0:
            height[parent] = max(height[parent], height[node] + 1)
            waiting[parent] -= 1
            if not waiting[parent]:
                ready.append(parent)
    if len(ready) < n:
        stuck = sorted(set(range(n)) - set(ready))
        raise check.DataError(f"A tree has a cycle: from nodes {_some(stuck)} no root is reached.")
    return height


def _some(nodes: Sequence[int]) -> str:
    return ", ".join(map(str, nodes[:5])) + (", …" if len(nodes) > 5 else "")


# ------------------------------------------------------------------ reading


def parse(text: str) -> Tree:
    """The tree of a bracketed expression, as in the Stanford Sentiment or the Penn Treebank.

        tree = ( label word ) | ( label tree … )

    Blanks are those of ASCII: a no-break space is part of its word.

    Raises:
      DataError: empty, unmatched brackets, words beside brackets, text after the end.

    >>> tree = parse("(3 (2 It) (4 works))")
    >>> tree.words, tree.parents, tree.labels
    (('', 'It', 'works'), (-1, 0, 0), ('3', '2', '4'))
    """
    words: list[str | None] = []
    labels: list[str | None] = []
    parents: list[int] = []
    has_children: list[bool] = []
    node, done = -1, False  # the innermost open one

    def refuse(problem: str) -> check.DataError:
        shown = text.strip()
        return check.DataError(f"{problem}: {shown[:60]}{'…' if len(shown) > 60 else ''}")

    for match in re.finditer(r"[()]|[^ \t\r\n\f\v()]+", text):
        token = match.group()
        if done:
            raise refuse("There is text after a tree's end")
        if token == "(":
            if len(parents) >= MAX_NODES:
                raise refuse(f"A tree has more than {MAX_NODES} nodes")
            if node >= 0:
                if words[node] is not None:
                    raise refuse(f"A node has the word {words[node]!r} and children")
                has_children[node] = True
            parents.append(node)
            words.append(None)
            labels.append(None)
            has_children.append(False)
            node = len(parents) - 1
        elif node < 0:
            raise refuse("A tree begins with no opening bracket")
        elif token == ")":
            if words[node] is None and not has_children[node]:
                raise refuse("A node is empty: it has neither a word nor children")
            node = parents[node]
            done = node < 0
        elif has_children[node] or words[node] is not None:
            raise refuse(f"A node has {token!r} beside its children or its word")
        elif labels[node] is None:
            labels[node] = token
        else:
            words[node] = token
    if not parents:
        raise check.DataError("A tree is empty: there is no bracket.")
    if not done:
        raise refuse("A bracket is never closed")
    return Tree(tuple(w or "" for w in words), tuple(parents), tuple(x or "" for x in labels))


def read_bracketed(path: str | Path, on_error: OnError | None = None) -> Iterator[Tree]:
    """The trees of a file, one bracketed tree or none in each line.

    Args:
      path: UTF-8 text.
      on_error: takes the error of each line that is no tree, and the line is left out, as by
        `bad.append` of a list; None to raise it. The message has the line's number.
    """
    for number, line in _lines(path):
        if line.strip():
            yield from _tree(f"{path}, line {number}", functools.partial(parse, line), on_error)


def read_conllu(path: str | Path, on_error: OnError | None = None) -> Iterator[Tree]:
    """The dependency trees of a CoNLL-U file; nodes are words, labels are relations.

    Multiword tokens (1-2) and empty nodes (1.1) are skipped: the basic tree does not need them.

    Args:
      path: UTF-8 text.
      on_error: as for `read_bracketed`, for each sentence that is not CoNLL-U, or whose heads form
        no tree. The message has the number of the sentence's first line.
    """
    rows: list[str] = []
    first = 1
    for number, line in itertools.chain(_lines(path), [(0, "")]):
        if line.strip(_BLANKS):
            if not line.startswith("#") and len(rows) <= MAX_NODES:
                rows.append(line.rstrip("\r\n"))
            continue
        if rows:
            where = f"{path}, sentence at line {first}"
            yield from _tree(where, functools.partial(_dependencies, rows), on_error)
        rows, first = [], number + 1


def _dependencies(rows: Sequence[str]) -> Tree:
    """The tree of a sentence's lines."""
    if len(rows) > MAX_NODES:
        raise check.DataError(f"A sentence has over {MAX_NODES} lines.")
    words: list[str] = []
    parents: list[int] = []
    labels: list[str] = []
    for row in rows:
        fields = row.split("\t")
        if len(fields) != 10:
            raise check.DataError(
                f"CoNLL-U has 10 tab-separated fields, got {len(fields)} in {row[:60]!r}."
            )
        if re.fullmatch(r"\d+[-.]\d+", fields[0]):
            continue
        numbers = fields[0].isdecimal() and fields[6].isdecimal()
        if not numbers or int(fields[0]) != len(words) + 1:
            raise check.DataError(
                f"The word must be number {len(words) + 1} and its head a number, got "
                f"{fields[0]!r} and {fields[6]!r}."
            )
        words.append(fields[1])
        parents.append(int(fields[6]) - 1)
        labels.append(fields[7])
    found = Tree(tuple(words), tuple(parents), tuple(labels))
    heights(found)
    return found


def _tree(where: str, read: Callable[[], Tree], on_error: OnError | None) -> Iterator[Tree]:
    try:
        yield read()
    except check.DataError as error:
        named = check.DataError(f"{where}: {error}")
        if on_error is None:
            raise named from error
        on_error(named)


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    limit = 64 * MAX_NODES
    try:
        with open(path, encoding="utf-8-sig") as file:  # without a byte order mark
            number = 0
            while line := file.readline(limit):
                number += 1
                if len(line) == limit:
                    raise check.DataError(f"{path}, line {number}: longer than {limit} characters.")
                yield number, line
    except OSError as error:
        raise check.DataError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise check.DataError(f"{path} is not UTF-8 text: {error.reason}.") from error


# ------------------------------------------------------------------ packing


def vocabulary(trees: Iterable[Tree], minimum: int = 1) -> dict[str, int]:
    """Numbers from 2 for all words seen at least `minimum` times; 0 is no word, 1 an unknown one.

    >>> vocabulary([parse("(1 (0 no) (1 (0 no) (1 way)))")])
    {'no': 2, 'way': 3}
    """
    counts = Counter(word for tree in trees for word in tree.words if word)
    kept = sorted(word for word, count in counts.items() if count >= minimum)
    return {word: number for number, word in enumerate(kept, start=_UNKNOWN + 1)}


def pack(
    trees: Sequence[Tree],
    words: Mapping[str, int],
    classes: Sequence[str],
    layout: Layout | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of these trees: word, children, schedule, label, labels; see the top of the file.

    Args:
      trees: at least one.
      words: the numbers of words, from `vocabulary`; others are unknown.
      classes: the names of labels, in the order of their numbers.
      layout: the shape; None for the smallest.

    Raises:
      DataError: an invalid tree, a tree too large for the layout, or an unknown label.

    >>> packed = pack([parse("(1 (0 no) (1 way))")], {"no": 2, "way": 3}, ["0", "1"])
    >>> packed["word"].tolist(), packed["children"].tolist(), packed["schedule"].tolist()
    ([[0, 2, 3]], [[[1, 2]]], [[[0]]])
    """
    layout = Layout.of(trees) if layout is None else layout
    numbers = {name: number for number, name in enumerate(classes)} | {"": -1}
    n, nodes = len(trees), layout.nodes
    word = np.zeros((n, nodes), np.int32)
    children = np.full((n, layout.inner, layout.children), nodes, np.int32)
    schedule = np.full((n, layout.levels, layout.width), nodes, np.int32)
    labels = np.full((n, nodes), -1, np.int32)
    for i, tree in enumerate(trees):
        height = heights(tree)
        shape = _shape(tree, height)
        if any(has > most for has, most in zip(shape, layout, strict=True)):
            raise check.DataError(f"Tree {i} needs {Layout(*shape)}, more than {layout}.")
        order = np.argsort(-height, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        filled = [0] * len(order)
        for node, parent in enumerate(tree.parents):
            at = place[node]
            word[i, at] = words.get(tree.words[node], _UNKNOWN) if tree.words[node] else 0
            if tree.labels[node] not in numbers:
                raise check.DataError(
                    f"Tree {i} has the label {tree.labels[node]!r}, none of {list(classes)}."
                )
            labels[i, at] = numbers[tree.labels[node]]
            if parent >= 0:
                children[i, place[parent], filled[parent]] = at
                filled[parent] += 1
        for level in range(1, int(height.max()) + 1):
            (of_level,) = np.nonzero(height == level)
            schedule[i, level - 1, : len(of_level)] = place[of_level]
    packed = {"word": word, "children": children, "schedule": schedule}
    return packed | {"label": labels[:, 0].copy(), "labels": labels}


# ------------------------------------------------------------------ generated


class Grammar(NamedTuple):
    """The symbols of expressions at leaves and inner nodes."""

    constants: Mapping[str, int]  # word -> value
    # word -> (number of operands, function of them)
    operators: Mapping[str, tuple[int, Callable[..., int]]]


LOGIC = Grammar(
    {"false": 0, "true": 1},
    {
        "not": (1, lambda a: 1 - a),
        "and": (2, operator.and_),
        "or": (2, operator.or_),
        "xor": (2, operator.xor),
    },
)


def grow(grammar: Grammar, depth: int, rng: np.random.Generator, max_nodes: int = 127) -> Tree:
    """A random expression of height `depth`, every node labelled with its value.

    One operand of each operator has the largest possible height; the heights of the others are
    uniform below. Expressions with more than `max_nodes` nodes are drawn again.

    Args:
      grammar: the constants and operators, such as `LOGIC`.
      depth: the height; 0 for a leaf.
      rng: the random generator.
      max_nodes: of the expression.

    >>> tree = grow(LOGIC, 3, np.random.default_rng(0))
    >>> int(heights(tree)[0]), set(tree.labels) <= {"0", "1"}
    (3, True)
    """
    check.argument(0 <= depth <= MAX_DEPTH, "depth", f"from 0 to {MAX_DEPTH}", depth)
    check.argument(max_nodes > depth, "max_nodes", f"more than depth = {depth}", max_nodes)
    constants, operators = list(grammar.constants), list(grammar.operators)

    def draw() -> Tree | None:
        words: list[str] = []
        parents: list[int] = []
        todo = [(-1, depth)]
        while todo:
            parent, height = todo.pop()
            if len(words) + len(todo) >= max_nodes:
                return None
            parents.append(parent)
            if height == 0:
                words.append(constants[rng.integers(len(constants))])
                continue
            words.append(operators[rng.integers(len(operators))])
            arity = grammar.operators[words[-1]][0]
            below = rng.integers(0, height, arity)
            below[rng.integers(arity)] = height - 1
            todo += [(len(words) - 1, int(h)) for h in below[::-1]]
        return Tree(tuple(words), tuple(parents), _values(grammar, words, parents))

    for _ in range(10_000):
        tree = draw()
        if tree is not None:
            return tree
    raise check.ArgumentError(
        f"`max_nodes` must be larger for trees of depth {depth}, got {max_nodes}."
    )


def _values(grammar: Grammar, words: Sequence[str], parents: Sequence[int]) -> tuple[str, ...]:
    """Each node's value; children come after their parent, so that values are known in reverse."""
    operands: list[list[int]] = [[] for _ in words]
    values = [0] * len(words)
    for node in reversed(range(len(words))):
        known = operands[node][::-1]
        if words[node] in grammar.operators:
            values[node] = grammar.operators[words[node]][1](*known)
        else:
            values[node] = grammar.constants[words[node]]
        if parents[node] >= 0:
            operands[parents[node]].append(values[node])
    return tuple(map(str, values))


def expression(tree: Tree) -> list[str]:
    """The tree as a list of tokens, with brackets around nodes with children.

    >>> expression(Tree(("not", "true"), (-1, 0), ("0", "1")))
    ['(', 'not', 'true', ')']
    """
    children: list[list[int]] = [[] for _ in tree.parents]
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            children[parent].append(node)
    heights(tree)  # raises for an invalid tree
    tokens: list[str] = []
    todo: list[int | str] = [tree.parents.index(-1)]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            tokens.append(item)
            continue
        inner = children[item]
        tokens += ["("] * bool(inner) + [tree.words[item]] * bool(tree.words[item])
        todo += [")"] * bool(inner)
        todo += inner[::-1]
    return tokens
