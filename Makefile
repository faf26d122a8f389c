# `make demo` and `make test` do their whole set-up: a venv in .venv and, as root on Debian or Ubuntu, the
# system tools by apt. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
PYTEST_ARGS ?=

# Stamps make repeats fast: the venv is made again only when what it depends on changed.
READY := $(VENV)/.layerkit-ready
TOOLS := $(VENV)/.layerkit-tools

.PHONY: help demo test lint format bench proto images tools clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 18

$(TOOLS): scripts/setup-tools
	@scripts/setup-tools
	mkdir -p $(VENV)
	touch $@

$(READY): pyproject.toml scripts/find-python | $(TOOLS)
	@python=$$(scripts/find-python)
	# The stamp of the tools lies in the folder before the venv does; a venv of another Python is made anew.
	if ! $(BIN)/python -c 'import sys, pip; assert sys.version_info >= (3, 11)' 2>/dev/null; then
	    echo "making $(VENV) with $$python" >&2
	    "$$python" -m venv $(VENV)
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,lint]'
	touch $@

tools: ## install the missing system tools (as root on Debian or Ubuntu), else list them
	@scripts/setup-tools

demo: $(READY) ## remap a real image for two id maps, mount both, and show what that saved
	@$(BIN)/python scripts/demo.py

test: $(READY) ## run the tests (PYTEST_ARGS=... adds arguments)
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

lint: $(READY) ## ruff, mypy --strict, and the directions of imports
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## let ruff format and mend the code
	@$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## run the benchmarks and write docs/benchmarks.md
	@$(BIN)/python bench/run.py

proto: $(READY) ## make the protocol modules of layerkit/hosts/containerd from their .proto files
	@tools=$$(mktemp -d)
	trap 'rm -rf "$$tools"' EXIT
	# Not the newest: modules need at least the protobuf that made them.
	$(BIN)/python -m pip install --quiet --target "$$tools" grpcio-tools==1.73.1 setuptools
	PYTHONPATH="$$tools" $(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. layerkit/hosts/containerd/*.proto

images: $(READY) ## build the sample images into sample-images/out/
	@$(BIN)/python sample-images/tiny.py sample-images/out/tiny.tar >/dev/null
	$(BIN)/python sample-images/app.py sample-images/out/app.tar

clean: ## remove the venv, the caches and the built images
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache sample-images/out bench/out build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
