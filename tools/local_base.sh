#!/usr/bin/env bash
# local_base.sh TAG [PACKAGE,PACKAGE...] [mmdebstrap hook...]: a base image made of Debian packages, for machines that
# reach a package mirror and no container registry. Needs root, mmdebstrap and a Docker engine; takes half a minute.
#
# It is Debian 12, slimmed as debian:bookworm-slim is, with the packages given. This machine's own CA certificates and its
# /etc/pip.conf go along, so that apt and pip work in builds here and the Dockerfiles know nothing of it. With CUDA:
#   tools/local_base.sh local/cuda-devel g++ "copy-in /usr/local/cuda-13.0 /usr/local" 'chroot "$1" ln -s cuda-13.0 /usr/local/cuda'
set -euo pipefail

tag=${1:?usage: local_base.sh TAG [PACKAGE,PACKAGE...] [mmdebstrap hook...]}
packages=${2:-}
shift $(($# < 2 ? $# : 2))
mirror=$(awk '/^URIs:/ { print $2; exit }' /etc/apt/sources.list.d/debian.sources 2>/dev/null || true)
export TMPDIR=${TMPDIR:-/tmp}
scratch=$(mktemp -d -p /dev/shm dsl-base.XXXXXX) # mmdebstrap writes thousands of small files
trap 'rm -rf "$scratch"' EXIT

hooks=()
certificates=/usr/local/share/ca-certificates
if [ -n "$(ls -A "$certificates" 2>/dev/null)" ]; then
    # shellcheck disable=SC2016 # mmdebstrap, not this shell, says where the root is
    hooks+=("copy-in $certificates ${certificates%/*}" 'chroot "$1" update-ca-certificates')
fi
[ ! -e /etc/pip.conf ] || hooks+=("copy-in /etc/pip.conf /etc")
arguments=()
for hook in "${hooks[@]}" "$@"; do arguments+=("--customize-hook=$hook"); done
for folder in doc man info locale; do arguments+=("--dpkgopt=path-exclude=/usr/share/$folder/*"); done

TMPDIR=$scratch mmdebstrap --quiet --mode=root --variant=minbase --include="ca-certificates${packages:+,$packages}" \
    --aptopt='Acquire::Languages "none"' --dpkgopt=force-unsafe-io --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    "${arguments[@]}" bookworm - "${mirror:-http://deb.debian.org/debian}" >"$scratch/base.tar"
docker import --change 'CMD ["bash"]' "$scratch/base.tar" "$tag"
