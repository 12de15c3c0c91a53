# Everything lives in .venv; nothing needs to be activated.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-fast lint types clean

quickstart: .venv/train.stamp  ## train the smallest model on built-in digits
	$(BIN)/qtvit quickstart

test: .venv/dev.stamp  ## run the tests
	$(BIN)/pytest --numprocesses auto --dist loadfile --max-worker-restart 0

test-fast: .venv/dev.stamp  ## run the tests that are not slow, in a few minutes
	$(BIN)/pytest --numprocesses auto --dist loadfile --max-worker-restart 0 -m "not slow"

lint: .venv/dev.stamp  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info

.venv/%.stamp: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("qtvit needs Python 3.10 or newer; try make PYTHON=python3.12") if sys.version_info < (3, 10) else None'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@
