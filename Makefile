# make train    set up .venv, train the quickstart recipe, print a results table
# make test     set up .venv, lint, type-check and run the whole test suite
.PHONY: help train test lint docs clean
PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin

help:
	@sed -n '1,2s/^# //p' Makefile
	@echo "make lint     ruff and mypy alone"
	@echo "make docs     regenerate docs/config.md"
	@echo "Does a resumed run equal an uninterrupted one here? python tools/verify_resume.py --config-file configs/debug.yaml"
	@echo "make clean    remove .venv and caches (not output/)"

train: .venv/installed
	$(BIN)/python tools/train_net.py --config-file configs/quickstart/digits.yaml --num-gpus 0 --resume OUTPUT_DIR output/quickstart

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/python tools/generate_config_docs.py

clean:
	rm -rf .venv build dinoengine.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "dinoengine needs Python 3.10 or newer, but $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv || { echo "Could not make .venv. On Debian or Ubuntu: apt install python3-venv"; rm -rf .venv; exit 1; }
	@touch $@

# Stamps are made after pip has succeeded, so an interrupted install is repeated.
.venv/installed: .venv/created setup.py
	@echo "Installing dinoengine with PyTorch into .venv: about 5.4 GB, two to five minutes the first time."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@
