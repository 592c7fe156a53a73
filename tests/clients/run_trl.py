"""Supervised fine-tuning with TRL, then a generation in the middle of training and some more steps."""

from __future__ import annotations

import torch
from common import BATCH, JOB, LEARNING_RATE, LENGTH, VOCABULARY, Clock, Tokens, engine_config, gpt2, meet, report


def tokenizer() -> object:
    """A word for every token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w0", unk_token="w0")


def main() -> None:
    """Train `steps`, generate, and train as many more."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl.models.utils import unwrap_model_for_generation

    clock, generated = Clock(), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.step()
            if state.global_step == JOB["steps"] // 2:
                with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model, torch.no_grad():
                    prompt = torch.tensor([[3, 4, 5]])
                    greedy = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
                    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)
                    generated.extend(out[0].tolist())

    config = None
    if JOB["engine"] != "none":
        config = engine_config(
            gradient_clipping="auto", gradient_accumulation_steps="auto", zero_allow_untested_optimizer=True
        )
    args = SFTConfig(
        output_dir=JOB["dir"],
        per_device_train_batch_size=BATCH,
        max_steps=JOB["steps"],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=JOB.get("gradient_checkpointing", False),
        max_length=LENGTH,
        **meet(),
        deepspeed=config,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=3,
        data_seed=7,
    )
    words = [{"text": " ".join(f"w{int(i)}" for i in row)} for row in Tokens(64).ids]
    trainer = SFTTrainer(
        model=gpt2(pad_token_id=1),
        args=args,
        train_dataset=Dataset.from_list(words),
        processing_class=tokenizer(),
        callbacks=[Watch()],
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    report(trainer.model_wrapped, clock, losses=losses, generated=generated)


main()
