"""The Trainer of transformers: train, save, resume from its checkpoint, save and reload the model."""

from __future__ import annotations

from common import BATCH, JOB, LEARNING_RATE, Clock, Tokens, engine_config, gpt2, meet, report


def main() -> None:
    """Train `steps`, or go on from the checkpoint of an earlier job."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    losses, clock = [], Clock()

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                losses.append(logs["loss"])

        def on_step_end(self, args, state, control, **kwargs):
            clock.step()

    config = (
        None
        if JOB["engine"] == "none"
        else engine_config(
            train_micro_batch_size_per_gpu="auto",
            gradient_accumulation_steps="auto",
            gradient_clipping="auto",
            optimizer={
                "type": "AdamW",
                "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
            },
            scheduler={
                "type": "WarmupDecayLR",
                "params": {
                    "total_num_steps": "auto",
                    "warmup_min_lr": "auto",
                    "warmup_max_lr": "auto",
                    "warmup_num_steps": "auto",
                    "warmup_type": "linear",
                },
            },
        )
        if JOB.get("ds_optimizer")
        else engine_config(
            gradient_clipping="auto",
            gradient_accumulation_steps="auto",
            train_micro_batch_size_per_gpu="auto",
            zero_allow_untested_optimizer=True,
        )
    )
    args = TrainingArguments(
        output_dir=JOB["dir"],
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=JOB.get("accumulation", 1),
        max_steps=JOB["steps"],
        learning_rate=LEARNING_RATE,
        warmup_steps=2,
        lr_scheduler_type="linear",
        logging_steps=1,
        save_steps=JOB.get("save_steps", 1000),
        save_strategy="steps" if JOB.get("save_steps") else "no",
        **meet(),
        deepspeed=config,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=3,
        data_seed=7,
    )
    trainer = Trainer(model=gpt2(), args=args, train_dataset=Tokens(), callbacks=[Watch()])
    trainer.train(resume_from_checkpoint=JOB.get("resume"))
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    if JOB.get("save_model"):
        trainer.save_model(JOB["save_model"])
    report(trainer.model_wrapped, clock, losses=losses, norms=norms)


main()
