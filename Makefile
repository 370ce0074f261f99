SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# what is imported is compiled once, not by every process
unexport PYTHONDONTWRITEBYTECODE

PYTHON := .venv/bin/python
INSTALLED := .venv/.installed

.PHONY: help venv lint format test wheel demo clean

help: ## Show this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

venv: $(INSTALLED) ## Make .venv with the package and the development tools; made anew where its inputs changed

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into .venv (a minute or two the first time)"
	@python3 -m venv .venv
	@$(PYTHON) -m pip install --no-compile --disable-pip-version-check --progress-bar off \
		--constraint constraints.txt --editable '.[dev]' \
		| grep --line-buffered -oE '^(Collecting [^ ]+|Installing collected packages|Successfully installed)'
	@touch $@

lint: venv ## Check style, format, which room imports which, and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	.venv/bin/lint-imports --no-logo
	$(PYTHON) -m mypy

format: venv ## Put the code into the house format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# Whole files, whose fixtures are shared, and in their order: by number of tests the slowest would come last.
# One thread a process: two test processes share two cores, and sums do not depend on the machine.
test: venv ## Run the tests, in two processes
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

wheel: ## Build the wheel and run every command from it, in a fresh environment outside the repository
	bash tests/wheel_walkthrough.sh

demo: venv ## Distil a small student on synthetic data, from start to finish
	.venv/bin/d3etr demo

clean: ## Remove .venv and all caches; runs/ and data/ stay
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
