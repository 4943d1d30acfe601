# make quickstart   environment, then the whole pipeline on bundled photographs
# make test         environment if needed, then the tests: each promise once, 12 minutes
# make test-full    the long rest, 75 minutes; PART=2/5 runs one of five parts
# make test-gpu     what needs a CUDA GPU
# make check        format, lint, types; then the sizes of the code
# make golden       write the recorded values anew; look at the difference before committing it
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PART ?= 1/1
PYTEST := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder --durations=20

.PHONY: quickstart test test-full test-gpu check format golden clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(STAMP)
	$(BIN)/fqgan run configs/quickstart.yaml

test: $(STAMP)
	$(PYTEST) --dist loadfile

test-full: $(STAMP)
	$(PYTEST) --dist loadgroup -m 'full and not gpu' --part $(PART)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/codespell fqgan_dist data_tools cluster tests configs benchmarks docs README.md CONTRIBUTING.md Makefile pyproject.toml
	$(BIN)/python benchmarks/measures.py --short

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

golden: $(STAMP)
	$(BIN)/python tests/golden/write_configs.py
	$(BIN)/python tests/golden/write_user_errors.py

clean:
	rm -rf $(VENV) runs build dist *.egg-info
