#!/usr/bin/env bash
# lint.sh BIN: run every checker, those of the environment's BIN folder first, and fail if any of them complains.
set -uo pipefail

PATH=$1:$PATH
failed=()

check() { # check NAME COMMAND...
    local name=$1
    shift
    if "$@"; then
        echo "$name: ok"
    else
        failed+=("$name")
    fi
}

check_files() { # check_files NAME WHAT COMMAND... -- FILES...
    local name=$1 what=$2
    shift 2
    if [ "${!#}" = -- ]; then
        echo "$name: no $what yet"
    else
        check "$name" "$@"
    fi
}

files() { # the project's files that match any of the patterns, tracked or new
    if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
        git ls-files --cached --others --exclude-standard -- "$@" | while read -r path; do
            [ ! -e "$path" ] || echo "$path"
        done
    else
        local pattern
        for pattern in "$@"; do
            find . -path './.venv*' -prune -o -type f -path "./${pattern#./}" -print
        done
    fi
}

check "ruff" ruff check --quiet .
check "ruff format" ruff format --check --quiet --config "format.exclude=['*.md']" . # code in texts may be aligned by hand
check "mypy" mypy

mapfile -t sources < <(files '*.cpp' '*.cu' '*.h' '*.hip')
check_files "clang-format" "C++ sources" clang-format --dry-run -Werror -- "${sources[@]}"

mapfile -t scripts < <(files '*.sh' '.ci/run')
check_files "shellcheck" "shell scripts" shellcheck -- "${scripts[@]}"

mapfile -t images < <(files 'Dockerfile*' '*/Dockerfile*')
check_files "hadolint" "Dockerfiles" hadolint -- "${images[@]}"

[ ${#failed[@]} -eq 0 ] || {
    printf 'make lint: %s failed\n' "${failed[@]}" >&2
    exit 1
}
