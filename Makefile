# Each target does all its own set-up in .venv; see bootstrap.sh.
.DEFAULT_GOAL := help
.PHONY: demo test lint docs help

CONFIG ?= demo

help: ## say what there is
	@grep -E '^[a-z]+: ##' Makefile | sed 's/: ## /\t/' | expand -t 10
	@echo
	@echo 'make demo DATA=FILE|FOLDER   trains on your own text; ARGS="--dilation 2" goes on to wantrain launch'
	@echo 'make test ARGS="-k plan"     goes on to pytest; PYTHON=/path/to/python3 chooses the Python for .venv'

demo: ## train a small GPT over an emulated WAN of four workers in two sites
	@bash bootstrap.sh -- .venv/bin/wantrain launch $(CONFIG) $(if $(DATA),--data "$(DATA)") $(ARGS)

test: ## run the tests
	@bash bootstrap.sh --dev -- .venv/bin/python -m pytest -n auto $(ARGS)

docs: ## build the documentation as a site, in build/site
	@bash bootstrap.sh --dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

lint: ## check style, types and spelling
	@bash bootstrap.sh --dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/codespell $$(git ls-files)
