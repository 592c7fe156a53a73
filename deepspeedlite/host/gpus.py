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
_DEVICE = re.compile(r"\d+|(GPU|MIG)-[\w./-]+")
_NONE = ("nodevfiles", "none")  # the first is Slurm's, where a job has no GPU
_VARIABLES = {
    "nvidia": ("CUDA_VISIBLE_DEVICES",),
    # ROCm reads all three: ROCR_ filters below HIP, and HIP takes CUDA_'s name as a synonym of its own.
    "amd": ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
}


@dataclass(frozen=True)
class Devices:
    """The devices that ranks may use, as the values their visible-devices variable takes."""

    vendor: str  # "nvidia", "amd" or "cpu"
    ids: Sequence[str] = ()
    variable: str = "CUDA_VISIBLE_DEVICES"
    value: str | None = None  # what the variable holds; None: it is not what decided

    def pick(self, slots: Sequence[int], asked: str) -> dict[str, str]:
        """The variable that shows a rank these devices, by their place in `ids`; nothing where there are no devices.

        Raises:
            LaunchError: what was `asked` (an option, a file) names a slot beyond the devices there are.
        """
        if not self.ids:
            return {}
        if beyond := [slot for slot in slots if slot >= len(self.ids)]:
            raise LaunchError(
                f"{asked} asks for slot {beyond[0]}, but {self.source}; ask for fewer, or set DS_ACCELERATOR=cpu for "
                "CPU ranks"
            )
        return {self.variable: ",".join(self.ids[slot] for slot in slots)}

    @property
    def source(self) -> str:
        """Where they come from, and how many slots that makes."""
        count = len(self.ids)
        slots = f"slots 0 to {count - 1}" if count > 1 else "slot 0"
        if self.value is None:
            return f"this machine has {count} ({slots})" if count else "this machine has no GPU"
        return f"{self.variable}={self.value} leaves {count}" + (f" ({slots} of it)" if count else "")

    def used(self, slots: Sequence[int]) -> str:
        """One line: what ranks with these slots run on."""
        count = len(slots)
        ranks = f"starting {count} CPU rank{'s' * (count > 1)}" + " (--num_gpus N starts N of them)" * (count == 1)
        if not self.ids:
            return f"{'no GPU is visible' if self.value is None else f'{self.variable}={self.value}'}: {ranks}"
        names = ",".join(self.ids[slot] for slot in slots)
        if self.value is None:
            return f"{count} of {len(self.ids)} GPUs are used ({names})"
        places = "" if list(slots) == list(range(count)) else f", slots {','.join(map(str, slots))} of it"
        return f"{self.variable}={self.value} is respected: ranks use {names}{places}"


def find_devices(environ: Mapping[str, str], root: Path = Path("/")) -> Devices:
    """Every device that a rank with this environment would see. No devices: vendor "cpu".

    Raises:
        LaunchError: a visible-devices variable names a device twice, one that is not there, or what is no device.
    """
    if environ.get("DS_ACCELERATOR", "").strip().lower() == "cpu":
        return Devices("cpu", variable="DS_ACCELERATOR", value="cpu")
    vendor, count = "nvidia", _count_nvidia(environ, root)
    if not count:
        vendor, count = "amd", _count_amd(root)
    if not count:
        return Devices("cpu")
    for variable in _VARIABLES[vendor]:
        if variable in environ:
            ids = parse_visible(variable, environ[variable], count)
            return Devices(vendor if ids else "cpu", ids, variable, environ[variable])
    return Devices(vendor, tuple(str(index) for index in range(count)))


def parse_visible(variable: str, text: str, count: int) -> tuple[str, ...]:
    """The list a visible-devices variable holds. As in CUDA, `-1` or an empty entry ends it.

    Raises:
        LaunchError: a device twice (CUDA would then show none), an index beyond the `count` devices present, or a word
            in which CUDA sees no device.
    """
    ids: list[str] = []
    if text.strip().lower() in _NONE:
        return ()
    for entry in (part.strip() for part in text.split(",")):
        if not entry or entry.startswith("-"):
            break
        if entry in ids:
            raise LaunchError(f"{variable}={text} names device {entry} twice; list each device once")
        if entry.isdecimal() and int(entry) >= count:
            known = f"device{'s 0 to' * (count > 1)} {count - 1}"
            raise LaunchError(
                f"{variable}={text} names device {entry}, but this machine has {count} ({known}); correct or unset it"
            )
        if not _DEVICE.fullmatch(entry):
            raise LaunchError(
                f"{variable}={text}: {entry!r} is no device, and hides all of them; write numbers (0,1,2) or UUIDs "
                "(GPU-..., MIG-...), nothing for none, and unset it for all"
            )
        ids.append(entry)
    return tuple(ids)


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
