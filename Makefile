# The commands of this project for Linux and macOS. README.md has the same as pip lines for Windows.
#
# Needs only python3 >= 3.11. Everything is installed into .venv here (VENV=... puts it elsewhere)
# by plain pip, so pip's own settings and constraints hold.

VENV ?= .venv
BASE_PYTHON ?= python3
ARGS ?=
HOSTS ?= 3
RATE ?= 200mbit
EXPERIMENTS ?= staleness_stragglers quantization_links zero_memory pipeline_bubble unequal_speeds

PYTHON := $(VENV)/bin/python
READY := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help run test check bench soak lab docs page screenshots experiments fix

help:  ## show these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

run: $(READY)  ## install if needed, then `smolrun` (ARGS="model=mlp training.steps=50" for more)
	$(VENV)/bin/smolrun $(ARGS)

test: $(READY)  ## all tests but the long ones (ARGS="tests/wire -x" for some of them)
	$(PYTHON) -m compileall -q smolrun tasks  # once, for all the processes that tests start
	$(PYTHON) -m pytest -m "not soak" -n 3 --durations=10 $(ARGS)

check: $(READY)  ## format, lint, types, imports: what every change must pass
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) tests/project/as_installed.py mypy -p smolrun --cache-dir $(CURDIR)/.mypy_cache
	$(PYTHON) tests/project/as_installed.py lint-imports --no-logo

bench: $(READY)  ## measure smolrun beside other libraries (ARGS="bench=step" for another bench)
	$(VENV)/bin/smolrun task=bench $(ARGS)

soak: $(READY)  ## the long tests, one after the other, on a machine with nothing else to do
	$(PYTHON) -m pytest -m soak --timeout 3600 --durations=10 $(ARGS)

lab: $(READY)  ## hosts with SSH on this one Linux machine, as root (HOSTS=3 RATE=200mbit; docs/lab.md)
	$(PYTHON) -m tests.hosts.by_hand --hosts $(HOSTS) --rate $(RATE) $(ARGS)

docs: $(READY)  ## write what is made from the code: the key reference and the pictures
	$(PYTHON) docs/reference.py
	$(PYTHON) docs/pictures.py

page:  ## build the chat page into the package, after a change in smolrun/ui/web (needs Node 20 or newer)
	cd smolrun/ui/web && npm ci --no-audit --no-fund && npm run build

screenshots: $(READY)  ## the pictures of docs/page.md (needs a chromium)
	$(PYTHON) -m pip install --quiet playwright
	$(PYTHON) -m tests.serving.screenshots

experiments: $(READY)  ## run the sweeps of docs/experiments.md, 15 minutes on two free cores, and write their tables
	for name in $(EXPERIMENTS); do $(VENV)/bin/smolrun -m experiment=$$name || exit 1; done
	$(PYTHON) docs/experiments.py

fix: $(READY)  ## format, and mend what ruff can mend
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

$(READY): pyproject.toml
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "smolrun needs Python >= 3.11; say BASE_PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --editable '.[dev]'
	@touch $@
