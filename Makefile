# make run    the lab on this machine: environment, models, database, Ray, dispatcher, web page
# make test   the same environment and the whole test suite
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# where nothing can be installed, the sources themselves are the environment
SOURCES := lab:workers:kernels:webui:storage
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
ARGS ?=

.PHONY: run test check venv oracles models browser format gpu-test clean

run: venv
	exec $(BIN)/attnlab up $(ARGS)

test: oracles models browser
	$(BIN)/python -m pytest $(ARGS)

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check --no-cache .
	$(BIN)/pyright

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	PYTHON=$(PYTHON) ./.ci/make_environment.sh $(VENV)
	touch $@

oracles: $(VENV)/.oracles

$(VENV)/.oracles: pyproject.toml .ci/install_oracles.sh | venv
	./.ci/install_oracles.sh $(VENV)
	touch $@

# the bundled models: once, into ATTNLAB_MODELS or ~/.attnlab/models
models: venv
	$(BIN)/attnlab models fetch --all

browser: venv
	./.ci/install_browser.sh $(BIN)/python

# also from a plain checkout with nothing installed but torch, triton and numpy
gpu-test:
	PYTHONPATH=$(SOURCES) $(GPU_PYTHON) -m pytest -c /dev/null --rootdir=. --noconftest --import-mode=importlib \
	    -o markers="gpu: needs a CUDA device" -ra tests/test_kernels_gpu.py || [ $$? = 5 ]  # 5: all skipped
	mkdir -p benchmarks/results
	PYTHONPATH=$(SOURCES) $(GPU_PYTHON) benchmarks/softmax_attention.py --device cuda \
	    --out benchmarks/results/softmax_attention_cuda.json
	PYTHONPATH=$(SOURCES) $(GPU_PYTHON) benchmarks/softmax_targets.py \
	    --out benchmarks/results/softmax_targets.json

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
