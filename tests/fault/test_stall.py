"""Ranks that take different paths get an error that says where each of them is, not a hang and not wrong values.

And long before that, those that wait say for whom: for ranks that are stopped, busy, in another collective, or gone.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import signal
import subprocess
import time
import weakref
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import distributed

import deepspeedlite
from deepspeedlite import comm
from deepspeedlite.comm import desync
from deepspeedlite.comm.desync import advice
from deepspeedlite.comm.registry import registry
from deepspeedlite.metrics import stall_watch
from deepspeedlite.runtime.errors import DistributedError
from deepspeedlite.runtime.log import logger

TIMEOUT_S = 4


class Branching(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, skipped):
        for index, block in enumerate(self.blocks):
            if index != skipped:
                x = torch.tanh(block(x))
        return x.sum()


@pytest.mark.slow
@distributed(world_size=2, init_process_group=False, env={"DS_ACCELERATOR": "cpu"})
def test_a_rank_that_skips_a_sharded_module(free_port):
    start(free_port)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_reuse_distance": 0,
        },
    }
    engine, *_ = deepspeedlite.initialize(model=Branching(), config=config)
    engine(torch.ones(1, 8), None)
    started_s = time.monotonic()
    with pytest.raises(DistributedError, match="do not meet") as caught:
        engine(torch.ones(1, 8), 2 if comm.get_rank() == 1 else None)
    assert time.monotonic() - started_s < TIMEOUT_S + 12
    said = str(caught.value)
    assert "rank 0 waits in all_gather_into_tensor of the values of blocks.2." in said, said
    assert "rank 1 waits in all_gather_into_tensor of the values of blocks.3." in said, said
    assert "set_z3_leaf_modules" in said


@pytest.mark.slow
@distributed(world_size=2, init_process_group=False, env={"DS_ACCELERATOR": "cpu"})
def test_a_rank_that_is_elsewhere(free_port):
    start(free_port)
    group = comm.Group()
    if group.rank == 1:
        time.sleep(TIMEOUT_S + 8)
        return
    with pytest.raises(DistributedError, match="rank 1 has not said where it is") as caught:
        group.all_reduce(torch.ones(3))
    assert "rank 0 waits in all_reduce of 3 elements" in str(caught.value)


def start(port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    deepspeedlite.init_distributed(verbose=False, timeout=timedelta(seconds=TIMEOUT_S))


# --- what is said while ranks wait ------------------------------------------------------------------------------------

NOTICE_S = 1.0
WATCHED = {"DS_ACCELERATOR": "cpu", stall_watch.VARIABLE: str(NOTICE_S)}


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What this rank warns of in the block."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def sleep_in_user_code(seconds: float) -> None:
    time.sleep(seconds)


@pytest.mark.parametrize("shared_memory", ["1", "0"])
@pytest.mark.slow
@distributed(2, env=WATCHED)
def test_a_rank_that_is_busy_elsewhere_is_said_to_be_while_the_other_waits(shared_memory):
    """With the place in its code, once and once again, over shared memory and over gloo; and training goes on."""
    os.environ["DEEPSPEEDLITE_SHARED_MEMORY"] = shared_memory
    deepspeedlite.init_distributed(verbose=False)
    group, values = comm.Group(), torch.ones(1 << 16)
    group.all_reduce(values, label="the gradients of a")
    with heard() as said:
        if group.rank == 1:
            sleep_in_user_code(4.5 * NOTICE_S)
        group.all_reduce(values, label="the gradients of b")
    if group.rank == 1:
        assert not said
        return
    assert len(said) == 2, said
    for text, least_s in zip(said, (1, 3)):
        seconds = re.match(r"rank 0 has waited (\d) s in all_reduce of the gradients of b, at ", text)
        assert seconds is not None and int(seconds[1]) >= least_s, text
        assert re.search(r"rank 1 waits in no collective, but is at sleep_in_user_code \(.*test_stall.py:\d+\)", text)
        assert text.endswith("its last collective was all_reduce of the gradients of a"), text
        assert "set_z3_leaf_modules" not in text


@pytest.mark.slow
@distributed(3, env=WATCHED)
def test_the_first_of_those_that_wait_speaks_for_all():
    """Here for a rank that is stopped, which cannot speak itself; ranks 0 and 2 wait for it."""
    deepspeedlite.init_distributed(verbose=False)
    group = comm.Group()
    group.all_reduce(torch.ones(1 << 16))
    with heard() as said:
        if group.rank == 1:
            waker = subprocess.Popen(["sh", "-c", f"sleep {2.5 * NOTICE_S}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
            waker.wait()
        group.all_reduce(torch.ones(1 << 16), label="the gradients of a")
    if group.rank != 0:
        assert not said
        return
    assert len(said) == 1, said
    assert re.search(r"\n  rank 1 is stopped \(process \d+ on .*SIGSTOP", said[0]), said
    assert "\n  rank 2 waits there too" in said[0], said


@pytest.mark.slow
@distributed(2, env=WATCHED)
def test_ranks_that_wait_in_different_collectives_are_told_apart():
    """One of them in torch's own. Advice about experts is given where parameters are gathered, and only there."""
    deepspeedlite.init_distributed(verbose=False)
    group = comm.Group()
    group.all_reduce(torch.ones(1 << 16))
    with heard() as said:
        if group.rank == 0:
            desync.LabelledWork(Late(2.5 * NOTICE_S), "all_gather of the values of a.weight", [0, 1]).wait()
        dist.barrier()
    other = "torch.distributed.barrier" if group.rank == 0 else "all_gather of the values of a.weight"
    assert len(said) == 1 and f"\n  rank {1 - group.rank} waits in {other}\n" in said[0], said
    assert said[0].splitlines()[-1].startswith("Every rank must run the same modules in the same order. Where"), said
    assert advice(["waits in all_reduce of b", "waits in broadcast of c"]).endswith("in the same order.")
    assert not advice(["waits in all_reduce of b", "is stopped"])


class Late:
    """A collective that takes long. As those of gloo it blocks without Python's lock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def wait(self) -> None:
        time.sleep(self.seconds)


class Slow(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(1.5 * NOTICE_S if index == 2 and dist.get_rank() == 1 else 0)
        return torch.ones(3)


@pytest.mark.parametrize("workers", [0, 1])
@distributed(2, env=WATCHED)
def test_a_loader_that_gives_nothing(workers):
    """Told by the rank that waits for it, and by those that wait for that rank."""
    deepspeedlite.init_distributed(verbose=False)
    group = comm.Group()
    with heard() as said:
        for batch in torch.utils.data.DataLoader(Slow(), num_workers=workers):
            group.all_reduce(batch, label="the loss")
    assert len(said) == 1, said
    if group.rank == 1:
        assert re.match(r"rank 1 has waited \d s in its DataLoader, for the next batch, at .*test_stall.py", said[0])
    else:
        assert (
            "in all_reduce of the loss, at" in said[0]
            and "\n  rank 1 waits in its DataLoader, for the next batch" in said[0]
        ), said


@pytest.mark.slow
@distributed(2, env=WATCHED)
def test_a_device_that_does_not_come_to_its_end():
    """As with NCCL, where `wait` returns at once and whoever needs a result waits. A device's answers are made up."""
    deepspeedlite.init_distributed(verbose=False)
    if dist.get_rank() == 1:
        dist.barrier()
        return
    watch = registry.watch
    watch._device = mock.Mock(is_accelerator=True, is_idle=False)
    watch._device.memory_stats.return_value = {"allocations": 7}
    with heard() as said:
        desync.LabelledWork(Late(0), "all_reduce of the gradients of a", [0, 1])
        sleep_in_user_code(2 * NOTICE_S)
    assert len(said) == 1 and "of which is all_reduce of the gradients of a, at sleep_in_user_code" in said[0], said
    assert "\n  rank 1 waits in torch.distributed.barrier" in said[0], said
    watch._device.is_idle = True
    with heard() as said:
        sleep_in_user_code(2 * NOTICE_S)
    assert not said
    dist.barrier()


@distributed(2, env=WATCHED)
def test_looking_keeps_nothing_that_training_holds():
    """Else it would live until the next garbage collection, which may be one in a DataLoader's forked worker."""
    deepspeedlite.init_distributed(verbose=False)

    def hold() -> weakref.ref:
        held = torch.nn.Linear(1, 1)
        sleep_in_user_code(NOTICE_S)  # several looks
        return weakref.ref(held)

    gc.collect()
    gc.disable()
    try:
        assert hold()() is None
    finally:
        gc.enable()
    dist.barrier()


@distributed(2, env=WATCHED)
def test_threads_of_a_lookout_do_not_outlive_its_world():
    """Though its store's file is gone. Nor do they live in a child of its process, which says nothing in their name."""
    deepspeedlite.init_distributed(verbose=False)
    watch = registry.watch
    deepspeedlite.init_distributed(verbose=False)
    assert registry.watch is watch and watch.is_alive()
    child = os.fork()
    if child == 0:
        os._exit(0 if registry.watch is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    board = watch.board
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    board._known = range(3)  # rank 2 never comes: there is always something to look up
    dist.barrier()
    Path(store.path).unlink(missing_ok=True)
    time.sleep(NOTICE_S / 3)
    dist.destroy_process_group()
    watch.join(NOTICE_S)
    board.join(5 * NOTICE_S)
    assert not watch.is_alive() and not board.is_alive() and registry.watch is None
