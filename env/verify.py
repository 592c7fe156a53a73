"""Whether a built image works: what is run in it before it gets a name, and the table of what was found."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from env.engine import output_in, running
from env.environment import Environment, buildable_ops

_COMPILERS = "cc c++ gcc g++ clang++ nvcc hipcc"
_FACTS = """
import json, torch
from importlib import metadata
from deepspeedlite.ops.op_builder import installed_libraries, read_record
record = read_record()
def is_there(file):  # pip lists what Python compiled without a size
    return file.locate().exists()
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
    "record": record and {"accelerator": record.accelerator, "archs": record.archs, "git": record.git},
    "ops": sorted(installed_libraries()),
    "torch_bytes": sum(f.size or f.locate().stat().st_size for f in metadata.files("torch") if f.size or is_there(f))}))
"""


@dataclass(frozen=True)
class Checked:
    """One line of the table."""

    check: str
    ok: bool
    detail: str
    seconds: float


@dataclass(frozen=True)
class Layer:
    """What one instruction added."""

    size_bytes: int
    made_by: str


@dataclass(frozen=True)
class Expected:
    """What the image was asked to be: its environment with what the command line changed."""

    environment: Environment
    arguments: dict[str, str]
    with_jit: bool = False


def verify(client: Any, image: str, expected: Expected) -> tuple[list[Checked], dict[str, Any]]:
    """Run every check, the failing ones included; the rows, and the facts that the image says of itself."""
    facts: dict[str, Any] = {}
    with running(client, image, shm_size="512m", network_mode="none", tmpfs={"/tmp": ""}) as container:
        rows = [
            _try("user and keys", lambda: _user(container)),
            _try("labels", lambda: _labels(client.images.get(image).labels, expected)),
            _try("compiler", lambda: _compiler(container, expected.with_jit)),
            _try("what is inside", lambda: _inside(container, expected, facts)),
            _try("env_report --json", lambda: _report(container)),
        ]
        rows += _selftest(container)
    return rows, facts


def layers(client: Any, image: str) -> list[Layer]:
    """The layers of at least 100 kB, the oldest first."""
    history = reversed(client.api.history(image))
    return [Layer(each["Size"], _instruction(each["CreatedBy"])) for each in history if each["Size"] >= 100_000]


def _instruction(made_by: str) -> str:
    text = made_by.split("#(nop)")[-1].removesuffix("# buildkit").replace("/bin/bash -euo pipefail -c", "RUN")
    text = text.removeprefix("RUN ") if " RUN " in text else text  # BuildKit's own, before the build's arguments
    text = re.sub(r":[0-9a-f]{64} in ", " in ", text)  # what was copied, as the classic builder names it
    if text.startswith("|"):  # the build's arguments, which come before the command
        text = "RUN " + text.partition(" RUN ")[2]
    text = " ".join(text.split()) or "the base image"
    return text if len(text) <= 80 else text[:77] + "..."


def _try(check: str, work: Callable[[], tuple[bool, str]]) -> Checked:
    start_s = time.monotonic()
    ok, detail = work()
    return Checked(check, ok, detail, time.monotonic() - start_s)


def _user(container: Any) -> tuple[bool, str]:
    status, out, err = output_in(container, ["sh", "-c", "id -u; id -un; ls /etc/ssh/ssh_host_* 2>/dev/null | wc -l"])
    if status:
        return False, err.strip()
    uid, name, keys = out.split()
    if uid == "0":
        return False, "the image runs as root"
    return keys == "0", f"runs as {name} ({uid}), {'no' if keys == '0' else keys} host keys inside"


def _labels(labels: dict[str, str], expected: Expected) -> tuple[bool, str]:
    arguments = expected.arguments
    wanted = {
        "org.opencontainers.image.version": arguments["VERSION"],
        "org.opencontainers.image.revision": arguments["GIT_HASH"],
        "org.deepspeedlite.accelerator": arguments["ACCELERATOR"],
        "org.deepspeedlite.torch": arguments["TORCH_SPEC"],
        "org.deepspeedlite.archs": arguments.get("TORCH_CUDA_ARCH_LIST", arguments.get("PYTORCH_ROCM_ARCH", "")),
        **expected.environment.labels,
    }
    found = {name: labels.get(name) for name in wanted}
    wrong = [f"{name} is {found[name]!r}, not {value!r}" for name, value in wanted.items() if found[name] != value]
    return not wrong, "; ".join(wrong) or f"{len(labels)}, as asked for"


def _compiler(container: Any, with_jit: bool) -> tuple[bool, str]:
    _, out, _ = output_in(container, ["sh", "-c", f"for each in {_COMPILERS}; do command -v $each; done"])
    found = " ".join(path.rpartition("/")[2] for path in out.split())
    if not with_jit:
        return not found, f"there is {found}, which only --with-jit allows" if found else "none"
    code = (
        "from deepspeedlite.ops.op_builder import jit, OPS, built; jit.prebuilt = lambda *_: None; "
        "from deepspeedlite.ops import load; load('cpu_adam'); print(built(OPS['cpu_adam']))"
    )
    status, out, err = output_in(container, ["python", "-c", code])
    return status == 0, f"{found}; compiled {out.strip()}" if status == 0 else err.strip()[-500:]


def _inside(container: Any, expected: Expected, facts: dict[str, Any]) -> tuple[bool, str]:
    status, out, err = output_in(container, ["python", "-c", _FACTS])
    if status:
        return False, err.strip()[-500:]
    facts.update(json.loads(out.splitlines()[-1]))
    faults = []
    spec, accelerator = expected.arguments["TORCH_SPEC"], expected.arguments["ACCELERATOR"]
    built_for = "cuda" if facts["cuda"] else "rocm" if facts["hip"] else "cpu"
    if built_for != accelerator and not (built_for == "cpu" and "+cpu" in spec):
        faults.append(f"its torch is for {built_for}; a torch for the CPU must be asked for: --torch-spec torch==X+cpu")
    wanted = expected.arguments["OPS"].split() or buildable_ops()
    if expected.arguments.get("DS_BUILD_OPS") == "0":
        wanted = []
    if missing := sorted(set(wanted) - set(facts["ops"])):
        faults.append(f"its wheel lacks {', '.join(missing)}")
    if stray := sorted(set(facts["ops"]) - set(wanted)):
        faults.append(f"its wheel has {', '.join(stray)}, which nobody asked for")
    record = facts["record"] or {"accelerator": accelerator, "archs": [], "git": expected.arguments["GIT_HASH"]}
    if record["git"] != expected.arguments["GIT_HASH"]:
        faults.append(f"its wheel is of commit {record['git']}")
    if wanted and record["accelerator"] != accelerator:
        faults.append(f"its ops are for {record['accelerator']}")
    archs = f" for {' '.join(record['archs'])}" if record["archs"] else ""
    return not faults, "; ".join(faults) or f"torch {facts['torch']}, {len(facts['ops'])} ops{archs}"


def _report(container: Any) -> tuple[bool, str]:
    status, out, err = output_in(container, ["deepspeedlite-image", "report", "--json"])
    try:
        found = json.loads(out)
    except ValueError:
        return False, f"exit status {status}: {(err or out).strip()[-500:]}"
    bad = [f"{row['name']}: {row['value']}" for row in found["rows"] if row["status"] == "bad"]
    return status == 0 and not bad, "; ".join(bad) or found["verdict"]


def _selftest(container: Any) -> Sequence[Checked]:
    start_s = time.monotonic()
    status, out, err = output_in(container, ["deepspeedlite-image", "selftest", "--json"])
    try:
        return [Checked(row["check"], row["ok"], row["detail"], row["seconds"]) for row in json.loads(out)]
    except ValueError:
        return [Checked("selftest", False, f"exit status {status}: {(err or out)[-500:]}", time.monotonic() - start_s)]
