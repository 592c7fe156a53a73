"""Lightning's Trainer: fit, checkpoint, fit again from it, and validate."""

from __future__ import annotations

import lightning
import lightning.pytorch.strategies.deepspeed as strategy_module
import torch
from common import BATCH, JOB, LEARNING_RATE, RANK, Clock, Tokens, engine_config, report, tiny
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.ddp import DDPStrategy

losses, clock = [], Clock()


class OnCpu(DeepSpeedStrategy):
    """Without Lightning's demand for GPUs and their numbers, which is about nothing that is tested here."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", RANK)  # DeepSpeed compares the number

    def setup_environment(self) -> None:
        assert isinstance(self.accelerator, CPUAccelerator)
        strategy_module._validate_device_index_selection = lambda devices: None
        DDPStrategy.setup_environment(self)


class Module(lightning.LightningModule):
    """The model as a LightningModule, built where Lightning builds sharded models."""

    def __init__(self) -> None:
        super().__init__()
        self.model = None if JOB["stage"] == 3 and JOB["engine"] != "none" else tiny()

    def configure_model(self) -> None:
        self.model = self.model or tiny()

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = self.model(**batch)
        losses.append(self.all_gather(loss.detach()).mean().item())
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.log("validated", self.model(**batch), sync_dist=True)

    def on_train_batch_end(self, *_: object) -> None:
        clock.step()

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Fit `steps`; with `save_at`, checkpoint there; with `resume`, go on from there."""
    config = engine_config(zero_allow_untested_optimizer=True)
    config.pop("gradient_clipping")
    strategy = "ddp" if JOB["engine"] == "none" else OnCpu(config=config, process_group_backend="gloo")
    more = {"gradient_clip_val": 1.0}
    save_at = JOB.get("save_at")
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=JOB["steps"],
        limit_train_batches=JOB["steps"] // 2,  # two epochs: Lightning resumes where one begins
        precision="bf16-true" if JOB.get("bf16") else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=True,
        limit_val_batches=0,
        callbacks=[Save(save_at)] if save_at and JOB.get("save") else [],
        **more,
    )
    loader = torch.utils.data.DataLoader(Tokens(), batch_size=BATCH, shuffle=False)
    module = Module()
    trainer.fit(module, loader, ckpt_path=JOB.get("resume"))
    report(trainer.strategy.model, clock, losses=losses, rank=RANK)


class Save(lightning.Callback):
    """Saves a checkpoint after the epoch that ends with a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_epoch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(JOB["save"])


main()
