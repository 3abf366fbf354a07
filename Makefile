# SPDX-License-Identifier: Apache-2.0
# Everything that is done twice. `make help` lists the targets; each works alone and makes what it
# needs, from a machine with python3 (3.10 or newer, with venv), g++ and make.
#
# Variables, on the command line or from the environment:
#   PYTHON       the interpreter that the environment is made with (python3)
#   TORCH_SPEC   what pip is given to install torch, an index included (the pin of pyproject.toml)
#   PIP_ARGS     further arguments of every pip install
#   PYTEST_ARGS  further arguments of pytest (-n0 runs the tests in one process)
#   PYTHONS      interpreters that wheel-test makes environments of (that of .venv, which lends torch)
# The first three are read when the environment is made; `make distclean` lets you choose again.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
unexport PYTHONPATH PYTHONHOME

# The pins live in pyproject.toml, on one line.
BUILD_REQUIRES := $(shell sed -n 's/^requires = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
PINNED_TORCH := $(filter torch==%,$(BUILD_REQUIRES))

PYTHON ?= python3
TORCH_SPEC ?= $(PINNED_TORCH)
PIP_ARGS ?=
PYTEST_ARGS ?=
PYTHONS ?=
VENV := .venv
BIN := $(abspath $(VENV)/bin)
RUN := PATH="$(BIN):$$PATH"
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

# Debian's python3 lacks Python.h; .ci/python_headers puts it here when it is not installed.
HEADERS := $(abspath $(VENV)/headers)
export CPATH := $(HEADERS)/python:$(HEADERS)/root$(if $(CPATH),:$(CPATH))

export SPARSE_UNIFIED_STRICT := 1

LIBRARY := sparse_unified/_C.abi3.so
CPP := $(shell find csrc -type f)
CPP_FORMATTED = $(filter %.h %.cpp %.cu %.cuh,$(CPP) $(wildcard tests/gpu/instructions/*))
TEXTS := $(wildcard *.md *.toml *.py Makefile CMakeLists.txt .ci) \
  bench csrc docs examples sparse_unified tests

## Environment and library

env: $(VENV)/installed  ## make .venv: torch, the tools, and this tree, editable
build: $(LIBRARY)  ## compile what changed in csrc

# A new pin, and a tree that was moved or copied, start a new environment.
TORCH := $(VENV)/$(PINNED_TORCH)
ifneq ($(shell cat $(VENV)/made-in 2>/dev/null),$(CURDIR))
$(TORCH): FORCE
endif
$(TORCH):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit( \
	  f"make: PYTHON must be 3.10 or newer, got {sys.version.split()[0]}")'
	@echo "== $(VENV): $(TORCH_SPEC) (a large download, once)"
	@$(PYTHON) -m venv --clear $(VENV)
	@.ci/python_headers $(BIN)/python $(HEADERS)
	@$(PIP) install -q $(PIP_ARGS) $(TORCH_SPEC)
	@printf '%s' '$(CURDIR)' > $(VENV)/made-in
	@touch $@

$(VENV)/installed: $(TORCH) pyproject.toml setup.py
	@echo "== $(VENV): tools, library"
	@$(PIP) install -q $(PIP_ARGS) $(filter-out torch==%,$(BUILD_REQUIRES))
	@$(RUN) $(PIP) install -q $(PIP_ARGS) --no-build-isolation -e '.[all]'
	@touch $(LIBRARY) $@

# Installing compiles too, after make has looked at the times of files; so look again.
$(LIBRARY): $(CPP) | $(VENV)/installed
	@if [ ! -f $@ ] || [ -n "$$(find csrc -type f -newer $@ -print -quit)" ]; then \
	  echo "== $@"; mkdir -p build; \
	  $(RUN) $(BIN)/python setup.py -q build_ext --inplace > build/library.log 2>&1 || \
	    { cat build/library.log; exit 1; }; \
	  touch $@; \
	fi

cuda: | $(VENV)/installed  ## compile the CUDA kernels into the library, where nvcc is found
	@echo "== cuda"
	@mkdir -p build
	@SPARSE_UNIFIED_CUDA=auto $(RUN) $(BIN)/python setup.py -q build_ext --inplace \
	  > build/library.log 2>&1 || { cat build/library.log; exit 1; }
	@touch $(LIBRARY)

## Checks

# What a change needs, in minutes. Without a GPU the library is built without CUDA kernels, which
# the emulator runs all the same, unless they are part of it already (make cuda).
test: export SPARSE_UNIFIED_CUDA ?= $(shell { grep -qs nv_fatbin $(LIBRARY) || nvidia-smi -L; } \
  > /dev/null 2>&1 && echo auto || echo off)
test: lint types abi ctest emulated pytest  ## the checks of a change

# Sanitizers, deep fuzzing, processes killed at any point, full scale, CUDA compiled, wheels.
test-all: export SPARSE_UNIFIED_TEST_DEEP := 1
test-all: SANITIZE := ON
test-all: MARKED :=
test-all: cuda lint types abi ctest emulated pytest wheel-test  ## all of the checks

SANITIZE := OFF
MARKED := -m "not slow"

lint: $(VENV)/installed  ## ruff, clang-format, spelling
	@echo "== lint"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(CPP_FORMATTED)
	@$(BIN)/codespell --skip '*.safetensors,*.so,*.png,*.svg,__pycache__' $(TEXTS)

types: $(VENV)/installed  ## mypy
	@echo "== types"
	@$(BIN)/mypy

# The mangled names of torch's own C++ classes and functions must not be imported, nor may functions
# of ours be missing, as those of CUDA are from a build without it.
abi: $(LIBRARY)  ## prove stable torch ABI and abi3
	@echo "== abi"
	@! nm -D --undefined-only $(LIBRARY) | grep -E ' _ZNK?[0-9A-Z]*(2at|3c10|5torch|14sparse_unified)'
	@if [ -x $(BIN)/torch-abi-audit ]; then $(BIN)/torch-abi-audit --check both $(LIBRARY); \
	else echo "torch-abi-audit needs Python 3.11: only the imported names were checked"; fi

kernels: $(VENV)/installed  ## the kernels without torch, their C++ tests, the emulated ops
	@echo "== kernels"
	@$(RUN) cmake -S . -B build/cmake -G Ninja --log-level=WARNING \
	  -DSPARSE_UNIFIED_SANITIZE=$(SANITIZE) \
	  -DPython_EXECUTABLE=$(BIN)/python $$(if [ -d $(HEADERS) ]; then \
	  echo -DPython_INCLUDE_DIR=$(HEADERS)/python; fi)
	@$(RUN) cmake --build build/cmake -- --quiet

ctest: kernels  ## run the C++ tests
	@echo "== ctest"
	@$(RUN) ctest --test-dir build/cmake --output-on-failure --parallel $$(nproc)

# The emulated kernels take the place of the CPU's, so they need a process of their own. The sanitizer
# must find libstdc++ loaded to see exceptions.
emulated: $(LIBRARY) kernels  ## the CUDA side of the ops, on emulated kernels
	@echo "== emulated"
	@SPARSE_UNIFIED_TEST_EMULATED=1 $(BIN)/python -m pytest -q -n auto --dist worksteal tests/ops
	@if [ $(SANITIZE) = ON ]; then unset SPARSE_UNIFIED_TEST_DEEP; \
	  SPARSE_UNIFIED_TEST_EMULATED=race $(BIN)/python -m pytest -q -n auto --dist worksteal tests/ops; \
	  SPARSE_UNIFIED_TEST_EMULATED=sanitized ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	    $(BIN)/python -m pytest -q -n auto --dist worksteal tests/ops; fi

# Tests import a part of both packages without a GPU; vLLM's compiled libraries need CUDA and go.
build/vllm_omni: tests/vllm_omni.txt | $(VENV)/installed  ## vLLM-Omni's wheels (300 MB), for tests of the plugin
	@echo "== $@"
	@rm -rf $@ $@.new
	@$(PIP) install -q $(PIP_ARGS) --no-deps --target $@.new -r $<
	@find $@.new/vllm -name '*.so' -delete
	@mv $@.new $@

pytest: $(LIBRARY) kernels  ## the Python tests; PYTEST_ARGS="-k name" chooses
	@echo "== pytest"
	@if [ -n "$${SPARSE_UNIFIED_TEST_DEEP:-}" ]; then $(MAKE) --no-print-directory build/vllm_omni || \
	  echo "vLLM-Omni's wheels cannot be had: tests of its decoder are skipped"; fi
	@$(BIN)/python -m pytest -n auto --dist worksteal $(MARKED) $(PYTEST_ARGS)

## Use

demo: $(LIBRARY)  ## from nothing to a table and a picture under demo/
	@$(RUN) python examples/demo.py --out demo

# A dense model in miniature, and what pruning and conversion make of it by calibration, untuned.
MINIATURE := --cfg-text-scale 3 --timestep-shift 2 --size 48x48
app: $(LIBRARY)  ## a page in the browser, with three small models side by side
	@rm -rf build/app
	@$(RUN) sparse-unified mini write scenes build/app/dense > build/app.log
	@$(RUN) python examples/miniature data build/app/data --count 48 >> build/app.log
	@$(RUN) sparse-unified calibrate build/app/dense --task generation --samples 48 --inputs 512 \
	  --prompts build/app/data/records.jsonl $(MINIATURE) --out build/app/stats.safetensors \
	  --scores build/app/scores.safetensors >> build/app.log
	@$(RUN) sparse-unified prune build/app/dense build/app/pruned --axis width --component gen \
	  --keep-ratio 0.5 --scores build/app/scores.safetensors >> build/app.log
	@$(RUN) sparse-unified convert build/app/dense build/app/sparse --num-experts 16 --top-k 8 \
	  --layers all --scores build/app/scores.safetensors --router-init activation \
	  --stats build/app/stats.safetensors >> build/app.log
	@$(RUN) sparse-unified app build/app/dense build/app/pruned build/app/sparse $(MINIATURE) --open

reproduce: $(LIBRARY)  ## the study of docs/study.md, or what is missing of it, in build/study
	@$(RUN) python examples/miniature study build/study --jobs 2
	@$(RUN) python examples/miniature report build/study --plot build/study.svg \
	  --panel build/study-panel.svg --json build/study.json | tee build/study.md

bench: $(LIBRARY)  ## the speed of the block beside its baselines, on the CPU
	@$(RUN) sparse-unified bench --device cpu

docs: $(VENV)/installed  ## fill the measured numbers into the docs from bench/results
	@$(BIN)/python docs/render.py
	@$(BIN)/python docs/api.py

resources: $(LIBRARY) kernels  ## what the CUDA kernels take of a multiprocessor; needs nvcc
	@$(BIN)/python docs/resources.py

wheel: $(VENV)/installed  ## wheel and source archive in dist/
	@rm -rf build/lib* build/bdist* dist
	@$(RUN) $(PIP) wheel -q --no-build-isolation --no-deps -w dist .
	@$(RUN) python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' > build/sdist.log
	@ls -l dist

wheel-test: wheel  ## the wheel, and that of the sdist built offline, used in new environments
	@$(BIN)/python tests/wheel_smoke.py dist
	@$(BIN)/python tests/wheel_smoke.py dist --sdist
	@if [ -n "$(PYTHONS)" ]; then $(BIN)/python tests/wheel_smoke.py dist \
	  --torch "$(TORCH_SPEC)" $(PYTHONS:%=--python %); fi

clean:  ## remove what was built, keep the environment
	@rm -rf build dist demo *.egg-info $(LIBRARY) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove the environment too
	@rm -rf $(VENV)

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

FORCE:
.PHONY: env build cuda test test-all lint types abi kernels ctest emulated pytest demo app reproduce bench docs resources wheel wheel-test clean distclean help FORCE
