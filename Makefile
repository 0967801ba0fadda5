PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# threads that spin while they wait slow each other down on a machine that does anything else
export OMP_WAIT_POLICY ?= passive
# modules are compiled once, not by every process that the suite starts
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-interop matrix coverage check format bench bench-peers clean

help:
	@echo "make demo      a small network trained with tuned, remembered Jacobians"
	@echo "make test      the test suite"
	@echo "make test-all  the test suite with all that is too slow for every change, and 10 000 fuzzed calls"
	@echo "make test-interop  models of other libraries, at pinned versions (gigabytes, once)"
	@echo "make matrix    the test suite on the oldest and the newest supported torch (gigabytes, once)"
	@echo "make coverage  the test suite, with a coverage report"
	@echo "make check     lint, formatting and types"
	@echo "make format    rewrite the sources as \`make check\` wants them"
	@echo "make bench     autojac against torch's own ways on this machine"
	@echo "make bench-peers  autojac against JAX, asdex and TensorFlow, in environments of their own"
	@echo "make clean     remove the environment and everything generated"

# The stamp is written last: an interrupted installation starts over.
$(READY): pyproject.toml constraints.txt
	@echo "Installing autojac into $(VENV) (a few minutes, once) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	@AUTOJAC_STORE="$(CURDIR)/cache/autojac.db" $(BIN)/autojac demo

# one process a core, each with one thread
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m 'nightly or not nightly' --timeout 3600

# other versions of Python and torch, each in an environment of its own; no part of CI
matrix:
	@.ci/matrix $(MATRIX)

# models of other libraries, in an environment of their own; no part of CI
test-interop:
	@.ci/interop $(INTEROP)

coverage: $(READY)
	$(BIN)/python -m pytest --cov --cov-report=term

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	@AUTOJAC_STORE="$(CURDIR)/cache/autojac.db" $(BIN)/autojac bench $(BENCH)

# other libraries, in environments of their own on Python 3.12; no part of CI
bench-peers: $(READY)
	@AUTOJAC_STORE="$(CURDIR)/cache/autojac.db" .ci/peers $(BENCH)

clean:
	rm -rf $(VENV) $(VENV)-torch* $(VENV)-interop $(VENV)-peers build dist *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f cache/*.db cache/*.db-*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
