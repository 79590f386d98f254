# A fresh checkout needs only make and Python >= 3.10: each target sets up what it needs in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin/python
READY := $(VENV)/.ready

# The same for the oldest torch that the package accepts, and the tests of the package: not those of bench, nor those of
# the machine code, for which `make test` has the oldest Triton.
OLDEST := .venv-oldest
OLDEST_TESTS = $(shell grep -LE '^(from|import) (bench|test_compile_ahead)\b' tests/test_*.py)

# The same with trainers that others wrote.
INTEGRATIONS := .venv-integrations

# Where `make gpu` writes.
OUT ?= runs/gpu

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-ahead test-oldest test-integrations lint bench micro gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## create .venv with the pinned requirements and this package

demo: $(READY) ## run the main training job; pass options as ARGS="..."
	$(BIN) -m bench.learn.train $(ARGS)

test: $(READY) ## run the tests; pass pytest options as ARGS="..."
	$(BIN) -m pytest $(ARGS)

test-ahead: $(READY) ## the kernels' machine code, twice as much of it as make test has
	COMPILE_AHEAD=all $(BIN) -m pytest tests/test_compile_ahead.py $(ARGS)

test-oldest: $(OLDEST)/.ready ## the package's tests with the oldest torch it accepts, several GB in .venv-oldest
	$(OLDEST)/bin/python -m pytest $(OLDEST_TESTS) $(ARGS)

test-integrations: $(INTEGRATIONS)/.ready ## runs of Lightning and Hugging Face's Trainer, 2 GB or more in .venv-integrations
	$(INTEGRATIONS)/bin/python -m pytest tests/integrations $(ARGS)

lint: $(READY) ## check style, format and types
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy

bench: $(READY) ## compare with backpropagation; pass options as ARGS="..."
	$(BIN) -m bench.cpu.compare $(ARGS)

# Rounds of a millisecond or more, for a twentieth of a second, five at least.
micro: $(READY) ## time every operator alone, on the GPU if there is one; pass pytest options as ARGS="..."
	mkdir -p runs
	$(BIN) -m pytest bench/micro --benchmark-max-time=0.05 --benchmark-min-time=0.001 --benchmark-json=runs/micro.json \
		--benchmark-columns=min,median,iqr,rounds $(ARGS)

# On a machine whose own Python has torch with CUDA, nothing is set up.
ifneq ($(filter gpu,$(MAKECMDGOALS)),)
GPU_PYTHON := $(shell $(PYTHON) -c 'import torch, triton; assert torch.cuda.is_available()' 2> /dev/null && echo $(PYTHON))
endif

gpu: $(if $(GPU_PYTHON),,$(READY)) ## tests, checks and times on the GPU here, in OUT=dir; pass options as ARGS="..."
	$(or $(GPU_PYTHON),$(BIN)) -m bench.gpu $(OUT) $(ARGS)

clean: ## remove the environments, caches and build products; data/ and runs/ stay
	rm -rf $(foreach folder,$(VENV) $(OLDEST) $(INTEGRATIONS),$(folder) $(folder)-unfinished)
	rm -f dfa_kernels/backends/*/*.so
	rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find bench csrc dfa_kernels tests -name __pycache__ -prune -exec rm -rf {} +

# $(call install,FOLDER,FILE): makes an environment with the file's requirements and this package. FOLDER-unfinished
# is there meanwhile, so an interrupted set-up starts from nothing; the caller turns it into FOLDER/.ready.
define install
	@command -v $(PYTHON) > /dev/null || \
		{ echo "$(PYTHON) not found, expected Python 3.10 or newer: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1), expected 3.10 or newer: make PYTHON=..." >&2; exit 1; }
	if [ -e $(1)-unfinished ]; then rm -rf $(1); fi
	touch $(1)-unfinished
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --disable-pip-version-check --requirement $(2)
	$(1)/bin/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps --editable .
endef

$(READY): requirements.txt requirements-triton.txt pyproject.toml setup.py
	$(call install,$(VENV),requirements.txt)
	grep '^triton==' requirements-triton.txt | while read -r requirement; do \
		folder=$(VENV)/triton/$$(expr "$$requirement" : 'triton==\([0-9.]*\)'); \
		[ -e $$folder ] || $(BIN) -m pip install --disable-pip-version-check --no-deps --target $$folder "$$requirement" \
			< /dev/null || exit 1; \
	done
	mv $(VENV)-unfinished $@

$(OLDEST)/.ready: requirements-oldest.txt pyproject.toml setup.py
	$(call install,$(OLDEST),requirements-oldest.txt)
	mv $(OLDEST)-unfinished $@

$(INTEGRATIONS)/.ready: requirements-integrations.txt pyproject.toml setup.py
	$(call install,$(INTEGRATIONS),requirements-integrations.txt)
	mv $(INTEGRATIONS)-unfinished $@
