# `make demo` and `make test` are all a newcomer needs; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint docs bench clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

DEMO := runs/demo
demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(BIN)/selfsup pretrain bert-tiny-english --data demo/unlabeled --out $(DEMO)
	$(BIN)/selfsup compare $(DEMO) --task tagging --data demo/labels/train.conllu.xz \
	  --valid demo/labels/dev.conllu.xz --test demo/labels/test.conllu.xz \
	  --labels 50 300 --seeds 0 1 2 3 --lrs 1e-3 3e-3
	$(BIN)/selfsup report $(DEMO)
	@echo "open $(DEMO)/report.html in a browser"

# One thread a process: several processes that each spin on all cores slow each other down.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/installed-dev
	$(BIN)/pytest -n auto --maxprocesses 8

test-all: export OMP_NUM_THREADS = 1
test-all: $(VENV)/installed-dev
	$(BIN)/pytest -n auto --maxprocesses 8 -m 'not gpu and not fault'
	$(BIN)/pytest -m fault

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/build.py --check

docs: $(VENV)/installed
	$(BIN)/python docs/build.py

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
