# A fresh checkout needs only make and Python >= 3.10: each target sets up what it needs in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin/python
READY := $(VENV)/.ready
# Present while .venv is being built, so it is outside of it: an interrupted set-up starts from nothing.
UNFINISHED := .venv-unfinished

# Where `make gpu` writes.
OUT ?= runs/gpu

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## create .venv with the pinned requirements and this package

demo: $(READY) ## run the main training job; pass options as ARGS="..."
	$(BIN) -m bench.learn.train $(ARGS)

test: $(READY) ## run the tests; pass pytest options as ARGS="..."
	$(BIN) -m pytest $(ARGS)

lint: $(READY) ## check style, format and types
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy

bench: $(READY) ## compare with backpropagation; pass options as ARGS="..."
	$(BIN) -m bench.cpu.compare $(ARGS)

# On a machine whose own Python has torch with CUDA, nothing is set up.
ifneq ($(filter gpu,$(MAKECMDGOALS)),)
GPU_PYTHON := $(shell $(PYTHON) -c 'import torch, triton; assert torch.cuda.is_available()' 2> /dev/null && echo $(PYTHON))
endif

gpu: $(if $(GPU_PYTHON),,$(READY)) ## tests, checks and times on the GPU here, in OUT=dir; pass options as ARGS="..."
	$(or $(GPU_PYTHON),$(BIN)) -m bench.gpu $(OUT) $(ARGS)

clean: ## remove .venv, caches and build products; data/ and runs/ stay
	rm -rf $(VENV) $(UNFINISHED) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find bench csrc dfa_kernels tests -name __pycache__ -prune -exec rm -rf {} +

$(READY): requirements.txt requirements-triton.txt pyproject.toml setup.py
	@command -v $(PYTHON) > /dev/null || \
		{ echo "$(PYTHON) not found, expected Python 3.10 or newer: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1), expected 3.10 or newer: make PYTHON=..." >&2; exit 1; }
	if [ -e $(UNFINISHED) ]; then rm -rf $(VENV); fi
	touch $(UNFINISHED)
	$(PYTHON) -m venv $(VENV)
	$(BIN) -m pip install --disable-pip-version-check --requirement requirements.txt
	$(BIN) -m pip install --disable-pip-version-check --no-build-isolation --no-deps --editable .
	grep '^triton==' requirements-triton.txt | while read -r requirement; do \
		folder=$(VENV)/triton/$$(expr "$$requirement" : 'triton==\([0-9.]*\)'); \
		[ -e $$folder ] || $(BIN) -m pip install --disable-pip-version-check --no-deps --target $$folder "$$requirement" \
			< /dev/null || exit 1; \
	done
	mv $(UNFINISHED) $@
