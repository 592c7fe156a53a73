"""A LoRA adapter of PEFT on a frozen model, trained by transformers' Trainer; the adapter is saved and loaded again."""

from __future__ import annotations

import torch
from common import BATCH, JOB, LEARNING_RATE, RANK, Clock, Tokens, engine_config, gpt2, meet, report


def main() -> None:
    """Train `steps`, going on from a checkpoint if one is named; save the adapter where the job says."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    clock = Clock()

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.step()

    config = None
    if JOB["engine"] != "none":
        config = engine_config(
            gradient_clipping="auto", gradient_accumulation_steps="auto", zero_allow_untested_optimizer=True
        )
    args = TrainingArguments(
        output_dir=JOB["dir"],
        per_device_train_batch_size=BATCH,
        max_steps=JOB["steps"],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
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
    base = gpt2()
    torch.manual_seed(5)  # the adapter's values are drawn, and a model that was loaded leaves no seed behind
    model = get_peft_model(base, LoraConfig(r=4, lora_dropout=0.0, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    trainer = Trainer(model=model, args=args, train_dataset=Tokens(), callbacks=[Watch()])
    trainer.train(resume_from_checkpoint=JOB.get("resume"))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    reloaded = None
    if JOB.get("save_model"):
        trainer.save_model(JOB["save_model"])
        if RANK == 0:
            again = PeftModel.from_pretrained(gpt2(), JOB["save_model"])
            reloaded = sum(v.double().abs().sum().item() for n, v in again.named_parameters() if "lora" in n)
    report(trainer.model_wrapped, clock, losses=losses, reloaded=reloaded)


main()
