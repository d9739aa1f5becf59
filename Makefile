# Needs make and Python 3.11 or newer. Everything else is installed into $(VENV) from requirements.lock, by hash.
# PYTHON=... picks the interpreter that a new environment is made with, VENV=... where it is made. TPU=1 adds libtpu.

VENV ?= .venv
UV ?= uv
PIP_INSTALL = $(VENV)/bin/python -m pip -qq --disable-pip-version-check install

ifndef PYTHON
PYTHON := $(shell for p in python3.12 python3.11 python3; do \
  $$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint lock clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1#/p' Makefile | awk -F'#' '{ printf "  make %-6s %s\n", $$1, $$2 }'

setup: $(VENV)/.stamp $(if $(TPU),$(VENV)/.stamp-tpu) ## make the environment (the others do it when it is missing or out of date); TPU=1 with libtpu

demo: $(VENV)/.stamp ## three rounds of TPAW on the built-in task; ARGS="--workdir=DIR --config.field=value" for more
	$(VENV)/bin/python -m selfplay_jax.main --config=configs/tpaw.py $(ARGS)

test: $(VENV)/.stamp ## the test suite; ARGS="-k losses", or ARGS="-m ''" for the slow ones too
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.stamp ## ruff, mypy and shellcheck
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck -x launch/*.sh launch/gke/*.sh .ci/run

lock: ## resolve pyproject.toml into requirements.lock again (needs uv); ARGS=--upgrade for newer versions
	@command -v $(UV) >/dev/null || { echo "make lock needs uv: install it, or say where it is with UV=/path/to/uv" >&2; exit 1; }
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-emit-find-links --extra test --extra cloud --custom-compile-command "make lock" pyproject.toml -o requirements.lock $(ARGS)
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	  --no-emit-find-links --extra tpu -c requirements.lock --no-header pyproject.toml | sed -n '/^libtpu==/,/^[^ l]/{/^[^ l]/!p}' >requirements-tpu.lock

clean: ## remove the environments and the tools' caches, never runs/
	rm -rf $(VENV) .venv-parity .venv-tpu .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

# What has no wheel is built with the locked setuptools, which therefore comes first. The lock is complete, so pip resolves
# nothing: where a package asks for another one's extra it would look past the pinned version.
# The stamp comes last and .installing marks the time before it: an environment whose installation was interrupted
# is made again from nothing.
$(VENV)/.stamp: requirements.lock pyproject.toml
	@test ! -e $(VENV)/.installing && \
	  $(VENV)/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  "$(PYTHON)" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "selfplay_jax needs Python 3.11 or newer with its venv module$(if $(PYTHON),; $(PYTHON) is not that): install it" \
	      "(Debian and Ubuntu: python3 and python3-venv) or name one with PYTHON=/path/to/python3" >&2; exit 1; }; \
	  echo "Making $(VENV) with $$("$(PYTHON)" --version)"; \
	  "$(PYTHON)" -m venv --clear $(VENV); }
	@touch $(VENV)/.installing
	@echo "Installing the locked packages into $(VENV) (some minutes the first time)"
	@sed -n '/^setuptools==/,/^    #/p' requirements.lock >$(VENV)/build.lock
	@$(PIP_INSTALL) --require-hashes -r $(VENV)/build.lock
	@$(PIP_INSTALL) --require-hashes --no-deps --no-build-isolation -r requirements.lock
	@$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@rm $(VENV)/.installing
	@touch $@

# The TPU's compiler and runtime, as the locked jax asks for it: 300 MB that other machines do without.
$(VENV)/.stamp-tpu: $(VENV)/.stamp requirements-tpu.lock
	@$(PIP_INSTALL) --require-hashes --no-deps -r requirements-tpu.lock
	@touch $@
