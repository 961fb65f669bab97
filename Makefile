# Needs Python >= 3.11 with pip, and make. Everything else goes into .venv, once: pip's own configuration is honoured.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CHECKED := imprint model service research benchmarks tests deploy examples $(wildcard scripts)

.PHONY: serve test gpu lint docs clean

serve: $(VENV)/.serve
	$(BIN)/imprint serve

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Everything that a GPU is needed for: the tests that it runs otherwise than a CPU, and the measurements.
gpu: $(VENV)/.test
	$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("torch finds no GPU here")'
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/imprint bench --page docs/performance-tables.md

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(CHECKED)

# The pages of docs/ as a site: open build/site/index.html.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# pip installs into the environment from outside: some systems ship venv without ensurepip.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Imprint needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv --without-pip $(VENV)

$(VENV)/.serve: pyproject.toml | $(BIN)/python
	$(PYTHON) -m pip --python $(BIN)/python install --editable .
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(PYTHON) -m pip --python $(BIN)/python install --editable '.[test]'
	touch $@ $(VENV)/.serve

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find imprint model service research benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
