# Everything runs in .venv, which the first target to need it makes; run any target again at will.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test test-all check format docs bench-step bench-start bench-train bench-data bench-kfac bench-optim bench-solvers bench-classics bench-paper bench-vision clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY)  ## make .venv with jdl and the development tools

$(READY): pyproject.toml
	@echo "== setting up $(VENV) (once; a few minutes on a slow network)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(READY)  ## the main job: one CNN, five optimizers, one report (under 4 minutes)
	$(BIN)/jdl demo

test: $(READY)  ## the tests that a change needs, under 10 minutes
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist worksteal

test-all: $(READY)  ## the slow tests too: several processes, killed processes, notebooks
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist worksteal

check: $(READY)  ## lint, format, types, import arrows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_arrows.py

format: $(READY)  ## rewrite the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## the documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean -f .mkdocs.yml

clean:  ## remove .venv and build products; runs stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

bench-step: $(READY)  ## our train step against a bare jit loop
	$(BIN)/python tests/benchmarks/bench_step.py

bench-start: $(READY)  ## seconds from `jdl train` to the first step, cold and cached
	$(BIN)/python tests/benchmarks/bench_start.py

bench-train: $(READY)  ## training against a bare loop, and PyTorch and Keras where installed; checkpoints' cost
	$(BIN)/python tests/benchmarks/bench_train.py $(ARGS)

bench-data: $(READY)  ## images a second out of a tar, against webdataset and the decoder alone
	$(BIN)/python tests/benchmarks/bench_data.py

bench-kfac: $(READY)  ## K-FAC at its defaults against tuned Nesterov and Adam: make bench-kfac DATA=folder
	$(BIN)/python tests/benchmarks/bench_kfac.py --data $(or $(DATA),data) $(ARGS)

bench-optim: $(READY)  ## second-order methods against their peers, on MNIST's first 5,000 digits
	$(BIN)/python tests/benchmarks/bench_optim.py $(ARGS)

bench-solvers: $(READY)  ## run-to-convergence solvers against jaxopt, optax, optimistix, SciPy; Lanczos against ARPACK
	$(BIN)/python tests/benchmarks/bench_solvers.py

bench-classics: $(READY)  ## the classics at full size on MNIST: make bench-classics DATA=folder
	$(BIN)/python tests/benchmarks/bench_classics.py --data $(or $(DATA),data/mnist) $(ARGS)

bench-paper: $(READY)  ## two deep autoencoders, every method, the papers' table; resumable: make bench-paper DATA=folder ARGS="--minutes 10"
	$(BIN)/python tests/benchmarks/bench_paper.py --data $(or $(DATA),data/mnist) $(ARGS)

bench-vision: $(READY)  ## pictures optimised against PyTorch, a style network against optimisation
	$(BIN)/python tests/benchmarks/bench_vision.py $(ARGS)
