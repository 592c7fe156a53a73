"""A loop of one's own with Lightning Fabric: set up, backward, clip, save, load."""

from __future__ import annotations

import lightning.fabric.strategies.deepspeed as strategy_module
import torch
from common import BATCH, JOB, LEARNING_RATE, RANK, Clock, Tokens, engine_config, report, tiny
from lightning.fabric import Fabric
from lightning.fabric.accelerators import CPUAccelerator
from lightning.fabric.strategies import DDPStrategy, DeepSpeedStrategy


class OnCpu(DeepSpeedStrategy):
    """Without Lightning's demand for GPUs and their numbers, which is about nothing that is tested here."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", RANK)  # DeepSpeed compares the number

    def setup_environment(self) -> None:
        assert isinstance(self.accelerator, CPUAccelerator)
        strategy_module._validate_device_index_selection = lambda devices: None
        DDPStrategy.setup_environment(self)


def main() -> None:
    """Train `steps`; save after `save_at`, or go on from there."""
    clock, config = Clock(), engine_config(zero_allow_untested_optimizer=True)
    strategy = "ddp" if JOB["engine"] == "none" else OnCpu(config=config, process_group_backend="gloo")
    precision = "bf16-true" if JOB.get("bf16") else "32-true"
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, precision=precision)
    fabric.launch()
    with fabric.init_module():
        model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(Tokens(), batch_size=BATCH, shuffle=False))
    losses, batches = [], list(loader)
    start = 0
    if JOB.get("resume"):
        rest = fabric.load(JOB["resume"], {"model": model, "optimizer": optimizer})
        start = rest["step"]
    for step in range(start, JOB["steps"]):
        loss = model(**batches[step])
        fabric.backward(loss)
        if JOB["engine"] == "none":
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_reduce(loss.detach()).item())
        clock.step()
        if step + 1 == JOB.get("save_at") and JOB.get("save"):
            fabric.save(JOB["save"], {"model": model, "optimizer": optimizer, "step": step + 1})
    report(model, clock, losses=losses)


main()
