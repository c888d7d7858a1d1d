# Each target does all the set-up it needs, in .venv. `make demo` and `make test` are the commands of the README.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# each worker starts with a part of the tests in order and takes over from the other when it is done, so that few
# modules have their fixtures made twice
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
# the folders of pure functions and modules: nothing in them trains for long or starts many processes
QUICK := $(addprefix tests/,common data distillation kernels lora pruning quantization recipe stages tasks \
	test_english.py test_contracts.py)
# They get processes of their own: OpenVINO crashed in a process that had run thousands of other tests before
OPENVINO := tests/export/openvino tests/export/openvino_genai

.PHONY: demo demo-llm quick test slow long coverage mutation oldest lint types docs bench bench-runtimes clean

demo: $(VENV)/.demo
	$(BIN)/qatkit run vision/digits_resnet --out runs/demo

demo-llm: $(VENV)/.llm
	$(BIN)/qatkit run llm/sparse24_kd_int4 --out runs/demo-llm

# before a commit: lint, types and the tests of pure functions
quick: lint types
	$(PYTEST) -m "not slow and not long and not medium" $(QUICK)

# the types and the site take one process each, so they are checked at the same time
test: lint
	$(MAKE) -j 2 types docs
	$(PYTEST) $(OPENVINO)
	$(PYTEST) $(addprefix --ignore=,$(OPENVINO))

# what takes minutes; CI runs it too
slow: $(VENV)/.dev
	$(PYTEST) -m slow

# what takes longer and has representatives in the other targets; CI does not run it
long: $(VENV)/.dev
	$(PYTEST) -m long

# the lines that the tests run in their own processes; those run only by processes that tests start do not count
coverage: $(VENV)/.dev
	$(PYTEST) --cov --cov-report= $(OPENVINO)
	$(PYTEST) --cov --cov-append --cov-report=term:skip-covered $(addprefix --ignore=,$(OPENVINO))

# changes the code line by line and reports which changes no test notices; see CONTRIBUTING.md
mutation: $(VENV)/.dev
	rm -rf mutants
	$(BIN)/mutmut run
	$(BIN)/mutmut results

# the quick tests with the lowest versions that pyproject.toml claims
oldest: $(VENV)-oldest/.installed
	$(VENV)-oldest/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not long and not medium" $(QUICK)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# callbacks/ and recipes/ are installed inside qatkit, so the types are checked in that shape
types: $(VENV)/.dev
	rm -rf build/types && mkdir -p build/types
	cp -r qatkit build/types/qatkit && cp -r callbacks build/types/qatkit/callbacks && cp -r recipes build/types/qatkit/recipes
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p qatkit

# the site, with the API reference from the docstrings, in build/site
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# benchmarks that need no GPU and minutes each; every one prints its table and fails if a claim does not hold.
# faults.py, the last one, takes longest. qat_recovery.py and encoder.py take hours: run them by themselves
bench: $(VENV)/.dev
	for name in digits monitor prune_cost kd_loss cached_teacher distill_recipes prune_accuracy starting_points shrink sparse_storage qlora pipeline serve decode deploy search digest_cost roofline faults; do $(BIN)/python benchmarks/$$name.py || exit 1; done

# the results and tests of runtimes that CI does not run; their environments are kept in RUNTIMES
RUNTIMES ?= build/runtimes
bench-runtimes: $(VENV)/.dev
	$(BIN)/python benchmarks/runtimes.py $(RUNTIMES)

$(VENV)/.demo: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.llm: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[llm,report]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,genai,openvino-genai,executorch,coreml]'
	touch $@ $(VENV)/.demo $(VENV)/.llm

$(VENV)-oldest/.installed: pyproject.toml constraints-oldest.txt
	test -d $(VENV)-oldest || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install -q -c constraints-oldest.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest build mutants runs .mypy_cache .ruff_cache .pytest_cache .coverage
