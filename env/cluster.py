"""A cluster of containers on this machine: a private network, workers under sshd, a hostfile, and a key of its own.

    python -m env cluster up NAME --nodes 3
    python -m env cluster train NAME [launcher's options] script.py ...
    python -m env cluster down NAME

NAME is an environment, whose image must have been built. Nothing is kept outside of the containers, which are found by
their label: the first of them has the hostfile and the only copy of the private key, and the launcher runs in it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from env.context import archive
from env.engine import connect, explain, output_in, running
from env.errors import ImageError

LABEL = "org.deepspeedlite.cluster"
USER_ID = 10001
HOME = "/home/dslite"
PORT = 2222
START_LIMIT_S = 60.0
_ANSWERS = f"cd {HOME}/.ssh && test -e variables && deepspeedlite-image health && cut -d' ' -f1,2 host_key.pub"
_PID = "/tmp/deepspeedlite-train.pid"
_MAKE_KEY = 'ssh-keygen -q -t ed25519 -N "" -C cluster -f /tmp/key && cat /tmp/key.pub /tmp/key'


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """`cluster up`, `train` and `down`."""
    parser = command("cluster", lambda args: args.act(args), "containers that train together: up, train, down")
    acts = parser.add_subparsers(required=True, metavar="up|train|down")

    def act(name: str, work: object, text: str) -> argparse.ArgumentParser:
        added = acts.add_parser(name, help=text, description=text)
        added.add_argument("name", metavar="NAME", help="the environment, or whatever --image was given a name of")
        added.set_defaults(act=work)
        return added

    up_parser = act("up", _up, "make a private network and worker containers")
    up_parser.add_argument("--nodes", type=int, default=2, metavar="N", help="containers (2)")
    up_parser.add_argument("--slots", type=int, default=1, metavar="N", help="ranks in each (1)")
    up_parser.add_argument("--image", default="", metavar="IMAGE", help="(deepspeedlite:NAME)")
    up_parser.add_argument("--shm-size", default="1g", metavar="SIZE", help="shared memory of each (1g)")
    up_parser.add_argument("--volume", action="append", default=[], metavar="SRC:DST[:ro]", help="in all; repeatable")
    up_parser.add_argument("--gpus", action="store_true", help="give every container all GPUs")
    train_parser = act("train", _train, "run the launcher in the first container, on all of them")
    train_parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="as for `deepspeedlite`")
    act("down", _down, "remove the containers and the network; does no harm where there are none")


def _up(args: argparse.Namespace) -> int:
    client = connect()
    image = args.image or f"deepspeedlite:{args.name}"
    if args.nodes < 1 or args.slots < 1:
        raise ImageError("--nodes and --slots: at least one is needed")
    options: dict[str, Any] = {"shm_size": args.shm_size, "volumes": args.volume}
    if args.gpus:
        import docker

        options["device_requests"] = [docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])]
    names = up(client, args.name, image, args.nodes, args.slots, options)
    print(f"{args.name}: {', '.join(names)} from {image}, {args.slots} slots each")
    print(f"train with: python -m env cluster train {args.name} /opt/deepspeedlite/examples/cifar10/train.py ...")
    return 0


def up(client: Any, name: str, image: str, nodes: int, slots: int, options: dict[str, Any]) -> list[str]:
    """Start the workers and wait until all answer; their names. What a failure has made is removed again.

    Raises:
        ImageError: there is such a cluster already, there is no such image, or a worker does not start.
    """
    import docker

    if _members(client, name):
        raise ImageError(f"there is a cluster {name} already: python -m env cluster down {name}")
    try:
        image_id = client.images.get(image).id
    except docker.errors.ImageNotFound:
        raise ImageError(f"there is no image {image}: python -m env build {name}, or give --image") from None
    try:
        return _start(client, name, image_id, [f"worker-{n}" for n in range(1, nodes + 1)], slots, options)
    except docker.errors.APIError as error:
        down(client, name)
        raise ImageError(explain(f"cluster {name}: the engine refuses: {error.explanation or error}")) from error
    except BaseException:
        down(client, name)
        raise


def _start(client: Any, name: str, image: str, hosts: list[str], slots: int, options: dict[str, Any]) -> list[str]:
    network = client.networks.create(f"{name}-cluster", labels={LABEL: name}, check_duplicate=True)
    public_key, private_key = _new_key(client, image)
    allowed = {"authorized_keys": (public_key, 0o600)}
    containers = []
    for host in hosts:
        container = client.containers.create(
            image,
            ["worker"],
            name=f"{name}-{host}",
            hostname=host,
            labels={LABEL: name},
            init=True,
            network=network.name,
            networking_config={network.name: client.api.create_endpoint_config(aliases=[host])},
            **options,
        )
        container.put_archive("/etc/deepspeedlite", archive(allowed, USER_ID))
        container.start()
        containers.append(container)
    known = "".join(f"[{host}]:{PORT} {_host_key(c)}\n" for host, c in zip(hosts, containers))
    ssh = {
        "id_ed25519": (private_key, 0o600),
        "known_hosts": (known.encode(), 0o600),
        "config": (f"Host worker-*\n  Port {PORT}\n  StrictHostKeyChecking yes\n".encode(), 0o600),
    }
    containers[0].put_archive(f"{HOME}/.ssh", archive(ssh, USER_ID))
    hostfile = "".join(f"{host} slots={slots}\n" for host in hosts).encode()
    containers[0].put_archive("/job", archive({"hostfile": (hostfile, 0o644)}, USER_ID))
    return [container.name for container in containers]


def _new_key(client: Any, image: str) -> tuple[bytes, bytes]:
    """A public and a private key that exist nowhere else: the container that made them is gone when this returns."""
    with running(client, image, network_mode="none") as container:
        status, out, err = output_in(container, ["sh", "-c", _MAKE_KEY])
    if status:
        raise ImageError(f"no key can be made in {image}: {err.strip()}")
    public_key, _, private_key = out.partition("\n")
    return f"{public_key}\n".encode(), private_key.encode()


def _host_key(container: Any) -> str:
    """What the worker's sshd will show, once it has made it and answers."""
    deadline_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline_s:
        status, out, _ = output_in(container, ["sh", "-c", _ANSWERS])
        if status == 0:
            return out.strip()
        container.reload()
        if container.status in ("exited", "dead"):
            break
        time.sleep(0.1)
    said = container.logs(tail=5).decode(errors="replace").strip()
    raise ImageError(f"{container.name} does not answer by ssh: {said or 'it said nothing'}")


def _train(args: argparse.Namespace) -> int:
    client = connect()
    return train(client, args.name, args.rest, lambda out, text: (out.buffer.write(text), out.flush()))


def train(client: Any, name: str, arguments: Sequence[str], write: Callable[[Any, bytes], Any]) -> int:
    """Run the launcher in the first worker; `write` gets its output. Ctrl-C is handed on. Returns its exit status."""
    members = _members(client, name)
    if not members:
        raise ImageError(f"there is no cluster {name}: python -m env cluster up {name}")
    head = members[0]
    if head.status != "running":
        raise ImageError(f"{head.name} does not run any more ({head.status}): cluster down {name}, then up")
    command = ["sh", "-c", f'echo $$ >{_PID} && exec deepspeedlite "$@"', "deepspeedlite", *arguments]
    started = client.api.exec_create(head.id, command)
    output = client.api.exec_start(started["Id"], stream=True, demux=True)

    ended = threading.Event()

    def copy() -> None:
        try:
            for out, err in output:
                if out:
                    write(sys.stdout, out)
                if err:
                    write(sys.stderr, err)
        finally:
            ended.set()

    threading.Thread(target=copy, daemon=True).start()  # which Ctrl-C does not interrupt
    while not ended.is_set():
        try:
            ended.wait()
        except KeyboardInterrupt:  # the launcher ends its ranks, and its output with it
            output_in(head, ["sh", "-c", f"kill -INT $(cat {_PID})"])
    return int(client.api.exec_inspect(started["Id"])["ExitCode"])


def _down(args: argparse.Namespace) -> int:
    removed = down(connect(), args.name)
    print(f"{args.name}: removed {', '.join(removed) or 'nothing: there is no such cluster'}")
    return 0


def down(client: Any, name: str) -> list[str]:
    """Remove every container and network of the cluster; their names."""
    import docker

    removed = []
    for container in _members(client, name):
        with contextlib.suppress(docker.errors.NotFound):
            container.remove(force=True, v=True)
            removed.append(container.name)
    for network in client.networks.list(filters={"label": f"{LABEL}={name}"}):
        network.remove()
        removed.append(network.name)
    return removed


def _members(client: Any, name: str) -> list[Any]:
    """The containers, the first worker first."""
    found = client.containers.list(all=True, filters={"label": f"{LABEL}={name}"})
    return sorted(found, key=lambda container: int(container.name.rpartition("-")[2]))
