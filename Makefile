# setup: a virtual environment with everything. demo: the main job end to end. demo-chain: all stages, from pre-training to PPO. test: what CI runs. See README.md.
#
#   PYTHON=python3.12     another interpreter (3.11 or 3.12)
#   TORCH=torch==2.13.0   another torch; TORCH=system takes the one that PYTHON already has
#   TORCH_INDEX=URL       an index to take torch from, such as one with CPU builds (0.2 GB instead of several)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PYTHON_LATEST ?= python3.12

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What an environment is made by; one Python's venv over another's mixes the two.
WHICH := import sys; print("Python", *sys.version_info[:3], "of", sys.base_prefix)
define SAME_PYTHON
test ! -e $(VENV)/pyvenv.cfg || test "$$($(PYTHON) -c '$(WHICH)')" = "$$($(BIN)/python -c '$(WHICH)')" || \
	{ echo "$(VENV) was made by another Python than $(PYTHON): remove it (make clean), or name its own by PYTHON="; exit 1; }
endef
# Two files of tests at a time: one that waits for a watchdog leaves its core to the other. Each test starts up to 8 processes.
TWO_AT_A_TIME := --numprocesses 2 --dist loadfile
export OMP_NUM_THREADS = 1

.PHONY: setup same-python demo demo-chain test test-full test-latest lint bench clean

setup: $(READY)

# Before each target where PYTHON was given; else only before a set-up, for python3 is another one in each activated environment.
same-python:
	@$(if $(filter file,$(origin PYTHON)),true,$(SAME_PYTHON))

$(READY): pyproject.toml setup.py Makefile | same-python
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 13) else f"{sys.executable} is Python {sys.version.split()[0]}; 3.11 or 3.12 is needed: make setup PYTHON=python3.12")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(SAME_PYTHON)
	@echo "setting up $(VENV): a few minutes, most of them downloads (Linux's default torch is a CUDA build of several GB;"
	@echo "make setup TORCH_INDEX=URL takes torch from another index, TORCH=system the one that is installed)"
	$(PYTHON) -m venv $(if $(filter system,$(TORCH)),--system-site-packages) $(VENV)
	$(if $(filter system,$(TORCH)),$(PIP) show torch | head -2,$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)")
	$(PIP) install --editable ".[dev]"
	@touch $(READY)

demo: $(READY)
	$(BIN)/python tools/demo.py

demo-chain: $(READY)
	$(BIN)/python tools/demo_chain.py

test: lint
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) -m "not slow"

test-full: lint
	$(BIN)/python -m pytest $(TWO_AT_A_TIME)

# The tests on Python 3.12 with the newest accepted megatron-core, in an environment of its own; torch there may be several GB.
test-latest:
	$(MAKE) setup PYTHON="$(PYTHON_LATEST)" VENV=.venv-latest
	.venv-latest/bin/python -m pytest $(TWO_AT_A_TIME) -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python tools/bench_step.py

clean:
	rm -rf $(VENV) .venv-latest build *.egg-info .mypy_cache .ruff_cache .hypothesis
