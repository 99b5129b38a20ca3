# Everything runs in a virtual environment of its own; `make demo` and `make test` build it first.
PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
BIN = $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test test-all check format docs tables figures clean

demo: $(VENV)/installed
	$(BIN)/python -m experiments.demo

# The laws, once for every mechanism, and the examples of the docs: some minutes.
test: $(VENV)/installed
	$(PYTEST) -m "not slow and not weights" $(TESTS)

# Every test: also those that are marked as slow, or as of trained weights, which pyproject.toml describes.
test-all: $(VENV)/installed
	$(PYTEST) $(TESTS)

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in site/: open site/index.html. A broken link, or a page that the menu leaves out, is an error.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The tables of papers in README.md and docs/papers.md, from the files in jaxattn/papers/data.
tables: $(VENV)/installed
	$(BIN)/python -m jaxattn.papers --write .

# The pictures of the README, from a fresh demo run, and those of docs/gallery.md.
figures: demo
	$(BIN)/python -m experiments.figures
	$(BIN)/python -m experiments.gallery

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(f"Python {sys.version.split()[0]}: need 3.11 or newer; try make PYTHON=...") \
		if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[all]'
	touch $@

clean:
	rm -rf $(VENV) runs site
