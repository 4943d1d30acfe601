# make quickstart   environment, then the whole pipeline on bundled photographs
# make test         environment if needed, then the tests
# make check        format, lint, types; then the sizes of the code
# make golden       write the recorded values anew; look at the difference before committing it
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test check format golden clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(STAMP)
	$(BIN)/fqgan run configs/quickstart.yaml

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

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

clean:
	rm -rf $(VENV) runs build dist *.egg-info
