# make test    every check; the same as .ci/run
# make demo    train a small model on four processes and on one, and compare
# make docs    the documentation, to read from build/docs/index.html
# make lint    ruff, mypy and the import layers only
# make clean   remove what the other targets made
#
# Each target makes .venv and installs into it first, once, and again only when pyproject.toml or
# constraints.txt change; after that no network is needed. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
JOBS ?= 2
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Files and folders of tests; all of them if empty.
TESTS ?=
# Pins that stand instead of those of constraints.txt.
INSTEAD ?= /dev/null

# An active environment or PYTHONPATH of the caller must not leak into ours; without bytecode, every
# process that a test starts would compile the package again.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PYTHONDONTWRITEBYTECODE
# What was given to make is not for a make that a test starts.
unexport VENV INSTEAD TESTS
export PYTHONNOUSERSITE := 1

.DEFAULT_GOAL := test
.PHONY: demo test test-oldest suite lint docs clean

demo: $(STAMP)
	$(BIN)/python -m examples.demo

test: lint suite

# The same tests with the oldest releases that pyproject.toml allows, in an environment of its own.
test-oldest:
	$(MAKE) suite VENV=.venv-oldest INSTEAD=constraints-oldest.txt

suite: $(STAMP)
	@# A file's tests stay on one worker, so that their processes are started once; files start in
	@# the order of tests/conftest.py, the longest first, not of their numbers of tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	  $(TESTS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	@$(BIN)/python -c "import mkdocs, mkdocstrings, material" 2>/dev/null || \
	  $(BIN)/python -m pip install --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(STAMP): pyproject.toml constraints.txt $(INSTEAD)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "ilm_compile needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another interpreter: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@awk -F== 'FILENAME == ARGV[1] {own[$$1]; print; next} !($$1 in own)' \
	  $(INSTEAD) constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --constraint $(VENV)/constraints.txt --editable '.[dev,hf]'
	@# The site is built by a test where its packages are to be had; nothing else needs them.
	@$(BIN)/python -m pip install --quiet --retries 0 --timeout 10 --constraint $(VENV)/constraints.txt \
	  --editable '.[docs]' >$(VENV)/docs.log 2>&1 || \
	  echo "The packages of [docs] cannot be had (see $(VENV)/docs.log): the site is not built."
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest build dist *.egg-info runs .coverage htmlcov
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
