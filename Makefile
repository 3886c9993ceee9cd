# Headrace: `make` alone shows what there is.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
ROOMS := ingest stream trainer serving replay examples deploy
LINT := .headrace/lint

# What the user says on the command line reaches every process by the environment.
ifdef BROKERS
export HEADRACE_BROKERS := $(BROKERS)
endif
ifdef STORE
export HEADRACE_STORE := $(STORE)
endif
ifdef WEBHDFS
export HEADRACE_WEBHDFS := $(WEBHDFS)
endif
ifdef PROJECT
export HEADRACE_PROJECT := $(PROJECT)
endif
ifdef DATA
export DATA
endif
ifdef PORT_BASE
export PORT_BASE
endif
ifdef SHIPPER
export SHIPPER
endif
ifdef RATE
export RATE
endif

# Before a command about named processes: says which are wanted where none is named.
NAMED = $(if $(STAGE),,echo 'name the processes as make status shows them: make $@ STAGE="ingest train"'; exit 2; )

.DEFAULT_GOAL := help
.PHONY: help install up down start stop restart status logs doctor ledger chaos replay test test-long test-cephfs check format docs bench clean

help: ## show this
	@echo "make TARGET [VENV=dir] [PORT_BASE=30000] [STORE=file:/dir|hdfs://host:port/dir|cephfs] [BROKERS=host:port] [PROJECT=dir]"
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)/\1 \2/' | while read -r target words; do printf '  %-12s %s\n' "$$target" "$$words"; done

# The environment is made anew when it is missing, and brought up to date when pyproject.toml or a version has changed.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is wanted: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make environments. Debian, Ubuntu: apt install python3-venv. Or: uv venv --seed $(VENV)"; exit 1; }
	$(PYTHON) -m venv "$(VENV)"

# A torch that is there already (the small one for CPUs) stays, whatever version is pinned.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): about 3 GB from the package index the first time; run it again if the network breaks"
	@if "$(BIN)/python" -m pip show -q torch >/dev/null 2>&1; then grep -v '^torch==' constraints.txt; else cat constraints.txt; fi > "$(VENV)/constraints.txt"
	"$(BIN)/python" -m pip install --progress-bar on -c "$(VENV)/constraints.txt" -e .
	@find headrace $(ROOMS) -name '*.nb[ic]' -delete; rm -rf headrace/kernels/__pycache__/compiled-*
	@touch "$@"

$(VENV)/.installed-dev: $(VENV)/.installed
	"$(BIN)/python" -m pip install --progress-bar on -c "$(VENV)/constraints.txt" -e '.[dev]'
	@touch "$@"

install: $(VENV)/.installed ## install without starting anything

up: $(VENV)/.installed ## start everything and show it; DETACH=1 returns when all is ready; SHIPPER=fluentd, RATE=1000
	@"$(BIN)/headrace" up $(if $(DETACH),--detach)

down: ## stop everything; nothing is left running
	@if [ -x "$(BIN)/headrace" ]; then "$(BIN)/headrace" down; else echo "nothing is installed in $(VENV)"; fi

status: $(VENV)/.installed ## each process, its state, port, memory, log file
	@"$(BIN)/headrace" status

start: $(VENV)/.installed ## start processes that were stopped, and wait until they are ready: make start STAGE="ingest train"
	@$(NAMED)"$(BIN)/headrace" start $(STAGE)

stop: $(VENV)/.installed ## stop processes until `make start`; the others go on: make stop STAGE=train
	@$(NAMED)"$(BIN)/headrace" stop $(STAGE)

restart: $(VENV)/.installed ## stop and start with the files on disk: make restart STAGE="ingest train"
	@$(NAMED)"$(BIN)/headrace" restart $(STAGE)

logs: $(VENV)/.installed ## follow a log: make logs STAGE=train
	@"$(BIN)/headrace" logs $(or $(STAGE),supervisor)

doctor: $(VENV)/.installed ## what keeps it from running, and the remedy
	@"$(BIN)/headrace" doctor

ledger: $(VENV)/.installed ## account for every event
	@"$(BIN)/headrace" ledger

chaos: $(VENV)/.installed ## kill under load, in a stack of its own: make chaos STAGE=ingest|all [SEED=] [KILLS=] [RATE=2000]
	@"$(BIN)/headrace" chaos $(if $(STAGE),--stage $(STAGE)) $(if $(SEED),--seed $(SEED)) $(if $(KILLS),--kills $(KILLS)) $(ARGS)

replay: $(VENV)/.installed ## learn again as recorded and compare with the live model
	@"$(BIN)/headrace" replay

# Tests without servers run side by side, those that start Kafka, HDFS or a browser one after another.
test: $(VENV)/.installed-dev ## all tests but the long ones, the end-to-end test on real Kafka and HDFS included; ARGS="-k name"
ifdef ARGS
	"$(BIN)/python" -m pytest -m "not long" -rs $(ARGS)
else
	"$(BIN)/python" -m pytest -n 2 --dist loadfile -m "not long" tests/unit tests/property tests/simulation tests/golden tests/tidy
	"$(BIN)/python" -m pytest -m "not long" -rs tests/backends tests/e2e tests/browser
endif

test-long: $(VENV)/.installed-dev ## the long ones too
	"$(BIN)/python" -m pytest -rs $(ARGS)

test-cephfs: $(VENV)/.installed-dev ## the stores' suite and the whole loop on a real CephFS, its OSD killed; needs root, ceph, /dev/fuse
	@"$(BIN)/python" -m headrace.deploy.local.servers.cephfs check || { echo "skipped"; exit 0; }; \
	HEADRACE_TEST_CEPHFS=1 "$(BIN)/python" -m pytest -rs -k cephfs tests/backends tests/e2e $(ARGS)

# Static tools cannot follow the mapping of packages to folders in pyproject.toml; they get it as links.
check: $(VENV)/.installed-dev ## ruff, mypy --strict, import-linter
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	@rm -rf $(LINT) && mkdir -p $(LINT)/headrace
	@for each in headrace/*.py headrace/*/; do ln -s "../../../$${each%/}" $(LINT)/headrace/; done
	@for room in $(ROOMS); do ln -s "../../../$$room" $(LINT)/headrace/; done
	@bin="$$(cd "$(BIN)" && pwd)"; cd $(LINT) && "$$bin/mypy" --config-file ../../pyproject.toml --cache-dir ../mypy_cache -p headrace
	@bin="$$(cd "$(BIN)" && pwd)"; cd $(LINT) && "$$bin/lint-imports" --no-cache ../../pyproject.toml

format: $(VENV)/.installed-dev ## let ruff format and sort
	"$(BIN)/ruff" check --fix-only .
	"$(BIN)/ruff" format .

docs: $(VENV)/.installed ## write the pages of docs/ that are made from code
	"$(BIN)/python" docs/generate.py

bench: $(VENV)/.installed-dev ## freshness and the whole loop, quick form
	@for each in bench/freshness.py bench/loop.py; do echo "== $$each"; "$(BIN)/python" $$each --quick || exit 1; done

clean: ## delete the local state (says what, asks); YES=1 does not ask
	@if [ -x "$(BIN)/headrace" ]; then "$(BIN)/headrace" clean $(if $(YES),--yes); else echo "nothing is installed in $(VENV); state, if any: .headrace"; fi
