# Two commands on a machine with python 3.11 or later: `make serve` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: serve test lint format lock clean

serve: .venv/installed
	$(BIN)/miss-iwem serve

test: .venv/tested-with
	$(BIN)/python -m pytest --numprocesses 2

lint: .venv/tested-with
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell

format: .venv/tested-with
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# Versions are pinned for every extra at once; `lock` writes them anew from what pip chooses.
lock:
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "torch==2.13.0" --editable ".[train,s3,dev]"
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock

.venv/installed: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint requirements.lock --editable .
	touch $@

.venv/tested-with: .venv/installed
	$(BIN)/pip install --quiet --constraint requirements.lock --editable ".[train,s3,dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
