"""LLaMA-Factory's own training, by the configurations that it ships: supervised and DPO, of all weights or of a LoRA.

It saves and resumes by its own keys, where the job says so.

The configurations are what its web UI writes for each stage, and are handed on unchanged. Stage 0 has none: its own
data parallelism runs instead.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from common import BATCH, JOB, LAYERS, RANK, SIZE, VOCABULARY, Clock, meet, report

WORDS = [f"w{i}" for i in range(60)]


def make_model(folder: Path) -> None:
    """A Llama with random values and a tokenizer of whole words, as a folder of Hugging Face's."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, "Human", "Assistant", ":"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    width = SIZE.get("width", 64)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 4, "vocab_size": max(128, VOCABULARY)}
    config = LlamaConfig(num_key_value_heads=2, max_position_embeddings=128, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def make_data(folder: Path) -> None:
    """Instructions with one answer, and with a better and a worse one."""
    draw = random.Random(1)
    said = [" ".join(draw.choices(WORDS, k=8)) for _ in range(64)]
    plain = [{"instruction": each, "input": "", "output": each} for each in said]
    pairs = [{"instruction": each, "input": "", "chosen": each, "rejected": " ".join(WORDS[:5])} for each in said]
    (folder / "plain.json").write_text(json.dumps(plain))
    (folder / "pairs.json").write_text(json.dumps(pairs))
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    listed = {
        "plain": {"file_name": "plain.json"},
        "pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns},
    }
    (folder / "dataset_info.json").write_text(json.dumps(listed))


def prepare() -> Path:
    """The folder with model and data, made by rank 0."""
    folder = Path(JOB["dir"], "prepared")
    if RANK == 0 and not folder.is_dir():
        making = Path(JOB["dir"], "making")
        making.mkdir(exist_ok=True)
        make_model(making)
        make_data(making)
        making.rename(folder)
    while not folder.is_dir():
        time.sleep(0.05)
    return folder


def shipped_config(stage: int) -> str:
    """The file that LLaMA-Factory writes for a stage."""
    from llamafactory.webui import common

    common.DEFAULT_CACHE_DIR = str(Path(JOB["out"], f"configs{RANK}"))
    common.create_ds_config()
    return str(Path(common.DEFAULT_CACHE_DIR, f"ds_z{stage}{JOB.get('variant', '')}_config.json"))


def main() -> None:
    """Train `steps` of what the job names."""
    folder = prepare()
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    # It imports this for data with sound, and its builds on PyPI want CUDA libraries.
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)
    meet()
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    clock, losses, seen = Clock(), [], []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                losses.append(logs["loss"])

        def on_step_end(self, args, state, control, **kwargs):
            clock.step()

        def on_train_end(self, args, state, control, model=None, **kwargs):
            # A callback gets the module alone; the engine around it is the Trainer's own. DPO's reference has one, too.
            engines = [each for each in gc.get_objects() if type(each).__name__ == "DeepSpeedEngine"]
            seen.append(next((each for each in engines if each.module is model), model))

    stage = JOB["stage"]
    trained: dict[str, Any] = {"finetuning_type": JOB.get("tuning", "full"), "stage": JOB.get("task", "sft")}
    trained |= {"pref_beta": 0.1, "pref_loss": "sigmoid"} if JOB.get("task") == "dpo" else {}
    trained |= {"lora_rank": 4, "lora_target": "all", "lora_dropout": 0.0} if JOB.get("tuning") == "lora" else {}
    trained |= {"deepspeed": shipped_config(stage)} if JOB["engine"] != "none" else {}
    saving: dict[str, Any] = {"save_strategy": "no"}
    if JOB.get("save_steps"):
        saving = {"save_steps": JOB["save_steps"], "save_only_model": JOB.get("save_only_model", False)}
    if JOB.get("resume"):
        saving["resume_from_checkpoint"] = JOB["resume"]
    run_exp(
        {
            **trained,
            "model_name_or_path": str(folder),
            "do_train": True,
            "dataset": "pairs" if JOB.get("task") == "dpo" else "plain",
            "dataset_dir": str(folder),
            "template": "default",
            "cutoff_len": 64,
            "output_dir": str(Path(JOB["dir"], "saved")),
            "overwrite_cache": True,
            "per_device_train_batch_size": BATCH,
            "max_steps": JOB["steps"],
            "learning_rate": 1e-3,
            "logging_steps": 1,
            **saving,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "bf16": JOB.get("bf16", False),
            "use_cpu": True,
            "seed": 3,
            "data_seed": 7,
        },
        callbacks=[Watch()],
    )
    report(seen[0], clock, losses=losses)


main()
