# make demo    the environment, then four emulated boards answer, lose a board and the broker; one talks, and its plug is pulled
# make test    the environment, then every test
# make help    the rest

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
N ?= 20000
A ?= arm64
PYTHONS ?= 3.12 3.13
# Processes that share a run of all tests: one more than cores, for tests wait as well, at most 4; the files named in T run in one.
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || echo 1); echo $$((cores < 2 ? 0 : cores > 3 ? 4 : cores + 1)))

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-pythons mutations check bench bench-placement bench-llama models env fuzz-models fuzz-cbor fuzz-fleet fuzz-rollouts honest-hours power update-kills packed-agent long-session clean

help:
	@echo "make demo          four emulated boards, a detector, a language model, three disasters"
	@echo "make test          every test (make test T=tests/test_node.py for some)"
	@echo "make test-long     the tests that take long: fifty boards, fifty kills, whole stories of power cuts"
	@echo "make test-pythons  every test on other Pythons: PYTHONS='3.12 3.13' (T=... for some)"
	@echo "make mutations     the lines on which everything hangs, each taken out in turn: a named test must be red"
	@echo "make check         ruff, mypy --strict, the import contract"
	@echo "make bench         the figures of docs/performance.md, measured here"
	@echo "make bench-placement   placers side by side on simulated fleets: docs/placement.md (a quarter of an hour; TRACES=folder)"
	@echo "make bench-llama   the language figures beside llama.cpp (compiles it: a quarter of an hour, once)"
	@echo "make models        fetch the models and photographs of the catalog, build the language model"
	@echo "make fuzz-models N=20000    mutated models against the sandbox"
	@echo "make fuzz-cbor N=10000000   hostile bytes against the decoder"
	@echo "make fuzz-fleet N=10000     seeded faults against a virtual fleet"
	@echo "make fuzz-rollouts N=200    seeded faults against rollouts of 8 virtual boards"
	@echo "make power N=1000000        the power cut at every write of an update, and again in recovery"
	@echo "make update-kills N=2000    the real agent killed at random moments of real updates"
	@echo "make packed-agent           this agent packed, built beside itself, tried, confirmed and taken back"
	@echo "make boot A=arm64           a Debian system flashed and booted in qemu (emulated), its power cut in five pushes (A=amd64: by KVM)"
	@echo "make honest-hours N=10000   honest board-hours through bad times: false contraindications"
	@echo "make long-session N=100000  one session of SmolLM2, its perplexity and memory every tenth"
	@echo "make clean         remove the environment and caches"

demo: $(VENV)/demo.made
	@$(BIN)/sly models build smollm2
	@$(BIN)/sly demo --output demo

test: $(VENV)/dev.made .venv-cwt/cwt.made
	$(BIN)/python -m pytest $(if $(T),$(T),-n $(WORKERS) --dist worksteal)

test-long: $(VENV)/dev.made
	$(BIN)/python -m pytest -m long -n $(WORKERS) --dist worksteal

test-pythons: $(VENV)/dev.made .venv-cwt/cwt.made
	@WORKERS=$(WORKERS) sh tests/pythons.sh "$(PYTHONS)" $(T)

mutations: $(VENV)/dev.made
	$(BIN)/python -m tests.mutations

check: $(VENV)/dev.made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/dev.made
	$(BIN)/python -m tests.bench

bench-placement: $(VENV)/bench.made
	$(BIN)/python -m tests.bench.placement $(if $(TRACES),--traces $(TRACES))

bench-llama: $(VENV)/dev.made .venv-llama/llama.made
	SLY_LLAMA_PYTHON=$(CURDIR)/.venv-llama/bin/python $(BIN)/python -m tests.bench language

models: $(VENV)/demo.made
	$(BIN)/sly models fetch --all
	$(BIN)/sly models build smollm2

env: $(VENV)/dev.made

fuzz-models: $(VENV)/dev.made
	$(BIN)/python -m tests.fuzz_models $(N)

fuzz-cbor: $(VENV)/dev.made
	$(BIN)/python -m tests.fuzz_cbor $(N)

fuzz-fleet: $(VENV)/dev.made
	$(BIN)/python -m tests.virtual_fleet 0 $(N)

fuzz-rollouts: $(VENV)/dev.made
	$(BIN)/python -m tests.ota_weather 0 $(N)

power: $(VENV)/dev.made
	$(BIN)/python -m tests.power $(N)

update-kills: $(VENV)/dev.made
	$(BIN)/python -m tests.update_kills $(N)

packed-agent: $(VENV)/dev.made
	$(BIN)/python -m tests.packed_agent

boot: $(VENV)/dev.made
	PYTHON=$(CURDIR)/$(BIN)/python tests/boot/run.sh $(A)

honest-hours: $(VENV)/dev.made
	$(BIN)/python -m tests.honest_hours $(N)

long-session: $(VENV)/dev.made
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.long_session $(N)

clean:
	rm -rf $(VENV) .venv-3.* .venv-tflite-runtime .venv-llama .venv-cwt demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The environment is made once for each extra, and again when setup.cfg changes.
$(VENV)/pip.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sly: $$($(PYTHON) --version) is too old; Python 3.11 or later is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || [ "$$(id -u)" != 0 ] || \
	  { echo "installing Debian's python3-venv ..."; apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null; } || true
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "sly: this Python cannot make virtual environments; run: apt-get install python3-venv" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/demo.made: $(VENV)/pip.made setup.cfg pyproject.toml
	@echo "installing what it needs into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	@touch $@

$(VENV)/dev.made: $(VENV)/demo.made
	@echo "installing what the tests need into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,dev,gateway,bench,cloud]'
	@touch $@

$(VENV)/bench.made: $(VENV)/dev.made
	@echo "installing what pictures and the exact optimum need into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $@

.venv-llama/llama.made:
	@$(PYTHON) -m venv .venv-llama
	@.venv-llama/bin/python -m pip install --quiet --disable-pip-version-check -e . llama-cpp-python==0.3.36
	@touch $@

# Another implementation of signed tokens, which the tests hold ours against; it needs cbor2 < 6, so it is apart.
.venv-cwt/cwt.made: $(VENV)/pip.made
	@echo "installing another implementation of CWT into .venv-cwt ..."
	@$(PYTHON) -m venv .venv-cwt
	@.venv-cwt/bin/python -m pip install --quiet --disable-pip-version-check cwt==3.3.0
	@touch $@
