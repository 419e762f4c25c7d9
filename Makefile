# Everything a person runs. `make demo` and `make test` build the virtual environment first where it is missing.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Where it is set, each of a hundred processes compiles the package anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: venv demo demo-full test check format docs soak bench bench-pretokenize bench-load bench-generate bench-serve clean

venv: $(STAMP)

$(STAMP): constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed: install Python 3.11 or 3.12, or set PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/raymuse demo $(ARGS)

demo-full: $(STAMP)
	$(BIN)/raymuse demo --recipe demo-full $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test: $(STAMP)
	@mkdir -p build; $(MAKE) --no-print-directory check > build/check.log 2>&1 & checks=$$!; \
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS); tests=$$?; \
	wait $$checks; checks=$$?; cat build/check.log; exit $$((tests || checks))

soak: $(STAMP)
	$(BIN)/pytest -m soak --timeout 7200 tests

bench: bench-pretokenize bench-load bench-generate bench-serve

bench-pretokenize: $(STAMP)
	$(BIN)/python tests/benchmarks/pretokenize.py

bench-load: $(STAMP)
	$(BIN)/python tests/benchmarks/load.py

bench-generate: $(STAMP)
	$(BIN)/python tests/benchmarks/generate.py

bench-serve: $(STAMP)
	$(BIN)/python tests/benchmarks/serve.py

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build runs .mypy_cache .ruff_cache .pytest_cache
