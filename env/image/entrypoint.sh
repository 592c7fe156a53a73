#!/usr/bin/env bash
# What an image of deepspeedlite does when it is run; docs/images.md. The first word says what:
#   report [options]    what this machine offers and what is wrong (the default)
#   train [options]     the launcher: train --num_gpus 2 script.py ...
#   worker              sshd for a cluster, on port 2222, for the public keys that are mounted
#   selftest [--json]   imports, every op on the CPU against torch, and a short training on 2 ranks
#   --help              this list; any other option is for report
#   anything else       is run as it is
set -uo pipefail

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
keys=${DSL_AUTHORIZED_KEYS:-/etc/deepspeedlite/authorized_keys}
port=${DSL_SSH_PORT:-2222}

say() { echo "deepspeedlite image: $*" >&2; }

fail() {
    say "$*"
    exit 1
}

check_driver() { # CUDA's runtime needs a driver of its own major version or newer
    local needs=${DSL_IMAGE_ACCELERATOR_VERSION:-} said able driver
    [ "${DSL_IMAGE_ACCELERATOR:-}" = cuda ] || return 0
    if ! said=$(nvidia-smi 2>&1); then
        say "no NVIDIA driver answers in this container, so everything runs on the CPU. Where there is a GPU:" \
            "docker run --gpus all (which needs the NVIDIA Container Toolkit on the host)"
        return 0
    fi
    able=$(sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p' <<<"$said" | head -n 1)
    driver=$(sed -n 's/.*Driver Version: *\([0-9.]*\).*/\1/p' <<<"$said" | head -n 1)
    [ -n "$able" ] && [ "${able%%.*}" -lt "${needs%%.*}" ] || return 0
    say "the host's driver $driver runs CUDA $able at most, and this image is for CUDA $needs: update the driver on the" \
        "host, or use an image for CUDA ${able%%.*}. Its GPUs cannot be used with this one."
}

check_shared_memory() { # Docker gives 64 MB, which NCCL and the workers of data loaders use up
    local total_kb
    total_kb=$(df --output=size --block-size=1K /dev/shm 2>/dev/null | tail -n 1)
    [ "${total_kb:-0}" -lt 1000000 ] || return 0
    say "only $((${total_kb:-0} / 1024)) MB of shared memory (/dev/shm): NCCL and data loaders with workers can fail." \
        "Give more: docker run --shm-size=8g (or --ipc=host)"
}

# sshd as the image's user, without any privilege: it can log that user in and nobody else, by key alone.
worker() {
    local folder=$HOME/.ssh name
    [ "$(id -u)" -ne 0 ] || fail "worker runs as the image's own user: leave out docker run --user root"
    id -un >/dev/null 2>&1 || fail "worker needs a user that the image knows: leave out docker run --user $(id -u)"
    [ -s "$keys" ] || fail "worker needs the public keys that may log in: docker run -v KEY.pub:$keys:ro"
    ssh-keygen -l -f "$keys" >/dev/null 2>&1 || fail "$keys has a line that is no public key: mount KEY.pub, not KEY"
    install -d -m 700 "$folder" && install -m 600 "$keys" "$folder/authorized_keys" || exit 1
    [ -e "$folder/host_key" ] || ssh-keygen -q -t ed25519 -N '' -C "$(hostname)" -f "$folder/host_key" || exit 1
    { # commands over ssh see nothing of the image's variables unless they are handed on here
        for name in PATH LD_LIBRARY_PATH CUDA_HOME ROCM_PATH PDSH_RCMD_TYPE NVIDIA_VISIBLE_DEVICES; do
            [ -z "${!name:-}" ] || printf '%s="%s" ' "$name" "${!name}"
        done
    } >"$folder/variables"
    say "sshd for $(id -un) on port $port; host key $(ssh-keygen -l -f "$folder/host_key.pub")"
    exec /usr/sbin/sshd -D -e -f "$here/sshd_config" -p "$port" -o "HostKey=$folder/host_key" \
        -o "AuthorizedKeysFile=$folder/authorized_keys" -o "SetEnv=$(cat "$folder/variables")" -o "AllowUsers=$(id -un)"
}

health() { # a worker answers as sshd; anything else imports the package
    if [ -e "$HOME/.ssh/variables" ]; then
        read -r -t 5 banner </dev/tcp/127.0.0.1/"$port" && [[ $banner == SSH-* ]]
    else
        python -m deepspeedlite.env_report --only software >/dev/null
    fi
}

mode=${1:-report}
case $mode in
    -h | --help)
        echo "docker run [options] IMAGE MODE ...; docs/images.md"
        sed -n '3,/^set/s/^#/ /p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    -*) mode=report ;;
    *) [ $# -eq 0 ] || shift ;;
esac
case $mode in
    report)
        check_driver
        check_shared_memory
        exec dslite_report "$@"
        ;;
    train)
        check_driver
        check_shared_memory
        exec deepspeedlite "$@"
        ;;
    selftest) exec python "$here/selftest.py" "$@" ;;
    worker) worker ;;
    health) health ;;
    *)
        command -v -- "$mode" >/dev/null || {
            say "there is no mode and no command $mode: see docker run IMAGE --help"
            exit 127
        }
        exec "$mode" "$@"
        ;;
esac
