# Every target works in a fresh clone: it makes the virtual environment .venv and installs what it needs there.
PYTHON ?= python3
bin := .venv/bin
pip := $(bin)/pip
other := .venv-compat
TORCH ?= 2.13.0
nullgpu := tests/nullgpu/nullgpu $(bin)/python

.DEFAULT_GOAL := help
.PHONY: help demo test compat mutants lint docs bench clients

help:  ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 14

demo: $(pip)  ## plan a 3D CNN on a real MRI scan for an RTX 3090
	$(pip) install -q -e '.[examples]'
	$(bin)/python examples/brain_mri.py --gpu "RTX 3090"

test: $(pip)  ## pass the tests; TESTS="tests/unit/memory -x" runs some of them
	$(pip) install -q -e '.[test]'
	$(bin)/python -m pytest -n auto --dist loadfile $(TESTS)

compat:  ## pass the fast tests with another torch, in an environment of its own that is removed; TORCH=2.13.0
	rm -rf $(other)
	$(PYTHON) -m venv $(other)
	$(other)/bin/pip install -q torch==$(TORCH)
	$(other)/bin/pip install -q -e '.[test-core]' torch==$(TORCH)
	$(other)/bin/python -m pytest -n auto --dist loadfile -m "not nullgpu and not slow" $(TESTS)
	rm -rf $(other)

mutants: $(pip)  ## count small changes to the planning core that no fast test notices; FOLDER=memory counts one folder
	$(pip) install -q -e '.[test,mutants]'
	nice $(bin)/python -m benchmarks.mutation.run $(FOLDER)

lint: $(pip)  ## check style, types and layers
	$(pip) install -q -e '.[lint]'
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/lint-imports

docs: $(pip)  ## draw the figures again, and print what docs/walkthrough.md shows
	$(pip) install -q -e '.[examples]'
	$(nullgpu) docs/figures.py
	$(nullgpu) docs/walkthrough.py docs/images

bench: $(pip)  ## list the suites of accuracy and speed; SUITE="accuracy.nullgpu --only own.mlp" runs one
	$(pip) install -q -e '.[test]'
	$(bin)/python -m benchmarks$(if $(SUITE),.$(SUITE))

# The clients bring a hundred packages, and have a virtual environment of their own; CLIENTS=FOLDER puts it elsewhere.
CLIENTS ?= .venv-clients

clients: $(CLIENTS)/bin/pip  ## train darts, anomalib, scvi-tools and others beside the planner; ONLY="darts|scvi" runs some
	$(CLIENTS)/bin/pip install -q -e '.[clients]'
	$(CLIENTS)/bin/python -m benchmarks.clients.run --only "$(ONLY)"

$(CLIENTS)/bin/pip:
	$(PYTHON) -m venv $(CLIENTS)

$(pip):
	$(PYTHON) -m venv .venv
