# The commands of the README: `make demo`, `make demo-llm` and `make test`. Each does all the set-up it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo demo-llm test slow lint types bench clean

demo: $(VENV)/.demo
	$(BIN)/qatkit run vision/digits_int4 --out runs/demo

demo-llm: $(VENV)/.llm
	$(BIN)/qatkit run llm/sparse24_kd_int4 --out runs/demo-llm

# each worker starts with a part of the tests in their order and takes over from another when it is done, so that few
# modules have their fixtures made twice
test: lint types
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# callbacks/ and recipes/ are installed inside qatkit, so the types are checked in that shape
types: $(VENV)/.dev
	rm -rf build/types && mkdir -p build/types
	cp -r qatkit build/types/qatkit && cp -r callbacks build/types/qatkit/callbacks && cp -r recipes build/types/qatkit/recipes
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p qatkit

# benchmarks that need no GPU and minutes each; every one prints its table and fails if a claim does not hold.
# qat_recovery.py takes hours: run it by itself
bench: $(VENV)/.dev
	for name in digits monitor prune_cost kd_loss cached_teacher distill_recipes prune_accuracy initialisers shrink sparse_storage qlora pipeline; do $(BIN)/python benchmarks/$$name.py || exit 1; done

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
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.demo $(VENV)/.llm

clean:
	rm -rf $(VENV) build runs .mypy_cache .ruff_cache .pytest_cache
