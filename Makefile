# Everything runs in .venv, which `make install` makes with the tested versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# A module is compiled when it is first imported: pip would compile all of them, most of which nothing imports.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-all lint docs bench gpu

install: .venv/installed

.venv/installed: setup.py pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/cuda/*)
	$(PYTHON) -m venv .venv
	$(PIP) setuptools cmake
	$(PIP) --no-build-isolation --editable ".[test]"
	@test -e kernels/libmfengine_cuda.so || echo "CUDA library: not built; $(BIN)/python -m mfengine.info says why"
	touch $@

# Trains a one-step generator of digits, draws samples, evaluates and reports. A second run continues the first.
demo: install
	test -e data/digits/dataset.json || $(BIN)/python -m mfengine.prepare digits data/digits
	$(BIN)/python -m mfengine.train digits --resume auto
	$(BIN)/python -m mfengine.evaluate runs/digits --data data/digits
	$(BIN)/python -m mfengine.generate runs/digits --data data/digits --steps 1 2 --per-label 3 --out runs/digits/grid.png
	$(BIN)/python -m mfengine.report runs/digits

# The quick tests: three minutes on two idle cores, after two minutes of installation and lint.
test: install lint
	$(BIN)/python -m pytest tests --numprocesses 2 --dist worksteal -m "not slow"

# All tests, including the slow ones, and with three kills where `test` has one.
test-all: install lint
	$(BIN)/python -m pytest tests --numprocesses 2 --dist worksteal --kills 3

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds the site, docs/ and the reference of public names, in site/; fails on a broken link.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

.venv/docs: .venv/installed
	$(PIP) --no-build-isolation --editable ".[docs]"
	touch $@

# Throughput beside baselines and the machine's ceilings; fails if it is below the accepted figures.
bench: install
	$(BIN)/python -m pytest benchmarks --guard

# Checks and times this GPU in nine minutes; writes JSON to $$OUT if that is set. Needs only torch, triton and numpy.
gpu:
	$(PYTHON) kernels/cuda/build.py
	$(PYTHON) -m benchmarks.gpu
