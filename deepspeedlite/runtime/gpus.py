"""Which GPUs the ranks may use, found without torch and without touching a GPU.

The visible-devices variables decide where they are set: they are lists that local ranks index into, and they are
only ever narrowed. Otherwise devices are counted from what the kernel driver shows.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepspeedlite.runtime.errors import LaunchError

_SMI_TIMEOUT_S = 5.0
_VARIABLES = {
    "nvidia": ("CUDA_VISIBLE_DEVICES",),
    # ROCm reads all three: ROCR_ filters below HIP, and HIP takes CUDA_'s name as a synonym of its own.
    "amd": ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
}


@dataclass(frozen=True)
class Devices:
    """The devices that ranks may use, as the values their visible-devices variable takes."""

    vendor: str  # "nvidia", "amd" or "cpu"
    ids: tuple[str, ...] = ()
    variable: str = "CUDA_VISIBLE_DEVICES"
    from_variable: bool = False

    def pick(self, slots: Sequence[int]) -> dict[str, str]:
        """The variable that shows a rank these devices, by their place in `ids`; nothing where there are no devices.

        Raises:
            LaunchError: a slot beyond the devices there are.
        """
        if not self.ids:
            return {}
        if beyond := [slot for slot in slots if slot >= len(self.ids)]:
            source = f"{self.variable}={','.join(self.ids)} leaves" if self.from_variable else "this machine has"
            raise LaunchError(
                f"slot {beyond[0]} is asked for, and {source} {len(self.ids)} GPUs ({_span(len(self.ids))}); ask for "
                "fewer slots, or set DS_ACCELERATOR=cpu for CPU ranks"
            )
        return {self.variable: ",".join(self.ids[slot] for slot in slots)}


def named_accelerator(environ: Mapping[str, str]) -> str:
    """What `DS_ACCELERATOR` says, in lower case; "" where it says nothing."""
    return environ.get("DS_ACCELERATOR", "").strip().lower()


def find_devices(environ: Mapping[str, str], root: Path = Path("/")) -> Devices:
    """Every device that this user's variables leave visible. No devices: vendor "cpu".

    Raises:
        LaunchError: a visible-devices variable names a device twice or one that is not there.
    """
    if named_accelerator(environ) == "cpu":
        return Devices("cpu")
    vendor, count = "nvidia", _count_nvidia(environ, root)
    if not count:
        vendor, count = "amd", _count_amd(root)
    if not count:
        return Devices("cpu")
    for variable in _VARIABLES[vendor]:
        if variable in environ:
            ids = parse_visible(variable, environ[variable], count)
            return Devices(vendor if ids else "cpu", ids, variable, from_variable=True)
    return Devices(vendor, tuple(str(index) for index in range(count)))


def parse_visible(variable: str, text: str, count: int) -> tuple[str, ...]:
    """The list a visible-devices variable holds. As in CUDA, `-1` or an empty entry ends it.

    Raises:
        LaunchError: a device twice (CUDA would then show none), or an index beyond the `count` devices present.
    """
    ids: list[str] = []
    for entry in (part.strip() for part in text.split(",")):
        if not entry or entry.startswith("-"):
            break
        if entry in ids:
            raise LaunchError(f"{variable}={text} names device {entry} twice; list each device once")
        if entry.isdigit() and int(entry) >= count:
            raise LaunchError(
                f"{variable}={text} names device {entry}, but this machine has {count} ({_span(count)}); "
                "correct or unset it"
            )
        ids.append(entry)
    return tuple(ids)


def choose_ranks(devices: Devices, num_gpus: int | None) -> tuple[int, str]:
    """How many ranks to start here, and one line that says on what.

    Raises:
        LaunchError: more GPUs were asked for than there are.
    """
    available = len(devices.ids)
    if not available:
        count = num_gpus or 1
        more = "" if num_gpus else " (--num_gpus N starts N of them)"
        return count, f"no GPU is visible: starting {count} CPU rank{'s' * (count > 1)}{more}"
    count = available if num_gpus is None else num_gpus
    source = f"{devices.variable}={','.join(devices.ids)}"
    if count > available:
        where = f"{source} leaves {available} visible" if devices.from_variable else f"this machine has {available}"
        raise LaunchError(
            f"--num_gpus {count} asks for {count} GPUs, but {where}; "
            f"ask for at most {available}, or set DS_ACCELERATOR=cpu for CPU ranks"
        )
    if devices.from_variable:
        return count, f"{source} is respected: ranks use {','.join(devices.ids[:count])}"
    return count, f"{count} of {available} GPUs are used ({_span(count)})"


def _span(count: int) -> str:
    return "device 0" if count == 1 else f"devices 0 to {count - 1}"


def _count_nvidia(environ: Mapping[str, str], root: Path) -> int:
    """NVIDIA GPUs this process may open.

    /dev goes first: a container's holds the nodes that were handed in, while its /proc may list every GPU of the host.
    Node numbers are those of the host, CUDA counts what it can open from 0, so only the count matters.
    """
    dev = root / "dev"
    nodes = [path for path in dev.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)] if dev.is_dir() else []
    if nodes:
        return len(nodes)
    listed = root / "proc/driver/nvidia/gpus"
    if listed.is_dir():
        return len(list(listed.iterdir()))
    tool = shutil.which("nvidia-smi", path=environ.get("PATH"))  # the only source under WSL
    return _count_by_smi(tool) if tool and root == Path("/") else 0


def _count_by_smi(tool: str) -> int:
    try:
        found = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in found.stdout.splitlines()) if found.returncode == 0 else 0


def _count_amd(root: Path) -> int:
    """AMD GPUs: nodes of the kfd topology that have SIMD units (CPU nodes have none)."""
    if not (root / "dev/kfd").exists():
        return 0
    count = 0
    for properties in (root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties"):
        try:
            simd = re.search(r"^simd_count (\d+)", properties.read_text(), re.MULTILINE)
        except OSError:  # the node of a GPU that this container may not use
            continue
        count += bool(simd and int(simd[1]))
    return count
