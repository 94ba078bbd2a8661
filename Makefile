# The commands of the README and of .ci/run by short names. They use the Python of the active environment.
PYTHON ?= python

.DEFAULT_GOAL := help
.PHONY: help venv install test coverage fuzz soak lint types format docs bench compare ci release

help:  ## this list
	@grep -E '^[a-z]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/' | expand -t 10

venv:  ## an environment in .venv with everything for development; then: . .venv/bin/activate
	python3 -m venv .venv
	.venv/bin/pip install -e '.[test]'

install:  ## the package with everything for development, into the active environment
	$(PYTHON) -m pip install -e '.[test]'

test:  ## all tests, on every backend that this machine has
	$(PYTHON) -m pytest

coverage:  ## the branches of ood_fast/ that all tests take, in the processes that they start too: half an hour
	$(PYTHON) -m pip install --quiet 'coverage>=7.10'
	$(PYTHON) -m coverage run -m pytest
	$(PYTHON) -m coverage combine --quiet
	$(PYTHON) -m coverage report

fuzz:  ## 20,000 new inputs for every public function, about five minutes
	OOD_FAST_EXAMPLES=20000 $(PYTHON) -m pytest tests/test_fuzz.py

soak:  ## does anything grow over 200,000 steps and 10 million rows, about ten minutes
	$(PYTHON) -m bench.soak

lint:  ## what CI checks of the style
	ruff check .
	ruff format --check .

types:  ## what mypy says
	mypy

format:  ## mend what can be mended of it
	ruff check --fix .
	ruff format .

docs:  ## the site, in site/; needs pip install -e '.[docs]'
	mkdocs build --strict

bench:  ## ours beside the reference and cross-entropy, under four minutes
	$(PYTHON) -m pytest bench/ --benchmark-only

compare:  ## the main job: losses × detectors on real digits, with a report in runs/compare-digits/
	ood-fast compare

ci:  ## everything, in an environment of its own
	.ci/run

release: ci  ## what must hold before a version is tagged: CI, and no known weakness in what is installed
	$(PYTHON) -m pip install --quiet pip-audit
	$(PYTHON) -m pip_audit --skip-editable
