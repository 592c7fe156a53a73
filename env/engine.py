"""The Docker engine, through its SDK: finding it, running commands in an image, errors that say how to mend things."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from env.errors import ImageError


def connect() -> Any:
    """A client of the engine that DOCKER_HOST names, or of this machine's.

    Raises:
        ImageError: there is no SDK, no engine, or no permission to use it.
    """
    try:
        import docker
    except ImportError:
        raise ImageError("the docker SDK for Python is not installed: make venv-dev, or pip install docker") from None
    where = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    try:
        client = docker.from_env(timeout=600)
        client.ping()
    except docker.errors.DockerException as error:
        text = str(error)
        if "Permission denied" in text or "PermissionError" in text:
            remedy = "you may not use it: sudo usermod -aG docker $USER, and log in again"
        elif "DOCKER_HOST" in os.environ:
            remedy = "see whether DOCKER_HOST is right, and whether an engine runs there"
        else:
            remedy = "install one (Debian: apt-get install docker.io), or start it: sudo systemctl start docker"
        raise ImageError(f"no Docker engine answers at {where}; {remedy}") from error
    return client


def explain(text: str) -> str:
    """An engine's words, with the remedy where the cause is a common one."""
    for signs, remedy in (
        (("no space left",), "the engine's disk is full: docker system df shows why, docker system prune -a frees it"),
        (
            ("pull access denied", "manifest unknown", "manifest for", "repository does not exist"),
            "that image is not in its registry: correct the name, or give one that is here by --base and --run-base",
        ),
        (
            ("no such host", "connection refused", "Client.Timeout", "i/o timeout", "network is unreachable"),
            "the registry or package index cannot be reached from the engine: see its network and proxies; for a base"
            " image without a registry see tools/local_base.sh, for torch without an index --wheels",
        ),
        (
            ("no active session",),
            "this engine's BuildKit wants a client of its own: DOCKER_BUILDKIT=0 in front takes the classic builder",
        ),
        (("Temporary failure resolving",), "the engine's containers have no name server: see its network and proxies"),
        (
            ("No matching distribution found",),
            "no index has that package for this Python: correct --torch-spec and --torch-index, or give --wheels",
        ),
    ):
        if any(sign.lower() in text.lower() for sign in signs):
            return f"{text}\n-> {remedy}"
    return text


@contextlib.contextmanager
def running(client: Any, image: str, **options: Any) -> Iterator[Any]:
    """A container of `image` in which to run commands; it is removed at the end."""
    container = client.containers.run(image, ["sleep", "infinity"], detach=True, init=True, **options)
    try:
        yield container
    finally:
        container.remove(force=True, v=True)


def output_in(container: Any, command: Sequence[str], **options: Any) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command in a container."""
    status, (out, err) = container.exec_run(list(command), demux=True, **options)
    return status, (out or b"").decode(errors="replace"), (err or b"").decode(errors="replace")
