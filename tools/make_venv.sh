#!/usr/bin/env bash
# make_venv.sh EXTRA: make the virtual environment $VENV and install torch and this project with its EXTRA into it.
#
# Which torch: $TORCH_SPEC if set; on a machine with an NVIDIA GPU the newest from the usual package index; else the
# CPU build of the version this project is developed with. PyPI's torch for Linux brings gigabytes of CUDA along, so the
# CPU build is looked for on torch's own index ($TORCH_INDEX), when that answers, beside the indexes pip is set up with.
set -euo pipefail

extra=$1
: "${PYTHON:=python3}" "${VENV:=.venv}" "${TORCH_SPEC:=}" "${TORCH_INDEX:=}"
cpu_index=https://download.pytorch.org/whl/cpu
started_s=$SECONDS

fail() {
    echo "make: $*" >&2
    exit 1
}

command -v "$PYTHON" >/dev/null ||
    fail "there is no '$PYTHON'; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$PYTHON" --version) is too old; deepspeedlite needs 3.10 or newer: make PYTHON=/path/to/python3"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "this Python cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv"

has_nvidia_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

answers() { # whether an index can be reached, within seconds
    timeout 6 "$PYTHON" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1] + "/torch/", timeout=4)' "$1" 2>/dev/null
}

[ -x "$VENV/bin/python" ] || {
    echo "making the environment $VENV"
    "$PYTHON" -m venv "$VENV"
}
pip=("$VENV/bin/python" -m pip install --quiet --quiet --disable-pip-version-check) # errors are still shown

if has_nvidia_gpu; then
    spec=${TORCH_SPEC:-torch>=2.10}
else
    spec=${TORCH_SPEC:-torch==2.13.0}
    [ ! -e /dev/kfd ] || [ -n "$TORCH_INDEX" ] ||
        echo "there is an AMD GPU: for torch's ROCm build, name its index: make TORCH_INDEX=https://.../whl/rocmX.Y"
fi

if ! "$VENV/bin/python" tools/installed.py "$spec"; then
    if [ -z "$TORCH_INDEX" ] && ! has_nvidia_gpu && [ "$(uname -s)" = Linux ] && answers "$cpu_index"; then
        TORCH_INDEX=$cpu_index
    fi
    echo "installing $spec${TORCH_INDEX:+ from $TORCH_INDEX}"
    # A build such as 2.13.0+cpu outranks plain 2.13.0, so the extra index decides the build and no other package.
    "${pip[@]}" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$spec"
fi
echo "installing deepspeedlite with its '$extra' packages"
"${pip[@]}" --editable ".[$extra]"
echo "the environment $VENV is ready ($((SECONDS - started_s)) s)"
