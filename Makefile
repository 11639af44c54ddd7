# `make help` lists the targets. Every target makes the environment it needs, once.

PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
MODELS ?= smollm2
MODELS_DIR ?= .models

NEWEST := .venv
OLDEST := .venv-oldest
VLLM := .venv-vllm
PIP := -m pip --disable-pip-version-check

# One thread per test process: the workers share the cores. A file is one worker's, so that what it sets up is made once.
# Of a test with many parameters some cases stand for all (tests/cases.py): WHICH= runs all.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
WHICH = -m "not thorough"
PYTEST = $(TEST_ENV) $(1)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(WHICH) $(PYTEST_ARGS)

# Without PyTorch's own memory pool, whose blocks would hide an access past the end of a tensor.
# Races are looked for in our kernels: cuDNN's attention, with which the tests compare, has reports of its own.
SANITIZE = PYTHONPATH=src PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1
SMALL_GPU_TESTS = $(PYTHON) -m pytest -m gpu tests/gpu -k test_small_shapes $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help venv venv-vllm demo real-models test test-oldest test-thorough test-real test-real-vllm test-vllm test-gpu sanitize-gpu lint format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(NEWEST)/.installed ## Make the environment in .venv (PYTHON=python3.12 picks an interpreter)

venv-vllm: $(VLLM)/.installed ## Make the environment with vLLM's CPU build in .venv-vllm

demo: $(NEWEST)/.installed ## Hide a fact in a book, ask for it with full attention, Quest and others
	$(NEWEST)/bin/quest demo

real-models: $(NEWEST)/.installed ## Fetch a small public model into .models (98 MB; MODELS="smollm2 qwen gemma" for all)
	$(NEWEST)/bin/python tools/real_models.py --folder "$(MODELS_DIR)" $(MODELS)

test: $(NEWEST)/.installed ## Run the tests and the examples in docstrings, with the newest transformers
	$(call PYTEST,$(NEWEST))

test-oldest: $(OLDEST)/.installed ## The same with the oldest supported transformers
	$(call PYTEST,$(OLDEST))

test-thorough: WHICH =
test-thorough: test test-vllm ## All cases of `make test` and `make test-vllm` (an hour or more)

# One process with all the cores, as a user has it: every test waits for the same model.
test-real: override MODELS = smollm2
test-real: real-models ## The command line and generate() on a real model, end to end (about three minutes)
	OMP_NUM_THREADS=$(WORKERS) TOKENIZERS_PARALLELISM=false QUEST_REAL_MODELS="$(abspath $(MODELS_DIR))" \
		$(NEWEST)/bin/python -m pytest tests/real $(PYTEST_ARGS)

# The file is named: if it were skipped, nothing would be left, which is an error to pytest.
test-real-vllm: override MODELS = smollm2
test-real-vllm: real-models $(VLLM)/.installed ## The same model behind vLLM's OpenAI server, stock and with Quest (about three minutes)
	$(NEWEST)/bin/python tools/unpack_gguf.py "$(MODELS_DIR)/smollm2.gguf" "$(MODELS_DIR)/smollm2"
	TOKENIZERS_PARALLELISM=false QUEST_REAL_MODELS="$(abspath $(MODELS_DIR))" \
		$(VLLM)/bin/python -m pytest tests/real/test_served.py $(PYTEST_ARGS)

# Of engines each test starts its own, so that one file's need not stay with one worker. Those of several processes would
# be in one another's way.
SEVERAL := tests/serving/test_server.py tests/serving/test_processes.py
test-vllm: $(VLLM)/.installed ## The plugin inside vLLM on a CPU: engine, OpenAI server, two ranks (about twenty minutes)
	$(VLLM)/bin/python -m pytest -n $(WORKERS) --dist worksteal tests/serving $(SEVERAL:%=--ignore=%) $(WHICH) $(PYTEST_ARGS)
	$(VLLM)/bin/python -m pytest $(SEVERAL) $(WHICH) $(PYTEST_ARGS)

test-gpu: ## Run the tests that need an NVIDIA GPU, with the python3 and PyTorch of the machine
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu tests/gpu tests/ops/test_capture.py tests/hf/test_graph.py tests/test_snippets.py $(PYTEST_ARGS)

sanitize-gpu: ## Run the kernels on small shapes under compute-sanitizer: memory accesses, then races
	$(SANITIZE) --tool memcheck $(SMALL_GPU_TESTS)
	$(SANITIZE) --tool racecheck --kernel-regex-exclude kns=cudnn $(SMALL_GPU_TESTS)

lint: $(NEWEST)/.installed ## Lint, formatting, types and the import contract
	$(NEWEST)/bin/ruff check .
	$(NEWEST)/bin/ruff format --check .
	$(NEWEST)/bin/mypy
	$(NEWEST)/bin/lint-imports

format: $(NEWEST)/.installed ## Format the code and apply the lint fixes that are safe
	$(NEWEST)/bin/ruff check --fix-only .
	$(NEWEST)/bin/ruff format .

clean: ## Remove the environments and everything that was built
	rm -rf $(NEWEST) $(OLDEST) $(VLLM) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests training benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(VLLM)/.installed: pyproject.toml constraints/common.txt constraints/vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(PIP) install --quiet --quiet "$$(grep '^torch==' constraints/common.txt)"
	$(VLLM)/bin/python $(PIP) install --quiet --quiet --no-deps --requirement constraints/vllm.txt
	$(VLLM)/bin/python $(PIP) install --quiet --quiet --no-deps --no-build-isolation --editable .
	touch $@

EXTRAS = dev
$(NEWEST)/.installed: EXTRAS = dev,lm-eval
$(NEWEST)/.installed: constraints/newest.txt
$(OLDEST)/.installed: constraints/oldest.txt

# torch comes first and by its exact pin: everything after it then finds a torch that fits. The build tools come next,
# pinned as well, because the package itself is built without isolation.
%/.installed: pyproject.toml constraints/common.txt
	test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/bin/python $(PIP) install --quiet --quiet "$$(grep '^torch==' constraints/common.txt)"
	$*/bin/python $(PIP) install --quiet --quiet --constraint $(filter %est.txt,$^) hatchling editables
	$*/bin/python $(PIP) install --quiet --quiet --constraint $(filter %est.txt,$^) --no-build-isolation --editable '.[$(EXTRAS)]'
	touch $@
