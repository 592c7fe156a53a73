"""One process of a phase: `python -m tools.gpu_check.worker JSON`. Rank 0 prints a line of JSON for each row."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

MARK = "gpu-check row: "


def main() -> None:
    """Do the phase that the first argument describes."""
    told = json.loads(sys.argv[1])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Whatever a library prints goes where errors go.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    use_device(told["device"], rank)
    settle(told["tiny"])
    from deepspeedlite.runtime.device import pick_device
    from tools.gpu_check.setting import Setting

    device = pick_device(rank)
    device.make_current()
    ends_s = time.monotonic() + told["limit_s"]
    setting = Setting(told["phase"], device, rank, ranks, told["tiny"], ends_s, Path(told["folder"]))
    module: Any = importlib.import_module(f"tools.gpu_check.{told['phase']}")
    give(module.rows(setting), out if rank == 0 else None)
    leave()


def use_device(name: str, rank: int) -> None:
    """`auto` is what the library picks by itself; `threads` the tests' accelerator; else a name of DS_ACCELERATOR."""
    if name == "threads":
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "accelerator"))
        import threads_device

        threads_device.use().seed(rank)
    if name != "auto":
        os.environ["DS_ACCELERATOR"] = name


def settle(tiny: bool) -> None:
    """Products of fp32 in fp32, and one thread where there is little to do."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if tiny:
        torch.set_num_threads(1)


def give(rows: Any, out: TextIO | None) -> None:
    """Write each row as it comes."""
    for row in rows:
        if out is not None:
            out.write(f"{MARK}{json.dumps(asdict(row), default=str)}\n")


def leave() -> None:
    """End, whatever still wants to be tidied: what was to be said is said, and a group's end may wait for others."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
