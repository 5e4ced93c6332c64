# make demo: prepare real text and train a small GPT on it, with two workers. make test: everything that CI runs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all digests faults faults-prepare check bench bench-limit bench-gpu bench-hosts bench-checkpoint bench-recovery bench-memory bench-prepare docs tree clean
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/manyhands prepare examples/gpt/prepare.toml --workers 2
	$(BIN)/manyhands train examples/gpt/recipe.toml --workers 2 $(ARGS)

test: check
	$(BIN)/python -m pytest -q -n 2 $(ARGS)

# The cases that make test leaves out, too: about as long again.
test-all: check
	$(BIN)/python -m pytest -q -n 2 -m "slow or not slow" $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Record this machine's digests in tests/digests.json, at a commit that is known to be right.
digests: $(READY)
	PYTHONPATH=tests $(BIN)/python -W ignore -m support.recorded

# Hundreds of random faults, each run to the undisturbed digest: most of an hour. make faults ARGS='--runs 5 --seed 7'
faults: $(READY)
	PYTHONPATH=tests $(BIN)/python tests/faults.py $(ARGS)

# The same for preparing data: kills of workers, ranks and drivers. make faults-prepare ARGS='--kills 100 --seed 0'
faults-prepare: $(READY)
	PYTHONPATH=tests $(BIN)/python tests/faults_prepare.py $(ARGS)

# Our step beside the peers'; use a quiet machine. make bench ARGS='--rounds 5 --only "2-bf16/*"'
BENCH_VENV ?= .venv-bench
$(BENCH_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

bench: $(BENCH_VENV)/.ready
	$(BENCH_VENV)/bin/python benchmarks/run.py $(ARGS)

# A model four times as large as the memory that each worker may use; as root, for the control groups.
bench-limit: $(READY)
	$(BIN)/python benchmarks/limit.py $(ARGS)

# On one GPU: our step beside plain PyTorch's and DeepSpeed ZeRO-Offload's. make bench-gpu ARGS=--largest
bench-gpu: $(BENCH_VENV)/.ready
	$(BENCH_VENV)/bin/python benchmarks/gpu.py $(ARGS)

# What travels between hosts, and the time a step takes there, for each stage and group; as root.
bench-hosts: $(READY)
	$(BIN)/python benchmarks/hosts.py $(ARGS)

# What a checkpoint costs beside torch.save and torch.distributed.checkpoint.
bench-checkpoint: $(READY)
	$(BIN)/python benchmarks/checkpoint.py $(ARGS)

# What killed workers cost, beside torchrun with DDP and torch.save; use a quiet machine.
bench-recovery: $(READY)
	$(BIN)/python benchmarks/recovery.py $(ARGS)

# Preparing data beside DuckDB, Dask, Ray Data, Spark and plain processes; on a quiet machine. Spark is 400 MB, wants java.
bench-prepare: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench-prepare]'
	$(BIN)/python benchmarks/prepare.py $(ARGS)

# What workers take against the formula, into docs/memory.md; as root, for the control group.
bench-memory: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[plot]'
	$(BIN)/python -W ignore benchmarks/memory.py $(ARGS)

# What the documents derive from the source: docs/cli.md, and the annotated tree in docs/design.md.
docs tree: $(READY)
	PYTHONPATH=tests $(BIN)/python -m support.generated_pages

clean:
	rm -rf $(VENV) $(BENCH_VENV) runs prepared .pytest_cache .mypy_cache .ruff_cache .hypothesis
