# demo, test, bench, docs, lint and format work from a fresh clone with no more than python3 (3.10 or
# newer), a C++ compiler and make: each sets up .venv itself, and a repeated call does only what
# changed.
SHELL := /bin/bash -o pipefail
PYTHON ?= python3
TORCH ?= 2.13.0
PYTEST_ARGS ?=
WORKERS ?= 2
# The long files come first (tests/conftest.py), not those of the most tests.
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
DEMO_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
ACTIVATE := . $(VENV)/bin/activate &&
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
TORCH_STAMP := $(VENV)/.stamp-torch-$(TORCH)
NATIVE := fastkfo/_C.abi3.so
BUILD := setup.py fastkfo/kernels/build_flags.py
CSRC := $(shell find csrc 2>/dev/null) # folders too: a file that went away counts
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

LEARN2LEARN := .cache/learn2learn-0.2.0
LEARN2LEARN_SHA256 := 69f1d7cb0d0a6be7a2c6ad8e83e2ebbe70fb05e51d61e45e63078b40c75ea419

# docs is a folder, too.
.PHONY: help demo test bench docs lint format sanitize gpu clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo "make demo | test | bench | docs | lint | format | sanitize | gpu OUT=folder | clean    (TORCH=$(TORCH))"

demo: $(VENV)/.stamp-demo $(NATIVE)
	$(ACTIVATE) fastkfo demo $(DEMO_ARGS)

# Twice: on the prebuilt library, which must be what loaded, then on the reference alone. Threads that
# wait must sleep, or the workers would keep the processors from each other.
test: export OMP_WAIT_POLICY = passive
test: export LEARN2LEARN_SRC = $(CURDIR)/$(LEARN2LEARN)
test: $(VENV)/.stamp-test $(NATIVE) $(LEARN2LEARN)/setup.py
	$(ACTIVATE) python -m pytest $(PARALLEL) --require-native $(PYTEST_ARGS)
	$(ACTIVATE) FASTKFO_LIBRARY=/nonexistent/fastkfo.so python -m pytest $(PARALLEL) \
	    --require-reference -m "not slow" --hypothesis-profile=quick $(PYTEST_ARGS)

# Five minutes: a selection of meta-gradients beside learn2learn, the reference, vmap and JAX.
bench: $(VENV)/.stamp-bench $(NATIVE) $(LEARN2LEARN)/setup.py
	$(ACTIVATE) LEARN2LEARN_SRC="$(CURDIR)/$(LEARN2LEARN)" fastkfo bench $(BENCH_ARGS)

# To build/docs/index.html. A warning is an error; nothing is fetched.
docs: $(VENV)/.stamp-docs
	$(ACTIVATE) python -m sphinx -q -W --keep-going -b html docs build/docs

lint: $(VENV)/.stamp-dev
	$(ACTIVATE) ruff check
	$(ACTIVATE) ruff format --check
	$(ACTIVATE) mypy
	$(ACTIVATE) clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.stamp-dev
	$(ACTIVATE) ruff check --fix
	$(ACTIVATE) ruff format
	$(ACTIVATE) clang-format -i $(CXX_FILES)

# The native code under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/.stamp-test
	$(ACTIVATE) bash tests/sanitize.sh $(PYTEST_ARGS)

# On a CUDA machine without a network: the system's python, nothing downloaded.
gpu:
	@test -n "$(OUT)" || { echo "make gpu needs OUT=folder, where records.tar.gz goes" >&2; exit 2; }
	PYTHON="$(PYTHON)" bench/gpu.sh "$(OUT)"

clean:
	rm -rf build dist *.egg-info $(NATIVE) .pytest_cache .benchmarks .mypy_cache .ruff_cache .hypothesis
	find fastkfo tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# torch comes first and alone: the extension is then built against it, and nothing replaces it.
$(TORCH_STAMP):
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet torch==$(TORCH)
	$(PIP) install --quiet numpy ninja "setuptools>=77" wheel
	rm -f $(VENV)/.stamp-*
	touch $@

# .stamp-demo, .stamp-test, .stamp-docs and .stamp-dev: fastkfo, editable, with that extra.
$(VENV)/.stamp-%: pyproject.toml $(BUILD) $(TORCH_STAMP)
	$(PIP) install --quiet --no-build-isolation -e '.[$*]'
	touch $@

# Linting and pages compile nothing.
$(VENV)/.stamp-dev $(VENV)/.stamp-docs: export FASTKFO_BUILD_NATIVE = 0

$(NATIVE): $(CSRC) $(BUILD) | $(TORCH_STAMP)
	$(VENV)/bin/python setup.py --quiet build_ext --inplace
	touch $@

# The oracle of the tests. Its Python parts need no build; the hash is checked before it is opened.
$(LEARN2LEARN)/setup.py: | $(TORCH_STAMP)
	mkdir -p .cache
	echo "learn2learn==0.2.0 --hash=sha256:$(LEARN2LEARN_SHA256)" > .cache/learn2learn.txt
	$(PIP) download --quiet --no-deps --no-binary :all: --no-build-isolation --require-hashes \
	    --dest .cache -r .cache/learn2learn.txt
	tar -xzf .cache/learn2learn-0.2.0.tar.gz -C .cache
	touch $@
