# make demo and make test build their own environment in .venv first; nothing else has to be installed but Python 3.11 or newer.
#
#   make test PYTEST_ARGS="-k rms_norm"       hand arguments to pytest (likewise DEMO_ARGS, BENCH_ARGS)
#   make test VENV= PYTHON=python3            use an interpreter that already has torch, triton, transformers and pytest (a GPU machine)

PYTHON ?= python3
VENV ?= .venv
TRITON ?= triton==3.9.0
PYTEST_ARGS ?=
BENCH_ARGS ?=
TRAIN_ARGS ?=
CONVERGENCE_ARGS ?=
CARDS_ARGS ?=
DISTRIBUTED_ARGS ?=
DEMO_ARGS ?=
NOTEBOOKS_ARGS ?=
N ?= 1

ifeq ($(strip $(VENV)),)
PY := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif
HAS_GPU := $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest check bench bench-train bench-distributed bench-report convergence cards scaling notebooks lesson docs docs-serve clean

help: ## what there is to make
	@sed -n 's/^\([a-z-]*\): .*## /make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@printf '\nmake test VENV= PYTHON=python3 uses an interpreter that has everything, instead of building %s.\n' '.venv'

demo: $(READY) ## train a small Llama on real text, stock and patched, and compare (DEMO_ARGS="--help" lists the options)
	@$(PY) examples/quickstart.py $(DEMO_ARGS)

# On a CPU the tests share the cores, and their threads sleep while they wait; a GPU is not shared between processes.
test: $(READY) ## run the tests once
	@if $(HAS_GPU); then $(PY) -m pytest -p no:benchmark tests $(PYTEST_ARGS); \
	else OMP_WAIT_POLICY=passive $(PY) -m pytest -p no:benchmark -n auto --maxprocesses 4 --dist worksteal tests $(PYTEST_ARGS); fi

# In a folder of its own, before what the environment has.
OLDEST := transformers==5.17.0
OLDEST_IN := $(if $(strip $(VENV)),$(VENV),out)/oldest

test-oldest: $(READY) ## the same entries of liger_patch with the oldest transformers that it takes
	@test -f '$(OLDEST_IN)/.$(OLDEST)' || { rm -rf $(OLDEST_IN) && \
	    $(PY) -m pip install -q --target $(OLDEST_IN) '$(OLDEST)' && touch '$(OLDEST_IN)/.$(OLDEST)'; }
	@export PYTHONPATH="$(CURDIR)/$(OLDEST_IN):$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" OMP_WAIT_POLICY=passive; \
	$(PY) -m pytest -p no:benchmark -n auto --maxprocesses 4 --dist worksteal tests/liger_patch/test_archs.py tests/liger_patch/test_mask.py \
	    -k "is_the_model or mask" $(PYTEST_ARGS)

check: $(READY) ## lint, format and types, nothing changed
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

bench: $(READY) ## time the functions against their peers on a GPU, into tests/bench/results; without one, only try the harness
	@$(PY) -m pytest tests/bench $(BENCH_ARGS)

bench-train: $(READY) ## time whole training steps against stock, torch.compile and liger-kernel on a GPU; without one, only try the harness
	@$(PY) -m tests.bench.training $(TRAIN_ARGS)

bench-distributed: $(READY) ## time training steps of Llama 8B on every GPU of this host; without one, only try the harness
	@$(PY) -m tests.bench.distributed $(DISTRIBUTED_ARGS)

bench-report: $(READY) ## make docs/benchmarks.md and its figures from all of tests/bench/results
	@$(PY) -m tests.bench.report

convergence: $(READY) ## train a model of each family on real text, stock and patched, on a GPU; then make docs/convergence.md
	@$(PY) -m tests.convergence $(CONVERGENCE_ARGS)
	@$(PY) -m tests.convergence report

cards: $(READY) ## measure every function's error against fp64; on a GPU, into docs/numerics.md (CARDS_ARGS="--ops rope" for some)
	@$(PY) -m tests.cards $(CARDS_ARGS)

scaling: $(READY) ## measure what a training step is made of on a GPU, and work out docs/scaling.md from it
	@$(PY) -m tests.scaling measure
	@$(PY) -m tests.scaling report

notebooks: $(READY) ## execute every lesson (NOTEBOOKS_ARGS="4 --write" one, keeping its outputs)
	@$(PY) -m notebooks run $(NOTEBOOKS_ARGS)

lesson: $(READY) ## open a lesson in JupyterLab (N=4)
	@$(PY) -c 'import jupyterlab' 2>/dev/null || $(PY) -m pip install -qq jupyterlab
	@$(PY) -m notebooks open $(N)

export NO_MKDOCS_2_WARNING := 1
docs: $(READY) ## build the documentation into out/site; a warning is an error
	@$(PY) -m mkdocs build -q -d out/site && echo 'Built: out/site/index.html'

docs-serve: $(READY) ## serve the documentation on http://127.0.0.1:8000
	@$(PY) -m mkdocs serve

clean: ## remove the environment, caches and what the demo wrote
	@if [ -n "$(VENV)" ] && [ -f "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi
	@rm -rf out build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# torch first and alone, so that no later requirement can choose another one.
ifneq ($(READY),)
$(READY): pyproject.toml constraints.txt
	@if [ -e "$(VENV)" ] && [ ! -f "$(VENV)/pyvenv.cfg" ]; then \
	    echo 'VENV=$(VENV) exists and is no virtual environment: name another folder, or remove it.' >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'The pinned environment needs Python 3.11 or newer: make PYTHON=python3.12 …' >&2; exit 1; }
	@echo 'Building the environment in $(VENV) (once, a few minutes)' >&2
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PY) -m pip install -qq --constraint constraints.txt torch
	@$(PY) -c 'import triton' 2>/dev/null || [ "$$(uname -s)" != Linux ] || $(PY) -m pip install -qq '$(TRITON)'
	@$(PY) -m pip install -qq --constraint constraints.txt --editable '.[dev]'
	@touch $@
endif
