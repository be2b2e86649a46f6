# Everything is set up by the first call and skipped by the next. Bytecode is compiled when a module
# is first imported: most of what is installed never is.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
SHAKESPEARE := data/shakespeare/manifest.json
# The other files need not be imported a second time.
PROCESS_TESTS = $(shell grep -rl 'mark\.processes' tests --include='test_*.py')

.PHONY: help train test lint clean

help:
	@echo "make train   set up, prepare the text and train configs/quickstart.toml;"
	@echo "             a second call continues. make train ARGS='--train.steps 50' changes settings"
	@echo "make test    set up, then lint and run the tests"
	@echo "make lint    set up, then ruff and mypy"
	@echo "make clean   remove the environment and caches; runs/ and data/ stay"
	@echo "PYTHON=...   the Python that makes the environment, 3.11 or newer (now $(PYTHON))"

train: .venv/.runs $(SHAKESPEARE)
	$(BIN)/distmoe train configs/quickstart.toml $(ARGS)

# Tests that start processes come by themselves: they bring ranks of their own.
test:
	@$(MAKE) --no-print-directory --jobs=2 lint .triton36/.installed
ifeq ($(ARGS),)
	$(BIN)/pytest -n 2 -m "not processes and not gpu"
	$(BIN)/pytest -n 2 --dist loadfile -m "processes and not gpu" $(PROCESS_TESTS)
else
	$(BIN)/pytest $(ARGS)
endif

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .triton36 build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(SHAKESPEARE): | .venv/.runs
	$(BIN)/distmoe data prepare --builtin shakespeare --out data/shakespeare

# The Triton of the GPU machines: kernels are compiled with it ahead of time, and never run.
.triton36/.installed: | .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --target .triton36 triton==3.6.0
	@touch $@

# What tests, tools and every optional part need comes on top of what a run needs.
.venv/.installed: .venv/.runs
	@echo "adding to .venv what tests need, which takes a minute or two"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

.venv/.runs: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "there is no $(PYTHON); install Python 3.11 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) has no venv; on Debian: apt install python3-venv" >&2; exit 1; }
	@echo "setting up .venv, which takes a minute"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e .
	@touch $@
