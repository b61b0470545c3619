"""`jdl sweep`: every combination once, each as `jdl train` makes it, and one that fails."""

import json

import pytest

from jdl.cli import sweep
from jdl.cli.main import main


def test_every_combination_is_a_run_of_its_own(tmp_path, capsys):
    line = ["mlp", "--optimizer", "sgd", "adam", "--seed", "0", "1", "--max-steps", "3"]
    root = ["--workdir", str(tmp_path / "sweep")]
    assert main(["sweep", *line, *root]) == 0
    names = [f"{optimizer},seed={seed}" for optimizer in ("adam", "sgd") for seed in (0, 1)]
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir()) == names
    printed = capsys.readouterr().out
    assert all(name in printed.split("[4/4]")[1] for name in names)  # the table at the end
    single = ["train", "mlp", "--optimizer", "adam", "--seed", "1", "--max-steps", "3"]
    assert main([*single, "--workdir", str(tmp_path / "single")]) == 0

    def losses(folder):
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        return [(r["split"], r["loss"]) for r in map(json.loads, rows)]

    assert losses(tmp_path / "sweep" / "adam,seed=1") == losses(tmp_path / "single")
    line[-1] = "5"  # the same command goes on
    assert main(["sweep", *line, *root]) == 0
    assert {json.loads(r)["step"] for r in _rows(tmp_path / "sweep" / names[0])} >= {3, 5}


def _rows(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_flags_of_several_values_and_options_are_told_apart(tmp_path):
    (tmp_path / "given.toml").write_text('batch-size = 32\noptimizer = "kfac"\n')
    line = ["cnn", "mlp", "--augment", "mixup", "cutmix", "--flip", "--option", "damping=1"]
    line += ["damping=10", "--option", "l2_reg=1e-4", "--config", str(tmp_path / "given.toml")]
    jobs = sweep.parse(line)
    assert [job.name for job in jobs] == [
        f"{model},damping={damping}" for model in ("cnn", "mlp") for damping in (1, 10)
    ]
    first = jobs[0].args
    assert (first.augment, first.flip, first.batch_size) == (("mixup", "cutmix"), True, 32)
    assert (first.optimizer, first.option) == ("kfac", ("damping=1", "l2_reg=1e-4"))
    assert str(first.workdir) == "runs/sweep/cnn,damping=1"


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys):
    line = ["sweep", "mlp", "--optimizer", "kfac", "sgd", "--clip", "1", "--max-steps", "1"]
    assert main([*line, "--workdir", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "1 of 2 runs failed; kfac: `--clip`" in captured.err
    assert "sgd" in captured.out.split("[2/2]")[1]
    assert not (tmp_path / "kfac").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "0"], "`a flag` must be given several values"),
        (["--seed", "0", "1", "--seed", "2"], "`--seed` must be given once"),
        (["--seed", "0", "0"], "`the values of a flag` must be different"),
        (["--seed", "0", "1", "--try"], "`--try` must be left out"),
        (["--max-steps", "1", "many"], "invalid literal"),
    ],
)
def test_mistakes_are_told_before_the_first_run(words, message, tmp_path, capsys):
    assert main(["sweep", "mlp", *words, "--workdir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
