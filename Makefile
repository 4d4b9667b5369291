# Two commands matter on a fresh computer: `make quickstart` and `make test`.
# A bare Python >= 3.11 and a package registry are enough; everything else lands in .venv.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
EXTRAS := dev,metrics,onnx,docs,serve
# One thread a process: several processes use the cores, spinning thread pools do not.
export OMP_NUM_THREADS ?= 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup quickstart test test-browser notebooks docs lab run export clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/ready  ## create .venv and install the package with its development tools

.venv/ready: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -e ".[$(EXTRAS)]" || $(BIN)/python -m pip install -q -e ".[$(EXTRAS)]"
	touch $@

quickstart: setup  ## draw a world, learn to caption it, show scores and a picture (minutes, no GPU)
	$(BIN)/expnet quickstart --out runs/quickstart

test: setup notebooks  ## what CI runs: every notebook, then pytest (which also checks that notebooks are clean and exported)
	$(BIN)/python -m pytest -m alone
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not browser and not alone"

test-browser: setup  ## JupyterLab, the site and expnet serve in headless Chromium; skipped by name where there is none
	@which chromium chromium-browser google-chrome >/dev/null || timeout 300 sh -c "apt-get update && apt-get install -y --no-install-recommends chromium" >/dev/null 2>&1 || true
	$(BIN)/python -m pytest -m browser -rs

notebooks: setup  ## execute every notebook
	$(BIN)/nbdev-test --n-workers $(WORKERS)

docs: setup  ## render the site into _docs/html, offline; a warning is an error
	$(BIN)/python docs/build.py

lab: setup  ## open the walkthrough in JupyterLab
	$(BIN)/jupyter lab nbs/index.ipynb

run: setup  ## execute, save and clean notebooks: make run NB=nbs/data/03_shapes.ipynb (default: all)
	$(BIN)/nbdev-export
	$(BIN)/nbdev-test --n-workers $(WORKERS) --save $(NB)
	$(BIN)/nbdev-clean

export: setup  ## write expnet/ from the notebooks
	$(BIN)/nbdev-export

clean:  ## remove what runs and builds leave behind (keeps .venv)
	rm -rf runs build dist _docs _proc *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
