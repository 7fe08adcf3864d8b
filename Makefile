# Everything runs in .venv in this folder; the stamps make a second call cheap.
PYTHON ?= python3
BIN := .venv/bin
PROMPT ?= a red circle moving right on a black background

.PHONY: demo test check bench clean
.DELETE_ON_ERROR:

demo: .venv/.installed  ## one video from one prompt on two CPU ranks; its path is printed last
	@$(BIN)/wan-dist prompt="$(PROMPT)" runtime.device=cpu runtime.ranks=2

test: .venv/.installed-test  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -n 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ranks tests/e2e tests/slurm

check: .venv/.installed-dev  ## lint, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.installed  ## the denoising step: diffusers, one rank, two ranks; one thread each
	OMP_NUM_THREADS=1 $(BIN)/wan-dist task=bench parallelism.ulysses=2

clean:
	rm -rf .venv outputs multirun

# torch first and alone: its own range picks the build that is on offer here (CPU or CUDA), and the rest follows it.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet 'torch>=2.11,<2.14'
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test,slurm]'
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
