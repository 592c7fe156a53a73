"""Building by BuildKit, which every engine since 18.09 has inside, through the interface of the classic builder.

It builds the stages of a Dockerfile side by side and has caches that outlive a step: where a `# buildkit:` comment
stands before a RUN, its options are put into that RUN, which the classic builder would refuse. Kernels are compiled
without such a cache: ninja would take an old object for new, since all files of the context have one time.

There is no session with the engine, in which it could ask for passwords: base images must have been pulled before.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

from env.engine import explain
from env.errors import ImageError
from env.steps import Show, Step, some

ARGUMENTS = {"PIP_NO_CACHE_DIR": ""}  # pip takes an empty one for none at all, and fills its cache
_STEP = re.compile(r"\[(?:.*?(\S+) +)?(\d+)/(\d+)\] (.*)", re.DOTALL)
_COMMENT = re.compile(r"^# buildkit: (.+)\n((?:#.*\n)*)RUN ", re.MULTILINE)


def wanted(client: Any) -> bool:
    """Decided as by Docker's own command line: DOCKER_BUILDKIT=0 or 1, else what the engine says."""
    asked = os.environ.get("DOCKER_BUILDKIT", "").lower()
    if asked:
        return asked in ("1", "t", "true")
    return client.api.get(f"{client.api.base_url}/_ping").headers.get("Builder-Version") == "2"


def with_mounts(dockerfile: str) -> str:
    """The Dockerfile's text with the options of its `# buildkit:` comments in force."""
    return _COMMENT.sub(r"\2RUN \1 ", dockerfile)


def messages(client: Any, context: IO[bytes], dockerfile: str, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Start a build; what the engine says of it. `options` are those of the engine's interface."""
    import docker

    where = f"{client.api.base_url}/v{client.api.api_version}/build"
    asked = {"version": "2", "dockerfile": dockerfile, "rm": True, **options}
    encoded = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in asked.items()}
    headers = {"Content-Type": "application/x-tar"}
    with client.api.post(where, params=encoded, data=context, headers=headers, stream=True, timeout=None) as answer:
        if not answer.ok:
            raise docker.errors.APIError(answer.reason, answer, answer.text.strip())
        for line in answer.iter_lines():
            if line:
                yield json.loads(line)


def follow(stream: Iterable[Mapping[str, Any]], show: Show, verbose: bool = False) -> tuple[str, list[Step]]:
    """As `steps.follow`. The steps run side by side, so each has its line when it ends.

    Raises:
        ImageError: a step failed.
    """
    steps: dict[bytes, Step] = {}
    ended: set[bytes] = set()
    failed = image = ""
    for message in stream:
        if message.get("id") == "moby.buildkit.trace":
            for number, part in fields(base64.b64decode(message["aux"])):
                entry = dict(fields(part)) if isinstance(part, bytes) else {}
                if number == 1:
                    failed = _vertex(entry, steps, ended, show) or failed
                elif number == 3 and entry[1] in steps:
                    steps[entry[1]].says(entry[4].decode(errors="replace"), show, verbose)
        elif "aux" in message:
            image = message["aux"].get("ID", image)
        if problem := str(message.get("error", "")).strip():
            raise ImageError(failed or explain(problem))
    return some(image), [steps[digest] for digest in ended]


def _vertex(entry: Mapping[int, Any], steps: dict[bytes, Step], ended: set[bytes], show: Show) -> str:
    """News of a step: digest 1, name 3, cached 4, started 5, completed 6, error 7. How it failed, if it did."""
    digest, name = entry[1], entry[3].decode()
    if not (found := _STEP.match(name)) or 5 not in entry:
        return ""
    step = steps.setdefault(digest, Step(int(found[2]), int(found[3]), found[4], found[1] or ""))
    problem = entry.get(7, b"").decode()
    if problem:
        return "" if "context canceled" in problem else step.failure(problem)  # since another one failed
    if 6 in entry and digest not in ended:
        ended.add(digest)
        step.cached = bool(entry.get(4))
        step.ends(show)
    return ""


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: number and value, which is bytes for texts and messages.

    https://protobuf.dev/programming-guides/encoding/
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        length = varint() if kind == 2 else 8 if kind == 1 else 4
        yield key >> 3, data[at : at + length]
        at += length
