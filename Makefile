# Everything a person runs. `make demo` and `make test` build the virtual environment first where it is missing.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRAIN_AMUSED ?= build/peers/train_amused.py
# Where it is set, each of a hundred processes compiles the package anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: venv demo demo-full test check format docs soak bench bench-pretokenize bench-train bench-load \
	bench-generate bench-serve bench-growth bench-outage bench-gpu bench-peers clean

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
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS); tests=$$?; \
	wait $$checks; checks=$$?; cat build/check.log; exit $$((tests || checks))

soak: $(STAMP)
	$(BIN)/pytest -m soak --timeout 7200 tests

# Side-by-side figures (docs/benchmarks.md): each prints a table and writes build/bench/NAME.json.
# ARGS chooses among the rows of generate, train, serve, growth and gpu.
bench: bench-pretokenize bench-load bench-generate bench-serve bench-growth bench-outage bench-train

bench-pretokenize bench-load bench-outage: bench-%: $(STAMP)
	$(BIN)/python tests/benchmarks/$*.py

bench-generate: $(STAMP) build/peers/lucidrains/.installed
	$(BIN)/python tests/benchmarks/generate.py $(ARGS)

bench-train: $(STAMP) build/peers/amused/.installed $(TRAIN_AMUSED)
	$(BIN)/python tests/benchmarks/train.py $(TRAIN_AMUSED) $(ARGS)

bench-growth bench-gpu bench-serve: bench-%: $(STAMP)
	$(BIN)/python tests/benchmarks/$*.py $(ARGS)

# Peers in environments of their own. train_amused.py is no part of diffusers' package on PyPI: it is fetched from
# GitHub at one commit, or TRAIN_AMUSED=FILE names a copy.
TRAIN_AMUSED_COMMIT := 58eb52c0803ea9af3abec60841c2a093bdf1f951
TRAIN_AMUSED_SHA256 := 81c959b91185f00f6b2d2d6891547391d4877ad6a4f8873289f12df39435b377

bench-peers: build/peers/amused/.installed build/peers/lucidrains/.installed

build/peers/amused/.installed: PACKAGES := torch torchvision diffusers transformers accelerate datasets peft pillow
build/peers/lucidrains/.installed: PACKAGES := torch torchvision muse-maskgit-pytorch==0.3.5
build/peers/%/.installed: constraints.txt
	$(PYTHON) -m venv build/peers/$*
	build/peers/$*/bin/pip install --quiet --constraint constraints.txt $(PACKAGES)
	@touch $@

build/peers/train_amused.py:
	@mkdir -p build/peers
	$(PYTHON) -c "import sys, urllib.request; urllib.request.urlretrieve(*sys.argv[1:])" \
		https://raw.githubusercontent.com/huggingface/diffusers/$(TRAIN_AMUSED_COMMIT)/examples/amused/train_amused.py $@.new \
		|| { echo "GitHub does not answer: get examples/amused/train_amused.py of diffusers, and set TRAIN_AMUSED=FILE"; exit 2; }
	echo "$(TRAIN_AMUSED_SHA256)  $@.new" | sha256sum --check --quiet && mv $@.new $@

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build runs .mypy_cache .ruff_cache .pytest_cache
