# make reproduce [PROFILE=smoke|quick|standard|learners|paper] [DEVICE=auto|cpu|cuda] [SEEDS=0,1,2] [TASKS=BallCircle,CarCircle]
# make test | test-slow | lab | reference | notebooks | bench | setup | clean
# Further settings: CORES=2, FLAGS=--dry-run (handed to snakemake), PYTHON=python3.11,
# TORCH_INDEX=https://download.pytorch.org/whl/cpu (another wheel index, for PyTorch alone).
PROFILE ?= quick
DEVICE ?= auto
SEEDS ?=
TASKS ?=
CORES ?=
FLAGS ?=
PYTHON ?= python3.11
TORCH_INDEX ?=

BIN := .venv/bin
READY := .venv/ready
# conftest.py keeps the notebooks in one process, in order, and their results out of the repository.
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout 120 --nbval-sanitize-with tests/nbval.cfg
comma := ,
empty :=
space := $(empty) $(empty)
ifdef PIP_FIND_LINKS                        # uv does not read pip's settings
export UV_FIND_LINKS ?= $(subst $(space),$(comma),$(PIP_FIND_LINKS))
endif
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif

.PHONY: reproduce test test-slow lab reference notebooks bench setup clean

reproduce: $(READY)
	@$(BIN)/saferule reproduce --profile='$(PROFILE)' --device='$(DEVICE)' --seeds='$(SEEDS)' --tasks='$(TASKS)' --cores='$(CORES)' -- $(FLAGS)

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 -m "not slow" $(NBVAL) tests notebooks

test-slow: $(READY)
	$(BIN)/python -m pytest -q -n 2 tests

lab: $(READY)
	$(BIN)/jupyter lab notebooks

reference: $(READY)
	@$(BIN)/saferule reference --profile='$(PROFILE)'

notebooks: $(READY)
	$(BIN)/python notebooks/refresh.py

bench: $(READY)
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

setup: $(READY)

# The stamp is written last, so that an interrupted set-up is done again.
$(READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "saferule: $(PYTHON) is not on the path; install Python 3.11 or name it with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q uv || echo "uv is not to be had; pip does it too, in minutes"
ifneq ($(TORCH_INDEX),)
	$(BIN)/python -m pip install -q --index-url '$(TORCH_INDEX)' "$$($(BIN)/python -c 'import tomllib; print(*(d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if d.startswith("torch")))')"
endif
	$(BIN)/uv pip install -q --python $(BIN)/python -e ".[all]" || $(BIN)/python -m pip install -q -e ".[all]"
	@touch $@

clean:
	rm -rf results/runs .pytest_cache .ruff_cache
