# The commands of this project; `make` alone lists them. They work in a virtual environment of their own.
#
# Variables:  PYTHON      the Python to build it from, 3.10 or newer       (python3)
#             VENV        where it lives                                   (.venv)
#             TORCH_SPEC  which torch to install       (torch==2.13.0 for the CPU; torch>=2.10 where there is a GPU)
#             TORCH_INDEX a package index to take that torch from          (the CPU builds' own, where it answers)
#             RANKS       how many processes `make demo` trains with       (2)
#             SESSIONS    by how many pytests, beside each other, `make test` runs the files of tests    (4)
#             ACCEL, OPS, ARCHS  what `make wheel` compiles: see docs/ops.md
#             CUDA, ROCM  which version's image `make image-cuda` and `image-rocm` build  (13.0 and 7.1)
#             BASE, IMAGE_ARGS   another base image, and more options of `python -m env build`
#             FUZZ_S, FUZZ_SEED  for how long `make fuzz` goes on, and from which seed         (3600, 1000)
#             GPU_PYTHON, GPU_CHECK_ARGS  the Python of `make gpu-check`, which has the torch  (VENV's, where there is one)
#             HOSTFILE, INSTALL_ARGS  the machines of `make install-hosts`, and more options of install.sh (-r for root)

PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?=
TORCH_INDEX ?=
RANKS ?= 2
PYTEST_ARGS ?=
SESSIONS ?= 4
PEER_PYTHON ?=
ACCEL ?= cpu
OPS ?=
ARCHS ?=
CUDA ?= 13.0
ROCM ?= 7.1
BASE ?=
IMAGE_ARGS ?=
FUZZ_S ?= 3600
FUZZ_SEED ?= 1000
HOSTFILE ?=
INSTALL_ARGS ?=
GPU_CHECK_ARGS ?=

BIN := $(VENV)/bin
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
TIMED := @bash tools/timed.sh
export PYTHON VENV TORCH_SPEC TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-clients test-llamafactory test-images test-wheels test-cluster test-streams test-streams-mutants gpu-check fuzz lint format typecheck wheel bench ops report
.PHONY: image-cpu image-cuda image-rocm release-check install-hosts venv-examples venv-dev clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo:  ## train the CIFAR-10 tutorial on 2 local ranks, from a bare clone
	$(TIMED) "make demo" $(MAKE) --no-print-directory demo-here

test:  ## run the whole test suite
	$(TIMED) "make test" $(MAKE) --no-print-directory test-here MARKS=

test-fast:  ## run the quick tests of every part, in a few minutes
	$(TIMED) "make test-fast" $(MAKE) --no-print-directory test-here MARKS='-m "not slow"' \
		SESSIONS=$(if $(filter file,$(origin SESSIONS)),3,$(SESSIONS)) # quick tests wait little: three keep two cores busy

coverage:  ## run the whole test suite and print which statements and branches it reaches (PYTEST_ARGS: a part of it)
	$(TIMED) "make coverage" $(MAKE) --no-print-directory coverage-here MARKS=

test-images:  ## run the tests of images and of clusters of containers (needs a Docker engine)
	$(TIMED) "make test-images" env DSL_TEST_GPU_IMAGES=1 $(MAKE) --no-print-directory test-here \
		PYTEST_ARGS=tests/image

test-wheels:  ## run the tests of compiled ops and wheels (with nvcc and hipcc, those for GPUs too)
	$(TIMED) "make test-wheels" $(MAKE) --no-print-directory test-here PYTEST_ARGS=tests/wheel

test-cluster:  ## run the tests on many hosts, which namespaces make (needs root, iproute2, sshd; Slurm, MPI and pdsh for all)
	$(TIMED) "make test-cluster" $(MAKE) --no-print-directory test-here \
		PYTEST_ARGS=tests/cluster

test-clients:  ## train with Trainer, Accelerate, Lightning, PEFT, TRL and Megatron core, in an environment of their own
	$(TIMED) "make test-clients" $(MAKE) --no-print-directory clients-here VENV=$(VENV)-clients

test-llamafactory:  ## train with LLaMA-Factory by its own configurations, in an environment of its own (2 GB)
	$(TIMED) "make test-llamafactory" $(MAKE) --no-print-directory llamafactory-here VENV=$(VENV)-llamafactory

test-streams:  ## train on an accelerator made of late queues: 26 cases under 10 seeds, equal to running at once
	$(TIMED) "make test-streams" env DSL_STREAMS=10 $(MAKE) --no-print-directory test-here PYTEST_ARGS="tests/accelerator $(PYTEST_ARGS)"

test-streams-mutants:  ## delete each wait for streams and collectives of the library, and say which case there shows it
	mkdir -p build/threads
	THREADS_DEVICE_DIR=build/threads PYTHONPATH=$(CURDIR) $(VENV)/bin/python tests/accelerator/mutate.py

gpu-check:  ## prove and measure it on this machine's GPUs, in at most 8 minutes, without a network (GPU_CHECK_ARGS: --only ...)
	@$(GPU_PYTHON) -m tools.gpu_check $(GPU_CHECK_ARGS)

fuzz:  ## train random small models under random configurations for an hour, each beside an unsharded loop (FUZZ_S, FUZZ_SEED)
	$(TIMED) "make fuzz" env DSL_FUZZ_S=$(FUZZ_S) DSL_FUZZ_SEED=$(FUZZ_SEED) $(MAKE) --no-print-directory test-here \
		PYTEST_ARGS="tests/field/test_fuzz.py -k for_a_while $(PYTEST_ARGS)"

.PHONY: coverage demo-here test-here coverage-here clients-here llamafactory-here
clients-here: $(VENV)/.ready-clients
	@$(BIN)/python -m pytest -p no:cacheprovider tests/clients $(PYTEST_ARGS)

# Of torchvision and torchaudio, which it asks for, PyPI has builds for CUDA alone, and transformers fails on those.
llamafactory-here: $(VENV)/.ready-llamafactory
	@$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio
	@DSL_LLAMAFACTORY_PYTHON=$(abspath $(BIN))/python $(BIN)/python -m pytest -p no:cacheprovider \
		tests/clients/test_llamafactory.py $(PYTEST_ARGS)

demo-here: venv-examples
	@$(BIN)/deepspeedlite --num_gpus $(RANKS) examples/cifar10/train.py \
		--deepspeed_config examples/cifar10/ds_config.json --min_accuracy usual

PYTEST = pytest -p no:cacheprovider --sessions $(SESSIONS) $(MARKS) $(PYTEST_ARGS)

# Where the user wants no bytecode beside the sources it is kept in the environment: tests start a thousand interpreters.
ifneq ($(PYTHONDONTWRITEBYTECODE),)
export PYTHONDONTWRITEBYTECODE =
export PYTHONPYCACHEPREFIX ?= $(abspath $(VENV))/bytecode
endif

test-here: venv-dev
	@$(BIN)/python -m $(PYTEST)

coverage-here: export COVERAGE_FILE = $(abspath $(VENV))/coverage
coverage-here: venv-dev
	@rm -f "$(COVERAGE_FILE)"*
	@$(BIN)/coverage run -m $(PYTEST); status=$$?; $(BIN)/coverage combine --quiet && $(BIN)/coverage report; exit $$status

lint: venv-dev  ## check style, types, shell scripts and Dockerfiles
	@bash tools/lint.sh "$(BIN)"

typecheck: venv-dev  ## check types alone
	@$(BIN)/mypy

format: venv-dev  ## rewrite the sources in the house style
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format --config "format.exclude=['*.md']" .

wheel: venv-dev  ## compile the ops into a wheel in dist/ (ACCEL=cpu|cuda|rocm, OPS="cpu_adam ...", ARCHS="8.0;9.0+PTX")
	@$(BIN)/python tools/make_wheel.py --accel "$(ACCEL)" --ops "$(OPS)" --archs "$(ARCHS)"

release-check: venv-dev  ## build sdist and wheels, install each in fresh environments, and try it (a Docker engine is of use)
	$(TIMED) "make release-check" $(BIN)/python tools/release_check.py

bench: venv-dev  ## measure import and step times (PEER_PYTHON: an environment with the real DeepSpeed)
	@$(BIN)/python benchmarks/import_time.py $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON))
	@$(BIN)/python benchmarks/step_time.py

image-cpu: venv-dev  ## build and try the image for machines without GPUs (needs a Docker engine; see docs/images.md)
	@$(call BUILD_IMAGE,cpu)

image-cuda: venv-dev  ## build and try the image for NVIDIA GPUs (needs a Docker engine, 27 GB of its disk, and no GPU)
	@$(call BUILD_IMAGE,cuda-$(CUDA))

image-rocm: venv-dev  ## build and try the image for AMD GPUs (needs a Docker engine, 64 GB of its disk, and no GPU)
	@$(call BUILD_IMAGE,rocm-$(ROCM))

BUILD_IMAGE = $(BIN)/python -m env build $(1) $(if $(BASE),--base "$(BASE)") $(if $(ARCHS),--archs "$(ARCHS)") \
	$(if $(OPS),--ops "$(OPS)") $(if $(TORCH_SPEC),--torch-spec "$(TORCH_SPEC)") \
	$(if $(TORCH_INDEX),--torch-index "$(TORCH_INDEX)") $(IMAGE_ARGS)

ops: venv-dev  ## compile every op that this machine can, into the checkout (needs a C++ compiler; nvcc or hipcc for GPUs)
	@DS_BUILD_OPS=1 $(BIN)/python -W ignore setup.py --quiet build_ext --inplace

report: venv-examples  ## say what this machine offers for training, and what is wrong
	@$(BIN)/dslite_report

install-hosts:  ## install the wheel here and on the machines of HOSTFILE (needs ssh without passwords; PYTHON says where to)
	@[ -n "$(HOSTFILE)" ] || { echo "make install-hosts: name the machines: make install-hosts HOSTFILE=hosts" >&2; exit 2; }
	@./install.sh $(INSTALL_ARGS) -H "$(HOSTFILE)"

clean:  ## remove what these commands made, the downloaded data excepted
	@rm -rf "$(VENV)" "$(VENV)-clients" "$(VENV)-llamafactory" build dist *.egg-info deepspeedlite/ops/lib .pytest_cache .hypothesis .mypy_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

venv-examples: $(VENV)/.ready-examples
venv-dev: $(VENV)/.ready-dev

# The dev set holds the examples' packages too.
$(VENV)/.ready-%: pyproject.toml setup.py tools/make_venv.sh
	@bash tools/make_venv.sh "$*"
	@touch "$@"
