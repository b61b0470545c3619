"""What the pages and the README say, done: Python blocks are run, commands are parsed."""

import contextlib
import fnmatch
import importlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from jdl.cli import commands as cli
from jdl.cli.main import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("notebooks/**/*.md"))]

# Pages whose blocks take a few seconds; all others wait for the slow run.
QUICK = {
    "explanation/damping.md",
    "explanation/shuffle.md",
    "how-to/tar.md",
}
# Blocks that need processes of their own have tests of their own.
APART = {"distributed.md"}
PEERS = {
    "migration/jaxopt.md": ["jaxopt"],
    "migration/modules.md": ["equinox", "haiku", "keras"],
    "migration/webdataset.md": ["webdataset"],
}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    code: str


def name(page):
    return str(page.relative_to(ROOT)).removeprefix("notebooks/")


def blocks(page):
    """The page's fenced blocks, those inside tabs and lists too."""
    found, fence = [], re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.M | re.S)
    text = page.read_text(encoding="utf-8")
    for match in fence.finditer(text):
        indent, language, code = match.groups()
        code = re.sub(rf"^{indent}", "", code, flags=re.M)
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(name(page), line, language, code))
    return found


def compiled(block):
    """The block's code, whose tracebacks name the page and the line in it."""
    return compile("\n" * block.line + block.code, block.page, "exec")


def marked(pages):
    return [
        pytest.param(page, id=name(page), marks=() if name(page) in QUICK else pytest.mark.slow)
        for page in pages
        if name(page) not in APART and any(b.language == "python" for b in blocks(page))
    ]


@contextlib.contextmanager
def as_a_script_runs():
    """JAX as it is for users, without the tests' strictness."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("page", marked(PAGES))
def test_a_page_s_python_runs(page, tmp_path, monkeypatch):
    if name(page) in PEERS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in PEERS[name(page)]:
                pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    with as_a_script_runs():
        for block in blocks(page):
            if block.language == "python":
                exec(compiled(block), names)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_s_other_blocks_are_what_they_say(page):
    """`py` is for programs of others that cannot run here."""
    for block in blocks(page):
        assert block.language in ("python", "py", "bash", "yaml", "toml", "text"), block
        if block.language in ("python", "py"):
            compiled(block)


def apart(language, containing):
    (found,) = (
        block.code
        for block in blocks(ROOT / "notebooks" / "distributed.md")
        if block.language == language and containing in block.code
    )
    return found


def environment(**more):
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONWARNINGS")}
    return {**kept, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **more}


@pytest.mark.slow
def test_the_script_of_several_processes_runs_in_two(tmp_path):
    code = apart("python", "expected=2").replace("/shared", str(tmp_path))
    script = tmp_path / "script.py"
    script.write_text(code.replace("max_steps=1000", "max_steps=4"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=environment(
                JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i)
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    rows = (tmp_path / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 4


@pytest.mark.slow
def test_the_script_for_ray_runs(tmp_path):
    pytest.importorskip("ray")
    code = apart("python", "JaxTrainer").replace("/shared", str(tmp_path))
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="comes with the extra 'docs'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ".mkdocs.yml", "-d", tmp_path],
        cwd=ROOT,
        env=environment(NO_MKDOCS_2_WARNING="1"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    optimizers = (tmp_path / "reference" / "optim.html").read_text()
    assert "Limited-memory BFGS." in optimizers
    headings = re.sub("<[^>]+>", "", " ".join(re.findall(r"<h3.*?</h3>", optimizers, re.S))).split()
    assert "jdl.optim.kfac" in headings
    assert "jdl.optim.kfac.kfac" not in headings
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?:", text), page
        assert "mathjax" not in text, page
        ran_together = re.findall(r"<p>[^<]*\n\s*- ", text)
        assert not ran_together, page
    assert (tmp_path / "search" / "search_index.js").exists()  # for a site opened from a disk


@pytest.mark.slow
def test_the_five_pictures_are_what_their_script_draws(tmp_path):
    folder = ROOT / "notebooks" / "explanation"
    subprocess.run(
        [sys.executable, folder / "pictures.py", tmp_path],
        check=True,
        env=environment(),
        capture_output=True,
        timeout=400,
    )
    shown = set(re.findall(r"\((\w+\.png)\)", (folder / "overview.md").read_text()))
    assert shown == {path.name for path in tmp_path.iterdir()}
    assert len(shown) == 5
    for name in shown:
        ours, again = (
            np.asarray(Image.open(where / name).convert("L"), float) for where in (folder, tmp_path)
        )
        assert ours.shape == again.shape
        assert np.mean(np.abs(ours - again)) < 2  # of 255; text may differ by its font's version


def links(page):
    found = re.findall(r"\]\(([\w./-]+\.(?:md|ipynb))", page.read_text())
    return {(page.parent / target).resolve() for target in found}


def test_every_page_is_two_clicks_from_the_start():
    start = ROOT / "notebooks" / "index.md"
    near = links(start)
    reached = near | {x for page in near if page.suffix == ".md" for x in links(page)} | {start}
    every = {p for kind in ("md", "ipynb") for p in ROOT.glob(f"notebooks/**/*.{kind}")}
    assert every <= reached


# ---------------------------------------------------------------------- commands

OPERATORS = {"&", "&&", "|", "||", ";", ">", ">>", "<", ")"}


class Command(NamedTuple):
    """A `jdl …` or `make …` that a page names; whole where it is one to be typed."""

    page: str
    line: str
    words: list[str]
    whole: bool


def commands(page):
    text = page.read_text(encoding="utf-8")
    rest = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S)
    typed = [block.code for block in blocks(page) if block.language == "bash"]
    typed += re.findall(r"^    (.*)$", rest, flags=re.M)
    mentioned = re.findall(r"`((?:jdl|make) [^`…]*)`", rest.replace("\n", " "))
    for shell, whole in ((typed, True), (mentioned, False)):
        for line in "\n".join(shell).replace("\\\n", " ").splitlines():
            for words in _programs(line):
                yield Command(name(page), line, words, whole)


def _programs(line):
    """The words of each `jdl` and `make` in a line, up to the operator that ends it."""
    quoted = re.findall(r"exec (jdl [^']*)'|--command='(jdl [^']*)'", line)
    for inner in (part for parts in quoted for part in parts if part):
        yield from _programs(inner)
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>()")
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        words = list(lexer)
    except ValueError:  # a quote that goes on in the next line
        return
    for i, word in enumerate(words):
        if word in ("jdl", "make") and not (i and words[i - 1] == "exec"):
            end = next((j for j in range(i, len(words)) if words[j] in OPERATORS), len(words))
            yield words[i:end]


COMMANDS = [command for page in PAGES for command in commands(page)]


def test_the_pages_name_commands():
    programs = [command.words[0] for command in COMMANDS]
    assert programs.count("jdl") > 30
    assert programs.count("make") > 10


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = {word for c in COMMANDS if c.words[0] == "make" for word in c.words[1:2]}
    assert named <= targets


def test_every_jdl_command_parses(tmp_path, monkeypatch, capsys):
    """Up to the point at which it would start."""
    from jdl.cli.completion import flags
    from jdl.cli.config_file import expand

    monkeypatch.chdir(tmp_path)
    wrong = []
    for command in COMMANDS:
        program, *words = command.words
        if program != "jdl" or not words or words[0] in ("--help", "--version", "COMMAND"):
            continue
        if words[0] not in cli.COMMANDS:
            wrong.append((command, "there is none"))
            continue
        module = importlib.import_module(f"jdl.cli.{words[0]}")
        if not command.whole:
            known = set(flags(words[0]))
            unknown = {word for word in words if word.startswith("--")} - known
            wrong += [(command, unknown)] if unknown else []
            continue
        arguments = [word for word in words[1:] if word != "…"]
        if "--config" in arguments:
            file = Path(arguments[arguments.index("--config") + 1])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text('model = "cnn"\n')
            arguments = expand(arguments, module.Args)
        try:
            if hasattr(module, "parse"):
                module.parse(arguments)
            else:
                parse(words[0], module, arguments)
        except SystemExit as end:
            if end.code:
                wrong.append((command, capsys.readouterr().err))
    assert not wrong


@pytest.mark.slow
def test_the_commands_for_one_s_own_model_run(tmp_path, monkeypatch):
    """On the page's own files; its study, which takes minutes, is only parsed."""
    from jdl.cli.main import main
    from jdl.data import digits_path

    page = ROOT / "notebooks" / "how-to" / "compare-own-model.md"
    files = [block.code for block in blocks(page) if block.language == "python"]
    monkeypatch.chdir(tmp_path)
    for file, code in zip(("mine.py", "photos.py"), files, strict=True):
        Path(file).write_text(code)
    Path("photos.tar").symlink_to(digits_path())
    shorter = {"64": "16", "200": "20"}
    typed = [c.words[1:] for c in commands(page) if c.whole and c.words[:2] != ["jdl", "compare"]]
    assert len(typed) == 9
    with as_a_script_runs():
        assert [main([shorter.get(w, w) for w in words]) for words in typed] == [0] * 9
    assert (tmp_path / "photos.jsonl").read_text().count('"class"') == 359


def test_every_extra_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"pip install '\.\[([\w-]+)\]'", text))
    named |= set(re.findall(r"extra `([\w-]+)`", text))
    assert named
    assert named <= set(extras)


def test_every_notebook_and_page_has_its_place():
    """So that the site's navigation is a choice, not what the alphabet gives."""
    nav = (ROOT / "notebooks" / ".nav.yml").read_text()
    patterns = re.findall(r"[\w/\[\]*.-]+\.(?:md|ipynb)", nav)
    found = [p for kind in ("md", "ipynb") for p in ROOT.glob(f"notebooks/**/*.{kind}")]
    pages = [str(p.relative_to(ROOT / "notebooks")) for p in found]
    lost = [p for p in pages if not any(fnmatch.fnmatch(p, pattern) for pattern in patterns)]
    assert not lost
