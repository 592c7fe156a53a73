#!/usr/bin/env bash
# timed.sh NAME COMMAND...: run the command, then say on stderr how long it took. Exits as the command did.
set -uo pipefail

name=$1
shift
started_s=$SECONDS
"$@"
status=$?
outcome="done"
[ "$status" -eq 0 ] || outcome="failed (exit $status)"
echo "$name: $outcome, $((SECONDS - started_s)) s" >&2
exit "$status"
