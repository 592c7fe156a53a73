"""Mistakes with streams, made on purpose on the accelerator of threads: prints by name how many seeds showed each.

A line ends with how many seeds showed something where nothing was wrong, which must be 0.
"""

from __future__ import annotations

import json
import os
import sys

import threads_device
import torch

SEEDS = range(1, 25)
NUMEL = 1000


def unordered(right: bool) -> bool:
    """Another stream's result is used without waiting for it."""
    side, here = torch.threads.Stream(), torch.threads.current_stream()
    x = torch.ones(NUMEL, device="threads")
    side.wait_stream(here)
    with side:
        y = x * 2
    if right:
        here.wait_stream(side)
    return bool((y + 1).sum().item() != 3 * NUMEL)


def freed_early(right: bool) -> bool:
    """A tensor is freed while another stream still reads it."""
    side, here = torch.threads.Stream(), torch.threads.current_stream()
    x = torch.ones(NUMEL, device="threads")
    side.wait_stream(here)
    with side:
        y = x * 2
    if right:
        x.record_stream(side)
    del x
    torch.zeros(NUMEL, device="threads")  # its memory's next owner
    here.wait_stream(side)
    return bool(y.sum().item() != 2 * NUMEL)


def read_early(right: bool) -> bool:
    """The host reads a pinned copy that has not arrived."""
    x = torch.ones(NUMEL, device="threads")
    host = torch.zeros(NUMEL, pin_memory=True)
    host.copy_(x * 3, non_blocking=True)
    if right:
        torch.threads.synchronize()
    return bool(host.sum().item() != 3 * NUMEL)


def written_early(right: bool) -> bool:
    """The host writes to pinned memory that is still to be copied."""
    host = torch.ones(NUMEL).pin_memory()
    x = host.to("threads", non_blocking=True)
    if right:
        torch.threads.synchronize()
    host.fill_(7)
    return bool(x.sum().item() != NUMEL)


def main() -> None:
    native = threads_device.use()
    for mistake in (unordered, freed_early, read_early, written_early):
        shown = dict.fromkeys((False, True), 0)
        for seed in SEEDS:
            for right in shown:
                native.seed(seed)
                shown[right] += mistake(right)
        print(json.dumps({"mistake": mistake.__name__, "shown": shown[False], "wrongly": shown[True]}), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # the device's own thread may want Python's lock, which ends with the interpreter
