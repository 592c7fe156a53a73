"""Megatron core's own groups and layers: its `parallel_state` as the mpu, tensor parallelism x data parallelism."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import distributed
from tensor_parallel import HIDDEN, WIDTH, Mlp, piece_of, whole_model
from test_mpu import Unsharded, assert_trained_alike, config, take_step

import deepspeedlite
from deepspeedlite.parallel.mpu import groups_of
from deepspeedlite.runtime.errors import DistributedError
from deepspeedlite.utils import groups, safe_get_full_fp32_param, safe_get_full_optimizer_state

pytest.importorskip("megatron.core", reason="needs megatron-core: make test-clients makes an environment that has it")
pytestmark = [pytest.mark.clients, pytest.mark.slow]


class MegatronMlp(Mlp):
    """The MLP of Megatron's layers, which bring their all-reduces and marks."""

    def __init__(self, state) -> None:
        from megatron.core.model_parallel_config import ModelParallelConfig
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

        super().__init__()
        size, rank = state.get_tensor_model_parallel_world_size(), state.get_tensor_model_parallel_rank()
        made = ModelParallelConfig(tensor_model_parallel_size=size, use_cpu_initialization=True)
        how = {"config": made, "init_method": torch.nn.init.zeros_}
        self.up = ColumnParallelLinear(WIDTH, HIDDEN, gather_output=False, **how)
        self.down = RowParallelLinear(HIDDEN, WIDTH, bias=False, input_is_parallel=True, skip_bias_add=False, **how)
        whole = dict(whole_model().named_parameters())
        with torch.no_grad():
            for name, param in self.named_parameters():
                param.copy_(piece_of(name, whole[name], rank, size))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        up, _ = self.up(self.norm(x))
        down, _ = self.down(F.gelu(up))
        return (self.head(x + down + self.bias) - y).square().mean()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(4, timeout_s=200)
def test_its_layers_train_as_the_unsharded_model(tmp_path, stage):
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    try:
        grid = SimpleNamespace(size=2, rank=parallel_state.get_tensor_model_parallel_rank())
        settings = config(
            stage, optimizer={"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}}
        )

        def start():
            return deepspeedlite.initialize(model=MegatronMlp(parallel_state), config=settings, mpu=parallel_state)[0]

        engine, reference = start(), Unsharded(None)
        for step in range(4):
            loss, norm = reference.step(step, 1, 2)
            assert take_step(engine, step) == pytest.approx(loss, rel=2e-6)
            assert engine.get_global_grad_norm() == pytest.approx(norm, rel=2e-6)
        assert_trained_alike(engine, reference, grid, 2e-6)
        engine.save_checkpoint(tmp_path)
        resumed = start()
        resumed.load_checkpoint(tmp_path)
        for ours, saved in zip(resumed.module.parameters(), engine.module.parameters(), strict=True):
            assert torch.equal(safe_get_full_fp32_param(ours), safe_get_full_fp32_param(saved))
            buffers = [safe_get_full_optimizer_state(param, "momentum_buffer") for param in (ours, saved)]
            assert torch.equal(*buffers)
    finally:
        groups.initialize()
        parallel_state.destroy_model_parallel()


@distributed(4, timeout_s=200)
def test_its_groups_are_understood_in_every_arrangement():
    from megatron.core import parallel_state

    rank = dist.get_rank()
    expected = {(1, 1): ([0, 1, 2, 3], [rank], [rank]), (4, 1): ([rank], [0, 1, 2, 3], [0, 1, 2, 3])}
    pair = [rank // 2 * 2, rank // 2 * 2 + 1]
    expected[1, 2] = pair, [rank % 2, rank % 2 + 2], [rank]
    expected[2, 2] = [rank], [0, 1, 2, 3], pair
    for (tensor, stages), ranks in expected.items():
        parallel_state.initialize_model_parallel(tensor, stages)
        group, replica = groups_of(parallel_state)
        assert (group.ranks, replica.group.ranks, replica.tensor.ranks) == ranks
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(1, context_parallel_size=2)
    with pytest.raises(DistributedError, match=r"do not make up the world of 4 ranks.*context"):
        groups_of(parallel_state)
    parallel_state.destroy_model_parallel()
