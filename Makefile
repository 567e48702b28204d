# Every target sets up .venv by itself: Python 3.11 or newer and make are all that a machine needs.
#
#   make test                                                        torch from the package index in use
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu       torch from another one (CPU build)
#
# .venv is used again as long as pyproject.toml and constraints.txt do not change. An environment that was made by hand
# is installed into; one that was interrupted half-way is made anew.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
SCALE ?=
ARGS ?=
WORKERS ?= 2

# A file's tests stay in one worker, which shares their fixtures; tests/conftest.py puts the longest files first.
# Bytecode is written whatever the shell says: without it every process that tests start compiles our modules anew.
PYTEST = PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
PY := $(BIN)/python
READY := $(VENV)/.ready
UNFINISHED := $(VENV)/.unfinished
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
PIP := $(PY) -m pip -qq --disable-pip-version-check

# pytest's -m: gpu tests only where there is a CUDA device.
HAS_CUDA := $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'

.DEFAULT_GOAL := help
.PHONY: help venv test test-all check format quickstart clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON=python3.12, TORCH_INDEX=URL, SCALE=smoke, WORKERS=4 (of pytest), ARGS='-k tree' (handed to pytest or quickstart)."

venv: $(READY) ## set up .venv, or bring it up to date

$(READY): pyproject.toml constraints.txt
	@if [ -e $(UNFINISHED) ]; then echo "$(VENV) was left unfinished; making it anew"; \
	find $(VENV) -mindepth 1 -not -path $(UNFINISHED) -delete; fi
	@python=$(PY); [ -x $$python ] || python="$(PYTHON)"; \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "Draftsmith needs Python 3.11 or newer and '$$python' is not: name one with make PYTHON=..." >&2; exit 2; }
	@mkdir -p $(VENV) && rm -f $(READY) && touch $(UNFINISHED)
	@[ -x $(PY) ] || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing $(TORCH)"
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@echo "installing Draftsmith and its dependencies"
	@$(PIP) install -c constraints.txt -e '.[train,retrieval,serve,ray,dev]'
	@rm $(UNFINISHED) && touch $(READY)

test: $(READY) ## the tests: CPU, offline, without the slow ones (gpu ones where there is CUDA)
	@marks="not slow"; $(HAS_CUDA) || marks="not slow and not gpu"; \
	set -x; $(PYTEST) -m "$$marks" $(ARGS)

test-all: $(READY) ## every test that this machine can run, the slow ones too
	@marks=""; $(HAS_CUDA) || marks="not gpu"; \
	set -x; $(PYTEST) -m "$$marks" $(ARGS)

check: $(READY) ## lint, format and types
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

format: $(READY) ## mend what ruff can mend
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

quickstart: $(READY) ## train, retrieve and compare on text that this machine has (SCALE=smoke or full: a minute, an hour)
	$(BIN)/draftsmith quickstart $(if $(SCALE),--scale $(SCALE)) $(ARGS)

clean: ## remove build outputs and caches
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find infer retrieval train recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## the same, and .venv
	rm -rf $(VENV)
