# make demo: prepare real text and train a small GPT on it, with two workers. make test: everything that CI runs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo weather driving driving-without-noise test test-all digests faults faults-prepare faults-islands check bench bench-limit bench-gpu bench-hosts bench-checkpoint bench-recovery bench-memory bench-prepare bench-validation bench-islands bench-islands-codec islands-simulation islands-loss zoo docs tree clean
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/manyhands prepare examples/gpt/prepare.toml --workers 2
	$(BIN)/manyhands train examples/gpt/recipe.toml --workers 2 $(ARGS)

# A network learns to drive by camera, and is judged on 20 tracks that it has never seen. Takes less than ten minutes.
# make driving ARGS='--tracks 100'
driving: $(READY)
	$(BIN)/python examples/driving/driving.py --workers 2 --out runs/driving $(ARGS)

# The same without noise on the expert's steering.
driving-without-noise: $(READY)
	$(BIN)/python examples/driving/driving.py --workers 2 --out runs/driving-without-noise --noise 0 --no-pictures --beside runs/driving/result.json $(ARGS)

# A network learns to forecast the weather of a simulated planet, and is verified as WeatherBench 2 does. Takes at
# most about ten minutes on two cores. make weather ARGS='--steps 60 --rollout-steps 40'
weather: $(READY)
	$(BIN)/python examples/weather/weather.py --workers 2 --out runs/weather $(ARGS)

test: check
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup $(ARGS)

# Also the slow cases, which make test leaves out. Takes about twice as long.
test-all: check
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "slow or not slow" $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Record this machine's digests in tests/digests.json, at a commit that is known to be right.
digests: $(READY)
	PYTHONPATH=tests $(BIN)/python -W ignore -m support.recorded

# Hundreds of random faults; every run must end with the undisturbed digest. Takes most of an hour. As root, or where
# user namespaces are allowed, also full disks; with libfaketime, also clocks that jump. What is skipped is printed.
# make faults ARGS='--runs 5 --seed 7'; make faults ARGS='--hosts'; make faults ARGS='--only 7'
faults: $(READY)
	PYTHONPATH=tests $(BIN)/python tests/faults.py $(ARGS)

# The same for data jobs. make faults-prepare ARGS='--faults 100 --seed 0'; make faults-prepare ARGS='--only 7'
faults-prepare: $(READY)
	PYTHONPATH=tests $(BIN)/python tests/faults_prepare.py $(ARGS)

# The same for runs with islands on several clusters, which meet in a folder or an object store.
# make faults-islands ARGS='--runs 5 --seed 7'; make faults-islands ARGS='--only 7'
faults-islands: $(READY)
	PYTHONPATH=tests $(BIN)/python tests/faults_islands.py $(ARGS)

# Our training step compared with the peers'; use a quiet machine. make bench ARGS='--rounds 5 --only "2-bf16/*"'
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

# On one GPU: our step compared with plain PyTorch's and DeepSpeed ZeRO-Offload's. make bench-gpu ARGS=--largest
bench-gpu: $(BENCH_VENV)/.ready
	$(BENCH_VENV)/bin/python benchmarks/gpu.py $(ARGS)

# The bytes between hosts, and the time of a step, for each sharding and transport; as root.
bench-hosts: $(READY)
	$(BIN)/python benchmarks/hosts.py $(ARGS)

# The cost of a checkpoint, compared with torch.save and torch.distributed.checkpoint.
bench-checkpoint: $(READY)
	$(BIN)/python benchmarks/checkpoint.py $(ARGS)

# The cost of killed workers, compared with torchrun, DDP and torch.save; use a quiet machine.
bench-recovery: $(READY)
	$(BIN)/python benchmarks/recovery.py $(ARGS)

# Data jobs compared with DuckDB, Dask, Ray Data, Spark and plain processes; use a quiet machine. Installs Spark (400 MB),
# which needs Java.
bench-prepare: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench-prepare]'
	$(BIN)/python benchmarks/prepare.py $(ARGS)

# A validation compared with the forward passes that it needs; use a quiet machine.
bench-validation: $(READY)
	$(BIN)/python benchmarks/validation.py $(ARGS)

# Islands on links of 100 Mbit/s, beside DDP, ZeRO and torchft's DiLoCo; as root, on a quiet machine. Takes about 25 minutes.
# make bench-islands ARGS='--torchft PYTHON', the Python of an environment with torchft
bench-islands: $(READY)
	$(BIN)/python -W ignore benchmarks/islands_bandwidth.py $(ARGS)

# Encoding and decoding the values that islands exchange; use a quiet machine.
bench-islands-codec: $(READY)
	$(BIN)/python benchmarks/islands_codec.py $(ARGS)

# A simulation of islands with losses and slow links, written to docs/islands.md and docs/islands.svg. Takes some minutes.
islands-simulation: $(READY)
	$(BIN)/python benchmarks/islands_simulation_report.py $(ARGS)

# The loss of islands compared with a synchronous run, written to docs/islands-loss.md. Takes half an hour on two quiet
# cores. An interrupted run continues. make islands-loss ARGS='--only "warm H=30" --no-report'
islands-loss: $(READY)
	$(BIN)/python benchmarks/islands_loss.py $(ARGS)

# The memory of workers compared with the formula, written to docs/memory.md; as root, for the control group.
bench-memory: $(READY)
	$(BIN)/python -W ignore benchmarks/memory.py $(ARGS)

# Models of many packages, each trained in several ways and in plain PyTorch, into docs/zoo.md. Takes about half an hour.
# make zoo ARGS="--only 'transformers/*'". torch and the packages of [models] have the versions of .venv.
ZOO_VENV ?= .venv-zoo
$(ZOO_VENV)/.ready: $(READY)
	$(PYTHON) -m venv $(ZOO_VENV)
	$(BIN)/pip freeze --exclude-editable | grep -E '^(torch|torchvision|numpy|transformers|peft|keras)==' > $(ZOO_VENV)/constraints.txt
	$(ZOO_VENV)/bin/pip install --quiet --disable-pip-version-check --constraint $(ZOO_VENV)/constraints.txt --editable '.[zoo]'
	@touch $@

zoo: $(ZOO_VENV)/.ready
	PYTHONPATH=tests $(ZOO_VENV)/bin/python -m zoo.run $(ARGS)

# What the documents derive from the source: docs/cli.md, and the layers and the annotated tree in docs/design.md.
tree: $(READY)
	PYTHONPATH=tests $(BIN)/python -m support.generated_pages

# The same, and the site of the documentation in build/site. Links to missing pages and headings are errors.
DOCS_VENV ?= .venv-docs
$(DOCS_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" > $(DOCS_VENV)/requirements.txt
	$(DOCS_VENV)/bin/pip install --quiet --disable-pip-version-check --requirement $(DOCS_VENV)/requirements.txt
	@touch $@

docs: tree $(DOCS_VENV)/.ready
	$(DOCS_VENV)/bin/zensical build --strict --config-file mkdocs.yml

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(ZOO_VENV) $(DOCS_VENV) build runs prepared .pytest_cache .mypy_cache .ruff_cache .hypothesis
