#!/usr/bin/env bash
# install.sh: build deepspeedlite's wheel once; install and check it here and on every node of a hostfile. docs/install.md
#
# The environment is that of $PYTHON, else the active one. All that happens on a node is one function, `node`, which goes
# there through one ssh with the wheel behind it; on this machine a plain bash runs it.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
here=$(uname -n)
at_once=16
limit_s=1800 # for one node; a dead one is noticed much sooner
local_only='' hostfile='' sudo='' allow_sudo='' keep='' mirror='' verbose=''

usage() {
    cat <<END
usage: ./install.sh [options]

Builds the wheel once and installs it into the same environment here and on every node of the hostfile.

  -l, --local_only       this machine alone
  -H, --hostfile FILE    the nodes, such as "worker-1 slots=4" (/job/hostfile; without that, this machine alone)
  -s, --pip_sudo         run pip by sudo, which must not ask for a password
  -r, --allow_sudo       go on as root
  -n, --no_clean         keep the wheel, in dist/ here and in a folder on each node
  -m, --pip_mirror URL   take what the wheel needs from this package index
  -v, --verbose          show all output of every node
  -h, --help             show this

PYTHON=/path/to/python names another environment than the active one. DS_BUILD_OPS=1 and its like (docs/ops.md) put
compiled ops into the wheel. Exit status: 0, 1 if a node is bad (they are listed), 2 for a wrong command line.
END
}

wrong() {
    echo "install.sh: $*" >&2
    exit 2
}

say() { printf '%s: %s\n' "$1" "$2"; } # one write: nodes' lines do not mix

while [ $# -gt 0 ]; do
    case $1 in
        -H | --hostfile | -m | --pip_mirror) [ -n "${2:-}" ] || wrong "$1 needs a value" ;;
    esac
    case $1 in
        -l | --local_only) local_only=1 ;;
        -H | --hostfile) hostfile=$2 && shift ;;
        -s | --pip_sudo) sudo=1 ;;
        -r | --allow_sudo) allow_sudo=1 ;;
        -n | --no_clean) keep=1 ;;
        -m | --pip_mirror) mirror=$2 && shift ;;
        -v | --verbose) verbose=1 ;;
        -h | --help) usage && exit ;;
        *) wrong "there is no option '$1'; see ./install.sh --help" ;;
    esac
    shift
done

[ "$(id -u)" -ne 0 ] || [ -n "$allow_sudo" ] ||
    wrong "this is root, for whom pip may overwrite the system's packages; if that is meant, add -r (--allow_sudo)"
[ -z "$local_only" ] || [ -z "$hostfile" ] || wrong "--local_only and --hostfile exclude each other"
if [ -z "$hostfile" ] && [ -z "$local_only" ] && [ -e /job/hostfile ]; then
    hostfile=/job/hostfile
fi
asked=${PYTHON:-${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}}
asked=${asked:-python3}
python=$("$asked" -c 'import sys; print(sys.executable)') ||
    wrong "'$asked' does not run; activate an environment, or name its Python: PYTHON=/path/to/python3"
index=(${mirror:+--index-url "$mirror"})
case $mirror in
    http://*) # pip takes nothing from such an index unless it is told that its host is trusted, as it is by who named it
        trusted=${mirror#http://} && trusted=${trusted%%/*}
        index+=(--trusted-host "${trusted##*@}")
        ;;
esac

scratch=$(mktemp -d "${TMPDIR:-/tmp}/deepspeedlite-install.XXXXXX")
mkdir "$scratch/logs" "$scratch/reasons"
# Where this is seen on a node, the node shares this machine's environment, and pip must not run there as well.
mark=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/.deepspeedlite.${scratch##*.}
end() {
    trap '' INT TERM
    for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done
    wait
    [ ! -e "$mark" ] || ${sudo:+sudo -n} rm -f "$mark"
    rm -rf "$scratch"
}
stopped() {
    echo "install.sh: stopped; what has begun on a node may go on there" >&2
    exec 2>/dev/null # bash would report each job that is ended
    exit "$1"
}
trap end EXIT
trap 'stopped 130' INT
trap 'stopped 143' TERM

# Runs on the node, by `bash -s`; the wheel's bytes follow on standard input. Lines that begin with '@' are for the
# person: '@ ' what it does, '@!' why it failed. The rest is the node's log.
node() {
    set -euo pipefail
    python=$1 name=$2 bytes=$3 mark=$4 sudo=$5 keep=$6
    shift 6 # what is left are pip's options
    folder=$(mktemp -d "${TMPDIR:-/tmp}/deepspeedlite-node.XXXXXX")
    [ -n "$keep" ] || trap 'rm -rf "$folder"' EXIT
    head -c "$bytes" >"$folder/$name"
    [ "$(wc -c <"$folder/$name")" -eq "$bytes" ] || { echo "@!the wheel did not arrive whole in $folder" && exit 1; }
    [ -z "$keep" ] || echo "@ the wheel stays in $folder"
    cd "$folder" # a checkout, where this may have been, would be imported in place of what is installed
    if ! where=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); then
        echo "@!$python does not run there; make the same environment there as here"
        exit 1
    fi
    pip=(env PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 "$python" -m pip install --no-input "$@")
    if [ -e "$mark" ]; then
        echo "@ shares the environment of the machine that sent it"
    else
        echo "@ installing"
        # What is needed first; then this wheel in any case, since a rebuilt one may have the same version.
        ${sudo:+sudo -n -H} "${pip[@]}" "./$name"
        ${sudo:+sudo -n -H} "${pip[@]}" --no-deps --force-reinstall "./$name"
    fi
    echo "@ checking"
    version=${name#deepspeedlite-}
    version=${version%%-*}
    found=$("$python" -c 'import deepspeedlite as d, os; print(d.__version__, os.path.dirname(os.path.dirname(d.__file__)))')
    if [ "${found#* }" != "$where" ]; then
        echo "@!$python imports deepspeedlite from ${found#* }, not from $where; see PYTHONPATH and .pth files there"
        exit 1
    fi
    installed=$("$python" -c 'import importlib.metadata as m; print(m.version("deepspeedlite"))')
    [ "$installed" = "$version" ] || { echo "@!has version $installed after $version was installed" && exit 1; }
    if ! report=$("$python" -m deepspeedlite.env_report); then
        printf '%s\n' "$report"
        worst=$(grep -m1 -A1 '^  bad' <<<"$report" | tr -s ' \n' ' ') # and its remedy, as one line
        echo "@!installed, but env_report finds:${worst% }"
        exit 1
    fi
    printf '%s\n' "$report"
    echo "@ has $version; env_report: ${report##*$'\n'}"
}

relay() { # nodes' lines, as they come, each with its host in front
    local line host
    trap '' INT TERM # it ends with those who write to it, after their last words
    while IFS= read -r line; do
        host=${line%%: *} line=${line#*: }
        case $line in
            '@ '*) say "$host" "${line#@ }" ;;
            '@!'*) failed "$host" "${line#@!}" ;;
            *)
                printf '%s\n' "$line" >>"$scratch/logs/$host"
                [ -z "$verbose" ] || say "$host" "$line"
                ;;
        esac
    done
}

failed() { # failed HOST WHY: leaves a file in $scratch/reasons
    local host=$1 why=${2#exit status 255: } log=$scratch/logs/$1
    [ ! -e "$scratch/reasons/$host" ] || return 0 # it has said so itself
    touch "$log"
    case $why in 'exit status '*) why=$({ grep -i 'error' "$log" || grep . "$log" || echo "$why"; } | tail -n 1) ;; esac
    printf '%s\n' "$why" >"$scratch/reasons/$host"
    say "$host" "FAILED: $why"
    [ -n "$verbose" ] || [ "$(wc -l <"$log")" -lt 2 ] || tail -n 5 "$log" | while IFS= read -r line; do say "$host" "  $line"; done
}

is_here() {
    case $1 in localhost | 127.0.0.1 | "$here" | "${here%%.*}") return 0 ;; esac
    return 1
}

install_here() {
    local status=0
    timeout --foreground "$limit_s" bash -s <"$payload" 2>&1 |
        while IFS= read -r line; do printf '%s: %s\n' "$here" "$line"; done | relay || status=$?
    case $status in
        0) ;;
        124) failed "$here" "took longer than $limit_s s" ;;
        *) failed "$here" "exit status $status" ;;
    esac
}

install_there() { # on all other nodes at once, as dslite_ssh does it
    trap : INT TERM # dslite_ssh hears it too, and ends each ssh; this shell waits for that, and `end` for this shell
    printf '%s\n' "${hosts[@]:1}" >"$scratch/hosts"
    PYTHONPATH=$root "$python" -m deepspeedlite.launcher.ssh -H "$scratch/hosts" --input "$payload" \
        --timeout "$limit_s" --at_once "$at_once" 'bash -s 2>&1' 2>"$scratch/failed" | relay
}

hosts=("$here")
if [ -n "$hostfile" ]; then
    names=$(PYTHONPATH=$root "$python" - "$hostfile" <<'END'
import sys
from deepspeedlite.runtime.errors import LaunchError
from deepspeedlite.launcher.hostfile import read_hostfile
try:
    print("\n".join(read_hostfile(sys.argv[1], slots_needed=False)))
except LaunchError as error:
    sys.exit(f"install.sh: {error}")
END
    ) || exit 2
    for host in $names; do is_here "$host" || hosts+=("$host"); done
fi

# setuptools is not in every environment; what is fetched for the build is gone with $scratch.
tools=${PYTHONPATH:-}
if ! "$python" -c 'import setuptools; assert int(setuptools.__version__.split(".")[0]) >= 77' 2>/dev/null; then
    say "$here" "fetching setuptools for the build"
    "$python" -m pip install --quiet --no-input "${index[@]}" --target "$scratch/tools" "setuptools>=77"
    tools=$scratch/tools${tools:+:$tools}
fi
say "$here" "building the wheel"
wheel=$(PYTHONPATH=$tools "$python" "$root/tools/make_wheel.py" --plain --out "$([ -n "$keep" ] && echo "$root/dist" || echo "$scratch")")
wheel=${wheel##*$'\n'}
say "$here" "built ${wheel##*/}${keep:+ in $root/dist}"

payload=$scratch/payload
{
    declare -f node
    printf '%q ' node "$python" "${wheel##*/}" "$(wc -c <"$wheel")" "$mark" "$sudo" "$keep" "${index[@]}"
    printf '; exit\n' # on the same line, after which bash has read nothing yet
    cat "$wheel"
} >"$payload"
install_here
if [ ${#hosts[@]} -gt 1 ]; then
    [ -e "$scratch/reasons/$here" ] || ${sudo:+sudo -n} touch "$mark"
    set -m # its processes are a group, which `end` can end
    install_there &
    wait $! || true
    set +m
    while IFS= read -r line; do failed "${line%%: *}" "${line#*: }"; done < <(sed -n 's/^  //p' "$scratch/failed")
fi

bad=$(find "$scratch/reasons" -type f | wc -l)
echo "deepspeedlite is on $((${#hosts[@]} - bad)) of ${#hosts[@]} nodes, in $python, after $SECONDS s"
for host in "${hosts[@]}"; do
    [ ! -e "$scratch/reasons/$host" ] || say "bad: $host" "$(cat "$scratch/reasons/$host")"
done
[ "$bad" -eq 0 ]
