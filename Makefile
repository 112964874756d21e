# Everything a newcomer types. Variables:
#   PYTHON       the interpreter the virtual environment is made with (3.11 to 3.13)
#   VENV         where the environment goes
#   TORCH_INDEX  an index to take torch from, e.g. https://download.pytorch.org/whl/cpu for the small CPU build
#   WORKERS      processes that make test runs tests in: a number, or auto, one more than there are cores (8 at most)
#   RETEST       1: what fails in make test runs once more, alone, provided that all the others were run
#   GPU_FLAGS    more flags for make gpu, e.g. --write-results
#   BENCH_FLAGS  flags for make bench-cpu, make bench-quant and make bench-gateway
#   CHAOS_FLAGS  flags for make chaos, e.g. --engines mock --seed 7
#   RELEASE_FLAGS  flags for make release-check, e.g. --skip demo
#   PY           another interpreter with everything installed; then nothing is set up
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
WORKERS ?= auto
RETEST ?=
PY ?= $(VENV)/bin/python

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help


# A given PY is taken as it is; otherwise the stamp says when the environment was last brought up to date.
STAMP := $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.weft-installed,)

.PHONY: help setup protos format check test retest test-slow kernels gpu bench-cpu bench-core bench-gateway bench-overhead bench-quant demo chaos up release-check size wheels docker-test

help:  ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(STAMP)  ## make the virtual environment (again only when pyproject.toml or constraints.txt change)

$(VENV)/.weft-installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=python3.11")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(VENV)/bin/python -m pip install --quiet --no-deps --index-url $(TORCH_INDEX) -c constraints.txt torch)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[engine,gateway,quantizer,bench,ray,dev]'
	@# A CPU build of torch brings no triton; the kernel tests run it as an interpreter. It exists for Linux x86-64 alone.
	if [ "$$(uname -sm)" = "Linux x86_64" ] && ! $(VENV)/bin/python -c 'import triton' 2>/dev/null; then \
	  $(VENV)/bin/python -m pip install --quiet 'triton==3.6.0'; fi
	@touch $@

# What the images install, for builds without a network. The images' Python is 3.11, whatever this one is.
WHEELS_FOR ?= quantizer engine gateway
WHEEL = $(PY) -m pip download --quiet --only-binary=:all: --python-version 3.11 -c constraints.txt -d docker/wheels

wheels: $(STAMP)  ## fill docker/wheels for docker builds without a network (WHEELS_FOR="gateway": for one image)
	@mkdir -p .weft
	$(PY) docker/requirements.py pyproject.toml $(WHEELS_FOR) > .weft/wheels.txt
	$(if $(TORCH_INDEX),$(WHEEL) --no-deps --index-url $(TORCH_INDEX) torch)
	$(WHEEL) --find-links docker/wheels -r .weft/wheels.txt

docker-test: $(STAMP)  ## build the images, run the compose file, crash it: with a Docker engine, or with one that it can bring up
	PY=$(PY) tests/docker/lane.sh

protos: $(STAMP)  ## generate weft/v1 from protos/weft/v1
	$(PY) tools/generate_stubs.py .

format: $(STAMP)  ## format and fix what ruff can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

check: $(STAMP)  ## lint, format check, types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# pytest's 1 is "all were run, some failed". After anything else the failures alone say nothing about the rest.
AGAIN = $(PY) -m pytest --last-failed --last-failed-no-failures none

test: $(STAMP)  ## the default tests: no GPU, no docker, no network, in several processes (WORKERS=0: in one)
	$(PY) -m pytest -n $(WORKERS) $(if $(RETEST),|| { code=$$?; test $$code = 1 || exit $$code; $(AGAIN); })

retest: $(STAMP)  ## the tests that failed last, once more, in one process
	$(AGAIN)

test-slow: $(STAMP)  ## the tests that take minutes
	$(PY) -m pytest -m slow --timeout 900

kernels: $(STAMP)  ## compile every GPU kernel without a GPU and hold the machine code to its gates
	env -u TRITON_INTERPRET $(PY) -m tools.kernels

gpu: $(STAMP)  ## kernel tests, model parity and benchmarks on a CUDA device (DRY=1: tiny, on the CPU; OUT=folder)
	$(PY) -m tools.gpu $(if $(DRY),--dry) $(if $(OUT),--out $(OUT)) $(GPU_FLAGS)

bench-cpu: $(STAMP)  ## this engine beside llama.cpp and transformers on the CPU (BENCH_FLAGS: see --help)
	$(PY) -m benchmarks.cpu $(BENCH_FLAGS)

bench-core: $(STAMP)  ## what a step costs the host: scheduler, blocks, events, collector (BENCH_FLAGS: see --help)
	$(PY) -m benchmarks.core $(BENCH_FLAGS)

bench-gateway: $(STAMP)  ## what the gateway costs: tokens per CPU second, latency, memory (BENCH_FLAGS: see --help)
	$(PY) -m benchmarks.gateway $(BENCH_FLAGS)

bench-overhead: $(STAMP)  ## what weft bench itself costs, and how true its numbers are (BENCH_FLAGS: --quick)
	$(PY) -m benchmarks.bench_overhead $(BENCH_FLAGS)

bench-quant: $(STAMP)  ## this quantizer beside llm-compressor and plain rounding (BENCH_FLAGS: see --help)
	$(PY) -m benchmarks.quant $(BENCH_FLAGS)

demo: $(STAMP)  ## quantize the demo model, serve it on two engines, stream sixteen completions, kill an engine under them
	$(PY) -m cli demo

chaos: $(STAMP)  ## kill, freeze and cut off engines under 64 streams, and check every token (CHAOS_FLAGS: see --help)
	$(PY) -m tools.chaos $(CHAOS_FLAGS)

up: $(STAMP)  ## the same services, left running in the foreground
	$(PY) -m cli demo --up

release-check: $(STAMP)  ## is HEAD a release: build, install, demo in an empty folder, SBOM, audit (RELEASE_FLAGS: see --help)
	$(PY) -m tools.release $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX)) $(RELEASE_FLAGS)

size:  ## the longest files and functions, lines a folder
	@$(PYTHON) tools/size.py
