# On a fresh machine with Python >= 3.11 and make: `make tour`, `make test`. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest

# A strict editable install links the files that were there when it was made: a new module needs a new install.
# So the stamp is named after pyproject.toml's content and the list of files.
STATE := $(shell { cat pyproject.toml; find core adapters -type f ! -path '*/__pycache__/*' | sort; } | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/installed-$(STATE)

# Its links lie in build/; whoever removed that needs it made again.
ifeq ($(wildcard build/__editable__.*),)
.PHONY: $(INSTALLED)
endif

.PHONY: help tour test lint types tests coming essentials doctests lowest bench clean
.NOTPARALLEL:

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1	/p' $(MAKEFILE_LIST)

tour: $(INSTALLED) ## run the tour
	$(BIN)/crossvjp tour

test: lint types tests essentials doctests ## everything that CI runs: lint, types, tests, notebooks, doctests

lint: $(INSTALLED) ## check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED) ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

tests: $(INSTALLED) ## run the tests; they execute the notebooks too
	$(BIN)/pytest -n 2

# JAX is rewriting its custom_vjp; the new one is behind a setting.
coming: $(INSTALLED) ## run the tests with JAX's coming custom_vjp
	JAX_CUSTOM_VJP3=1 $(BIN)/pytest -n 2

essentials: $(INSTALLED) ## run those of them that the others rest on
	JAX_CUSTOM_VJP3=1 $(BIN)/pytest -n 2 -q $(patsubst %,tests/test_%.py,contract rule core bad_input handles closures effects)

doctests: $(INSTALLED) ## run the examples in the docstrings
	$(BIN)/pytest --doctest-modules --pyargs crossvjp

lowest: export PIP_CONSTRAINT := $(CURDIR)/tests/lowest.txt # for the environments that test_environments.py builds too
lowest: ## run the tests with the lowest versions that pyproject.toml allows
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --upgrade 'pip>=25.1'
	$(LOWEST)/bin/pip install --quiet -e '.[all]' --group dev # not strict: that would write into build/
	$(LOWEST)/bin/pytest -n 2

bench: $(INSTALLED) ## compare the costs with those of rules written by hand
	$(BIN)/python -m benchmarks

# build/ holds the links of the editable install in .venv, so the two go together.
clean: ## remove the environment and everything generated
	rm -rf $(VENV) $(LOWEST) build dist crossvjp.egg-info .pytest_cache .ruff_cache .hypothesis tour-out bench-out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): | $(BIN)/pip
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1' # the first with --group
	$(BIN)/pip install --quiet -e '.[all]' --config-settings editable_mode=strict --group dev
	rm -f $(VENV)/installed-*
	touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "crossvjp needs Python 3.11 or newer, but \`$(PYTHON)\` is not: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
