# Everything runs in .venv, which the first target to need it makes; run any target again at will.
# Another Python has an environment of its own: make test PYTHON=python3.13 runs in .venv-3.13.
PYTHON ?= python3
FOUND := $(shell bash .ci/python "$(PYTHON)")
VERSION := $(if $(FOUND),$(shell "$(FOUND)" -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
OLD = $(shell "$(FOUND)" -c 'import sys; print("old" * (sys.version_info < (3, 11)))')
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(VERSION))
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test test-all test-release check format docs dist bench-step bench-start bench-train bench-data bench-kfac bench-matrix bench-optim bench-solvers bench-pinn bench-classics bench-pictures bench-paper bench-study bench-vision device clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY)  ## make .venv with jdl and the development tools

$(READY): pyproject.toml
	$(if $(FOUND),,$(error there is no $(PYTHON) here that runs and has venv and pip. Name another: make test PYTHON=python3.13))
	$(if $(OLD),$(error jdl needs Python 3.11 or newer; $(PYTHON) is $(VERSION). Name another: make test PYTHON=python3.13))
	@echo "== setting up $(VENV) with Python $(VERSION) (once; a few minutes on a slow network)"
	test -x $(BIN)/python || "$(FOUND)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(READY)  ## the main job: one CNN, five optimizers, one report (under 4 minutes)
	$(BIN)/jdl demo

test: $(READY)  ## the tests that a change needs, under 10 minutes
	$(BIN)/python -m pytest -m "not slow and not release" --numprocesses 2 --dist worksteal

test-all: $(READY)  ## the slow tests too: several processes, killed processes, notebooks
	$(BIN)/python -m pytest -m "slow and not release" --numprocesses 2 --dist worksteal

test-release: $(READY)  ## before a release: the full matrices, which take long
	$(BIN)/python -m pytest -m release --numprocesses 2 --dist worksteal

check: $(READY)  ## lint, format, types, import arrows, the workflows' and citation's schemas
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_arrows.py
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

format: $(READY)  ## rewrite the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## the documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean -f .mkdocs.yml

dist: $(READY)  ## the wheel and the sdist, in dist, and the tests of what they hold
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m pytest -q -n 0 tests/test_packaging.py

clean:  ## remove the environments and build products; runs stay
	rm -rf .venv .venv-3.* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

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

bench-matrix: $(READY)  ## AdamW, Muon, Shampoo, SOAP, K-FAC on five networks; resumable: make bench-matrix DATA=folder
	$(BIN)/python tests/benchmarks/bench_matrix.py --data $(or $(DATA),data) $(ARGS)

bench-optim: $(READY)  ## second-order methods against their peers, on MNIST's first 5,000 digits
	$(BIN)/python tests/benchmarks/bench_optim.py $(ARGS)

bench-solvers: $(READY)  ## run-to-convergence solvers against jaxopt, optax, optimistix, SciPy; Lanczos against ARPACK
	$(BIN)/python tests/benchmarks/bench_solvers.py $(ARGS)

bench-classics: $(READY)  ## the classics at full size on MNIST: make bench-classics DATA=folder
	$(BIN)/python tests/benchmarks/bench_classics.py --data $(or $(DATA),data/mnist) $(ARGS)

bench-pictures: $(READY)  ## the pictures of all commands on one sheet: make bench-pictures ARGS="--out folder"
	$(BIN)/python tests/benchmarks/bench_pictures.py $(ARGS)

bench-paper: $(READY)  ## two deep autoencoders, every method, the papers' table; resumable: make bench-paper DATA=folder ARGS="--minutes 10"
	$(BIN)/python tests/benchmarks/bench_paper.py --data $(or $(DATA),data/mnist) $(ARGS)

PROBLEMS ?= gpt-bytes lstm-bytes vit-images resnet-images pinn-poisson
bench-pinn: $(READY)  ## Poisson's equation by a small network: error against seconds, 25 minutes
	$(BIN)/python tests/benchmarks/bench_pinn.py $(ARGS)

bench-study: $(READY)  ## eight optimizers, tuned, on problems of today, some 4 hours; resumable, a folder each in runs/study
	for problem in $(PROBLEMS); do \
	  $(BIN)/jdl compare --problem $$problem --workdir runs/study/$$problem \
	    --optimizers adamw,schedule_free_adamw,muon,soap,shampoo,kfac,hf,lbfgs --schedule cosine \
	    --seeds 6 --trials 6 --tuning-share 0.5 --tuned-only --seconds 20 --clock cpu $(ARGS) || exit; \
	done

bench-vision: $(READY)  ## pictures optimised against PyTorch, a style network against optimisation
	$(BIN)/python tests/benchmarks/bench_vision.py $(ARGS)

device: $(READY)  ## what is worth knowing of one GPU or TPU, in 7 minutes: make device ARGS="--out folder"
	$(BIN)/python tests/device/run.py $(or $(ARGS),--out build/device)
