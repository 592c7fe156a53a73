"""Functions and classes that scripts import from DeepSpeed's modules; test_names_peer.py asks DeepSpeed's own too."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import distributed

import deepspeedlite
from deepspeedlite.launcher.options import LaunchOptions
from deepspeedlite.launcher.plan import exported
from deepspeedlite.runtime.errors import DistributedError


@pytest.mark.parametrize("include, exclude", [("w1", "w2"), ("w9", ""), ("w1:7", ""), ("", "w1@w2")])
def test_wrong_choices_are_value_errors_and_launch_errors(include: str, exclude: str) -> None:
    runner = deepspeedlite.launcher.runner
    with pytest.raises(ValueError) as raised:
        runner.parse_inclusion_exclusion({"w1": 2, "w2": 4}, include, exclude)
    assert isinstance(raised.value, deepspeedlite.errors.LaunchError)


def test_appending_to_the_exported_variables_has_an_effect(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """As gpt-neox does before it calls the launcher's main."""
    envs = deepspeedlite.launcher.runner.EXPORT_ENVS
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    options = LaunchOptions()
    environ = {"MY_OWN_X": "1", "NCCL_DEBUG": "INFO"}
    assert "MY_OWN_X" not in exported(options, environ)
    envs.append("MY_OWN")
    try:
        assert exported(options, environ) == {"MY_OWN_X": "1", "NCCL_DEBUG": "INFO"}
    finally:
        envs.remove("MY_OWN")


@distributed([1, 3])
def test_partitioned_tensor(world_size: int) -> None:
    """Each rank keeps a piece; all have the whole again, also from what crosses a pipeline; other shapes too."""
    from deepspeedlite.runtime.utils import PartitionedTensor

    for shape in ((2, 4), (1,), (3, 5, 2)):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        piece = PartitionedTensor(tensor, dist.group.WORLD)
        assert piece.data().numel() in (tensor.numel() // world_size, tensor.numel() // world_size + 1)
        again = PartitionedTensor.from_meta(piece.to_meta(), piece.data(), dist.group.WORLD)
        for one in (piece, again):
            assert torch.equal(one.full(), tensor) and one.full_size() == list(shape)


@distributed(2)
def test_torch_backend() -> None:
    """An object with the functions of comm, made before or after the start-up."""
    from deepspeedlite.comm import TorchBackend

    backend = TorchBackend("gloo", None, None)
    assert backend.is_initialized() and (backend.get_rank(), backend.get_world_size()) == (dist.get_rank(), 2)
    x = torch.ones(2)
    backend.all_reduce(x)
    assert x.tolist() == [2.0, 2.0] and backend.get_backend() == "gloo" and backend.has_all_gather_into_tensor()
    with pytest.raises(AttributeError):
        backend.no_such_collective()


def test_mpi_discovery(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of rank 2 of 4, the second one of its host; without mpi4py it is said what to install."""
    import deepspeedlite.compat.comm_backend as module

    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(DistributedError, match="mpi4py"):
        deepspeedlite.comm.mpi_discovery()
    world = SimpleNamespace(
        Get_rank=lambda: 2,
        Get_size=lambda: 4,
        allgather=lambda name: ["other", name, name, "other"],
        bcast=lambda value, root: "10.0.0.1",
    )
    fake = ModuleType("mpi4py")
    fake.MPI = SimpleNamespace(COMM_WORLD=world)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mpi4py", fake)
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in variables:
        monkeypatch.setenv(name, "before")
    module.mpi_discovery(distributed_port=1234, verbose=False)
    assert [os.environ[name] for name in variables] == ["2", "4", "1", "10.0.0.1", "1234"]


def test_monitors_one_by_one(tmp_path: Any) -> None:
    """A section of the configuration, or an object like one; on no rank but 0, and not where it is off."""
    from deepspeedlite.monitor.csv_monitor import csvMonitor
    from deepspeedlite.monitor.tensorboard import TensorBoardMonitor

    for enabled in (True, False):
        section = SimpleNamespace(enabled=enabled, output_path=str(tmp_path / str(enabled)), job_name="run")
        monitor = csvMonitor(section)
        monitor.write_events([("Train/loss", torch.tensor(1.5), 10)])
        assert (monitor.enabled, monitor.job_name) == (enabled, "run")
    assert (tmp_path / "True" / "run" / "Train_loss.csv").read_text().split() == ["step,loss", "10,1.5"]
    assert not (tmp_path / "False").exists()
    pytest.importorskip("tensorboard")
    board = TensorBoardMonitor(SimpleNamespace(enabled=True, output_path=str(tmp_path), job_name="board"))
    board.write_events([("Train/loss", 1.5, 10)], flush=True)
    assert list((tmp_path / "board").iterdir())


def test_autocast_if_enabled() -> None:
    from deepspeedlite.runtime.engine import autocast_if_enabled

    for dtype, expected in ((torch.bfloat16, torch.bfloat16), (None, torch.float32)):
        engine = SimpleNamespace(torch_autocast_dtype=lambda dtype=dtype: dtype, device=torch.device("cpu"))
        with autocast_if_enabled(engine):
            assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(3, 2)).dtype == expected


def test_ops_by_name() -> None:
    """Compatible are those that can be had; each has its builder under its name."""
    from deepspeedlite.ops.op_builder.all_ops import ALL_OPS

    from deepspeedlite.ops import __compatible_ops__

    assert __compatible_ops__.keys() == ALL_OPS.keys() and "cpu_adam" in ALL_OPS
    assert __compatible_ops__["transformer"] is __compatible_ops__["cpu_adam"]
    for name, builder in ALL_OPS.items():
        assert builder.name == name and builder.is_compatible() == __compatible_ops__[name]


def test_the_schedule_is_the_one_that_trains() -> None:
    """The passes of TrainSchedule are those of our 1F1B, and buffers are as many as micro-batches under way."""
    from deepspeedlite.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule

    from deepspeedlite.parallel.pipe.schedule import one_forward_one_backward

    for stage in range(4):
        schedule = TrainSchedule(micro_batches=6, stages=4, stage_id=stage)
        passes = [one for step in schedule for one in step if isinstance(one, (ForwardPass, BackwardPass))]
        order = one_forward_one_backward(4, stage, 6)
        kinds = ["forward" if isinstance(one, ForwardPass) else "backward" for one in passes]
        assert kinds == [one.kind for one in order]
        buffers = schedule.num_pipe_buffers()
        assert buffers == max(2, 4 - stage) and [one.buffer_id for one in passes] == [
            one.micro_batch % buffers for one in order
        ]
        assert len(list(schedule)) == len(list(schedule)) == len(order)  # it begins anew


def test_builders_of_absent_ops_say_that_nothing_is_compatible():
    """DeepNVMe's scripts ask `GDSBuilder().is_compatible()` before they use one."""
    from deepspeedlite.compat.op_builders import ABSENT_BUILDERS
    from deepspeedlite.runtime.errors import AbsentError

    builder = ABSENT_BUILDERS["GDSBuilder"]()
    assert builder.is_compatible() is False
    with pytest.raises(AbsentError, match="GPUDirect Storage is not in this release"):
        builder.load()
