"""TRL's supervised fine-tuning with a generation in the middle of training, DPO, and GRPO."""

from __future__ import annotations

from typing import Any

import torch
from common import BATCH, JOB, LEARNING_RATE, LENGTH, VOCABULARY, Clock, Tokens, engine_config, gpt2, meet, report


def tokenizer() -> object:
    """A word for every token, behind the two special ones.

    Those have names that no word begins with: a special token is found inside words too, and would split them.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    names = ["<end>", "<pad>", *(f"w{i}" for i in range(VOCABULARY - 2))]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<end>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<end>")


def text(row: Any) -> str:
    """A word for each token."""
    return " ".join(f"w{int(i) % (VOCABULARY - 2)}" for i in row)


def trainer_for(task: str, common: dict[str, Any], callbacks: list[Any]) -> Any:
    """TRL's own for the job's task, with its data; `common` are the arguments that all of them take."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    rows = Tokens(64).ids
    parts = {"model": gpt2(pad_token_id=1), "processing_class": tokenizer(), "callbacks": callbacks}
    if task == "sft":
        more = {"gradient_checkpointing": JOB.get("gradient_checkpointing", False), "max_length": LENGTH}
        data = Dataset.from_list([{"text": text(row)} for row in rows])
        return SFTTrainer(args=SFTConfig(**common, **more), train_dataset=data, **parts)
    half = LENGTH // 2
    prompts = [{"prompt": text(row[:half])} for row in rows]
    if task == "dpo":
        answers = [{"chosen": text(row[half:]), "rejected": text(row[half:].flip(0))} for row in rows]
        data = Dataset.from_list([prompt | answer for prompt, answer in zip(prompts, answers)])
        return DPOTrainer(args=DPOConfig(**common, max_length=LENGTH), train_dataset=data, **parts)
    more = {"num_generations": 2, "max_completion_length": 4, "gradient_checkpointing": False}
    args = GRPOConfig(**common, **more)
    return GRPOTrainer(args=args, train_dataset=Dataset.from_list(prompts), reward_funcs=share_of_even, **parts)


def share_of_even(completions: list[str], **_: Any) -> list[float]:
    """Of a completion's words."""
    return [sum(word[-1] in "02468" for word in each.split()) / 4 for each in completions]


def main() -> None:
    """Train `steps`; between them the supervised training generates."""
    from transformers import TrainerCallback
    from trl.models.utils import unwrap_model_for_generation

    clock, generated, task = Clock(), [], JOB.get("task", "sft")

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.step()
            if state.global_step == JOB["steps"] // 2 and task == "sft":
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
    common: dict[str, Any] = {
        "output_dir": JOB["dir"],
        "per_device_train_batch_size": BATCH,
        "max_steps": JOB["steps"],
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        **meet(),
        "deepspeed": config,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
        "data_seed": 7,
    }
    trainer = trainer_for(task, common, [Watch()])
    trainer.train()
    # GRPO's loss is nothing but rounding before its model has moved: the entropy tells as much of the weights.
    what = "entropy" if task == "grpo" else "loss"
    losses = [row[what] for row in trainer.state.log_history if what in row]
    report(trainer.model_wrapped, clock, losses=losses, generated=generated)


main()
