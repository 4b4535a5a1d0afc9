# Two commands for a newcomer: `make demo` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3.11
BIN := .venv/bin
export RAY_USAGE_STATS_ENABLED := 0
# Empty is unset: where a machine tells Python to keep no bytecode, each of hundreds of processes would compile 200 packages anew.
export PYTHONDONTWRITEBYTECODE :=
DEMO ?= runs/demo
REAL ?= runs/real
SIZE ?= small
EVIDENCE ?= runs/evidence
MATRIX ?= runs/matrix
SEARCH ?= runs/search-demo

.PHONY: setup setup-browser setup-slurm test test-all demo real evidence matrix defences search-demo docs lint unit unit-all

setup: .venv/ready

# Python compiles what is imported when it is; pip would compile all 200 packages first.
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

# Evaluators of others, which bring a hundred packages along: only their own tests, which are long, need them.
.venv/ready-all: .venv/ready
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev,lm-eval,inspect]'
	touch $@

# What guards every change, in a coffee break; `test-all` has the long cases of each kind as well. The checks of the code run beside the
# tests, which often wait.
test: setup setup-browser
	+$(MAKE) --no-print-directory --jobs 2 lint unit

test-all: .venv/ready-all setup-browser setup-slurm
	+$(MAKE) --no-print-directory --jobs 2 lint unit-all

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Compiled first: the tests start hundreds of processes, and each would compile the package for itself.
# In two processes, for much of a test's time is waiting: for Ray to start, for a killed worker to be missed.
unit: ONLY := -m "not slow"
unit unit-all: setup setup-browser
	$(BIN)/python -m compileall -q pharmacist_ray
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --durations 10 $(ONLY)

# The report's tests look at the page in a real browser; without one they are skipped.
setup-browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; \
	else echo "no Chromium here and not root: the browser tests will be skipped"; fi

# The Slurm script's own tests run Debian's Slurm; without it, or without root, they are skipped. Where systemd would start its daemons,
# installing it is left to you.
setup-slurm:
	@command -v slurmctld >/dev/null && command -v munged >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && [ ! -d /run/systemd/system ]; then \
	apt-get update -qq && RUNLEVEL=1 apt-get install -y -qq --no-install-recommends slurm-wlm munge iproute2; \
	else echo "no Slurm here and none to install: its tests will be skipped"; fi

demo: setup
	$(BIN)/pharmacist testbed $(DEMO) --seed 100
	$(BIN)/pharmacist run --config $(DEMO)/config.yaml

# The same on a real chat model, SmolLM2-135M-Instruct; it says how long it will take here. SIZE=large: three seeds.
real: setup
	$(BIN)/pharmacist example $(REAL) --size $(SIZE)
	$(BIN)/pharmacist run --config $(REAL)/config.yaml

# All arms over five worlds, each with a base model of its own, at three shares of broken rows: hours, and it says how many.
# Interrupted, the same command goes on.
evidence: setup
	$(BIN)/python -m jobs.evidence --out $(EVIDENCE)

# Defences of every stage against kinds of attack and an attacker who adapts, over three worlds: hours. Interrupted, it goes on.
matrix: setup
	$(BIN)/python -m jobs.matrix --out $(MATRIX)

# Every selection by every defence, on the benchmark that `make demo` made.
defences: setup
	$(BIN)/pharmacist run --config $(DEMO)/config.yaml --defences sft,vaccine,t_vaccine,repnoise,booster \
		'comparison.selections=[all,random,pharmacist]' alignment.train.epochs=3.3 run_dir=$(DEMO)/defences

# Twelve settings against each other on the benchmark, then the page that shows them. Interrupted, the same command goes on.
search-demo: setup
	$(BIN)/pharmacist testbed $(SEARCH) --seed 7
	$(BIN)/pharmacist search --config $(SEARCH)/search.yaml
	$(BIN)/pharmacist report --config $(SEARCH)/search.yaml

# The documentation as a site in build/site, without a network. Not --quiet: MkDocs would then pass over its warnings.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open build/site/index.html"
