# Everything sets itself up on a fresh Debian machine with python3 and make; a second run sets up nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cat pyproject.toml tools/setup.sh | cksum | cut -d' ' -f1)
# real servers beside each other: two a core, more would only wait for each other
JOBS ?= $(shell $(PYTHON) -c 'import os; print(2 * len(os.sched_getaffinity(0)))')

# where it is set, each of some thousand processes would compile all that it imports
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-matrix test-vm test-peers test-apps check setup clean

demo: setup ## gunicorn with a leaking app, live, for 20 seconds
	@$(BIN)/oomsafe demo $(ARGS)

# the kernel's first, because they measure processes whose malloc is not to keep much yet
test: setup ## every test; fast ones first
	$(BIN)/pytest tests/kernel tests/unit -q -n $(JOBS)
	$(BIN)/pytest tests/servers tests/oom -n $(JOBS) --dist loadgroup $(ARGS)

test-matrix: ## the tests on every Python that is here, with the newest and the lowest supported versions of the servers
	@sh tools/test-matrix.sh $(ENTRIES)

test-vm: setup ## what takes a whole machine: systemd, cgroup v2, memory that ends (docs/virtual-machines.md; root, qemu)
	@$(BIN)/python tools/vm/run.py $(ARGS)

test-peers: setup ## the peers' own test suites with oomsafe wired in; see tools/peers/README.md
	@$(BIN)/python tools/peers/run.py $(SUITES)

test-apps: setup ## applications from the package index, each started by one line with oomsafe run; see tools/apps/README.md
	@$(BIN)/python tools/apps/run.py $(APPS)

check: setup ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(READY)

$(READY):
	@sh tools/setup.sh $(PYTHON) $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) .venv-matrix .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
