# make quickstart   set up .venv and run the main job on the embedded model, to an endpoint that answers (KEEP=1 keeps it up)
# make test         set up .venv and run all tests
.PHONY: setup quickstart test lint

PYTHON ?= python3
STUDY ?= quickstart

setup: .venv/.ready

PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.venv/.ready: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/.test-ready: .venv/.ready
	$(PIP) -e ".[test]"
	touch $@

quickstart: setup
	.venv/bin/hpo run $(STUDY) --promote --deploy $(if $(KEEP),--keep)

test: .venv/.test-ready
	.venv/bin/ruff check .
	.venv/bin/python -m pytest -n 2 --no-loadscope-reorder

lint: .venv/.test-ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
