# Everything runs in .venv in this folder; the stamps make a second call cheap.
PYTHON ?= python3
BIN := .venv/bin
DEMO := outputs/demo

.PHONY: demo test test-all check bench clean
.DELETE_ON_ERROR:

demo: .venv/.installed  ## three videos from three prompts on two CPU ranks, and one picture and one animation of them
	@$(BIN)/wan-dist --multirun hydra.sweep.dir=$(DEMO) runtime.device=cpu runtime.ranks=2 "prompt=\
	'a red circle moving right on a black background',\
	'a blue square moving left on a white background',\
	'a yellow triangle moving up on a navy background'"
	@$(BIN)/python -m wan_dist.output.contact_sheet $(DEMO) $(DEMO)/0/video.mp4 $(DEMO)/1/video.mp4 $(DEMO)/2/video.mp4

# Bytecode is kept, whatever the shell says: hundreds of processes import the same. The longest files are in the first
# folders, so that the end is made of short ones.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
test: .venv/.installed-test  ## everything that is promised but Slurm, in minutes on two cores
	$(PYTEST) tests/e2e tests/ranks tests/unit -n 2 --dist loadfile --no-loadscope-reorder

test-all: .venv/.installed-test  ## that with more cases, and Slurm where it is installed: before a change lands
	WAN_DIST_TESTS=all $(PYTEST) tests/e2e tests/ranks tests/unit -n 2 --dist loadfile --no-loadscope-reorder
	WAN_DIST_TESTS=all $(PYTEST) tests/slurm

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
