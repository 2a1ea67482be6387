# make run: MNIST end to end.  make test: the tests but for the slow ones, which make test-slow runs; make test-all: both.
# make test-large: the networks of the table of coverage that take 10 GB, and the parts of the study on one rank.
# make test-newest: what meets ArviZ, result files and the command line, on the newest Python of this machine.
# Each installs what it needs, also on a bare machine.
# make horovod: Horovod built for the torch that is installed, for training on several ranks; make test uses it after.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: run test test-slow test-all test-large test-newest install-newest test-any-python digits lint docs horovod clean

run: $(VENV)/installed data/mnist/t10k-labels-idx1-ubyte
	$(BIN)/python -m ppl_bnn.run runs/mnist-fc

DIGITS := data/mnist/t10k-labels-idx1-ubyte data/fashion-mnist/t10k-labels-idx1-ubyte

# Each worker takes half of the tests in their order, so those of a file share trainings, and then half of what is left.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test: $(VENV)/installed-test $(DIGITS)
	$(PYTEST) -m 'not slow'

# pytest ends with 5 where no test is marked slow.
test-slow: $(VENV)/installed-test $(DIGITS)
	$(PYTEST) -m 'slow and not large' || test $$? -eq 5

test-all: $(VENV)/installed-test $(DIGITS)
	$(PYTEST) -m 'not large'

test-large: $(VENV)/installed-test $(DIGITS)
	$(BIN)/python -m pytest -m large

NEWEST = @if python=$$(tools/newest_python); then $(MAKE) VENV=.venv-newest PYTHON=$$python

test-newest:
	$(NEWEST) test-any-python; \
	else echo 'no CPython 3.12 or newer on PATH or under pyenv: the tests on the newest Python are left out'; fi

# What make test-newest installs.
install-newest:
	$(NEWEST) .venv-newest/installed-test; fi

test-any-python: $(VENV)/installed-test $(DIGITS)
	$(PYTEST) -m 'any_python and not slow'

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ppl_bnn needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --disable-pip-version-check --editable '.[test]'
	-$(BIN)/python tools/build_horovod.py --kept
	touch $@

digits: $(DIGITS)

# The last of the files that the tool writes.
data/%/t10k-labels-idx1-ubyte: | $(VENV)/installed
	$(BIN)/python tools/fetch_data.py $*

docs: $(VENV)/installed
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[docs]'
	$(BIN)/mkdocs build --strict

horovod: $(VENV)/installed
	$(BIN)/python tools/build_horovod.py

clean:
	rm -rf $(VENV) .venv-newest
