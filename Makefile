# The commands of this project; `make` alone lists them. They work in a virtual environment of their own.
#
# Variables:  PYTHON      the Python to build it from, 3.10 or newer       (python3)
#             VENV        where it lives                                   (.venv)
#             TORCH_SPEC  which torch to install       (torch==2.13.0 for the CPU; torch>=2.10 where there is a GPU)
#             TORCH_INDEX a package index to take that torch from          (the CPU builds' own, where it answers)
#             RANKS       how many processes `make demo` trains with       (2)
#             ACCEL, OPS, ARCHS  what `make wheel` compiles: see docs/ops.md

PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?=
TORCH_INDEX ?=
RANKS ?= 2
PYTEST_ARGS ?=
PEER_PYTHON ?=
ACCEL ?= cpu
OPS ?=
ARCHS ?=

BIN := $(VENV)/bin
TIMED := @bash tools/timed.sh
export PYTHON VENV TORCH_SPEC TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint format typecheck wheel bench venv-examples venv-dev clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo:  ## train the CIFAR-10 tutorial on 2 local ranks, from a bare clone
	$(TIMED) "make demo" $(MAKE) --no-print-directory demo-here

test:  ## run the whole test suite
	$(TIMED) "make test" $(MAKE) --no-print-directory test-here MARKS=

test-fast:  ## run the quick tests of every part, in under three minutes
	$(TIMED) "make test-fast" $(MAKE) --no-print-directory test-here MARKS='-m "not slow"'

.PHONY: demo-here test-here
demo-here: venv-examples
	@$(BIN)/deepspeedlite --num_gpus $(RANKS) examples/cifar10/train.py \
		--deepspeed_config examples/cifar10/ds_config.json --min_accuracy usual

test-here: venv-dev
	@$(BIN)/python -m pytest -p no:cacheprovider $(MARKS) $(PYTEST_ARGS)

lint: venv-dev  ## check style, types, shell scripts and Dockerfiles
	@bash tools/lint.sh "$(BIN)"

typecheck: venv-dev  ## check types alone
	@$(BIN)/mypy

format: venv-dev  ## rewrite the sources in the house style
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format --config "format.exclude=['*.md']" .

wheel: venv-dev  ## compile the ops into a wheel in dist/ (ACCEL=cpu|cuda|rocm, OPS="cpu_adam ...", ARCHS="8.0;9.0+PTX")
	@$(BIN)/python tools/make_wheel.py --accel "$(ACCEL)" --ops "$(OPS)" --archs "$(ARCHS)"

bench: venv-dev  ## measure import and step times (PEER_PYTHON: an environment with the real DeepSpeed)
	@$(BIN)/python benchmarks/import_time.py $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON))
	@$(BIN)/python benchmarks/step_time.py

clean:  ## remove what these commands made, the downloaded data excepted
	@rm -rf "$(VENV)" build dist *.egg-info deepspeedlite/ops/lib .pytest_cache .hypothesis .mypy_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

venv-examples: $(VENV)/.ready-examples
venv-dev: $(VENV)/.ready-dev

# The dev set holds the examples' packages too.
$(VENV)/.ready-%: pyproject.toml setup.py tools/make_venv.sh
	@bash tools/make_venv.sh "$*"
	@touch "$@"
