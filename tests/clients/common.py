"""What the client scripts share: how one is told what to do, a tiny model and its data, and what it reports.

A script is run by `drive.py`, one process a rank, with a job as JSON. It never says which `deepspeed` it runs on: the
stand-in, the real one, and none differ in the environment and in the job's `engine` alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

if os.environ.get("DSL_CLIENTS_PEER"):  # the real DeepSpeed, from another environment's packages
    sys.path.append(os.environ["DSL_CLIENTS_PEER"])

import torch

JOB: dict[str, Any] = json.loads(os.environ["DSL_CLIENTS_JOB"])
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
SIZE: dict[str, int] = JOB.get("size", {})  # a benchmark's is larger
VOCABULARY, LENGTH, BATCH = SIZE.get("vocabulary", 64), SIZE.get("length", 16), SIZE.get("batch", 4)
WIDTH, LAYERS, HEADS = SIZE.get("width", 32), SIZE.get("layers", 2), SIZE.get("heads", 2)
LEARNING_RATE = 1e-3 if SIZE else 1e-2
torch.set_num_threads(1)


def engine_config(**more: Any) -> dict[str, Any]:
    """The configuration of the job's stage, for DeepSpeed and for us alike."""
    stage = JOB["stage"]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1000,
    }
    if stage == 3:
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if JOB.get("bf16"):
        config["bf16"] = {"enabled": True}
    if JOB.get("auto"):  # all that transformers and Accelerate fill in, as their pages write it
        wanted = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"]
        config |= dict.fromkeys([*wanted, "gradient_clipping"], "auto")
        sizes = ["reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"]
        config["zero_optimization"] |= dict.fromkeys(sizes, "auto")
        config["bf16"] = {"enabled": "auto"}
    return {**more, **config} if JOB.get("auto") else {**config, **more}


def gpt2(**more: Any) -> Any:
    """A GPT-2, the same on every rank; loaded from the folder that the job names, if it names one."""
    if not JOB.get("pretrained"):
        return new_gpt2(**more)
    from transformers import AutoModelForCausalLM

    folder = Path(JOB["pretrained"])
    if RANK == 0 and not folder.is_dir():
        new_gpt2().save_pretrained(folder.with_suffix(".part"))
        folder.with_suffix(".part").rename(folder)
    while not folder.is_dir():
        time.sleep(0.05)
    return AutoModelForCausalLM.from_pretrained(folder, **more)


def new_gpt2(**more: Any) -> Any:
    """One with random values."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCABULARY}
    sizes["n_positions"] = max(LENGTH, 32)  # TRL generates past the length of a tiny training
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **drop, bos_token_id=0, eos_token_id=0, **more))


def meet() -> dict[str, Any]:
    """Arguments of transformers' TrainingArguments that train on CPU ranks, with or without DeepSpeed.

    Left to itself Accelerate finds no backend for CPU ranks of DeepSpeed, and every rank then thinks that it is alone.
    """
    if JOB["engine"] == "none":
        return {"use_cpu": True, "ddp_backend": "gloo", "bf16": JOB.get("bf16", False)}
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    assert PartialState(backend="gloo").num_processes == WORLD
    bf16 = JOB.get("bf16", False)  # for which transformers wants a GPU, or to hear that there is none
    return {"accelerator_config": {"use_configured_state": True}, "bf16": bf16, "use_cpu": bf16}


class Tiny(torch.nn.Module):
    """A language model of torch's own layers, whose values are made where the layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.LayerNorm(WIDTH),
                torch.nn.Linear(WIDTH, 4 * WIDTH),
                torch.nn.GELU(),
                torch.nn.Linear(4 * WIDTH, WIDTH),
            )
            for _ in range(LAYERS)
        )
        self.head = torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of predicting each token's next one."""
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        logits = self.head(hidden[:, :-1]).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def tiny() -> Tiny:
    """One, the same on every rank.

    In bf16 it is built in bf16: under zero.Init the real DeepSpeed draws values in that type whatever is asked for, and
    we as the layer does, which then casts. Lightning asks for nothing there.
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if JOB.get("bf16") else before)
    try:
        return Tiny()
    finally:
        torch.set_default_dtype(before)


class Tokens(torch.utils.data.Dataset):
    """Sequences of tokens, each following from its first."""

    def __init__(self, count: int = 256) -> None:
        start = torch.randint(0, VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(1))
        self.ids = (start + torch.arange(LENGTH) * (1 + start % 3)) % VOCABULARY

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def peak_rss_bytes() -> int:
    """The most memory that this process had so far; `ru_maxrss` would count its parent's before it was started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class Clock:
    """Times the training from its making on, its set-up with it, and the steps between the first two and the last."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.marks: list[float] = []

    def step(self) -> None:
        """One step is over."""
        self.marks.append(time.perf_counter())

    @property
    def step_ms(self) -> float:
        """The median step."""
        gaps = sorted(b - a for a, b in zip(self.marks, self.marks[1:]))
        return gaps[len(gaps) // 2] * 1e3 if gaps else 0.0

    @property
    def train_s(self) -> float:
        """From the beginning of its set-up to the end of the last step."""
        return self.marks[-1] - self.started


def report(model: torch.nn.Module, clock: Clock, **values: Any) -> None:
    """Hand the results to the test. Called once by every rank, with the model that was really called."""
    engines = [part for part in (model, *model.modules()) if type(part).__name__ == "DeepSpeedEngine"]
    engines += [getattr(model, "_forward_module", None)] * (not engines)  # Fabric's wrapper
    engine = next((e for e in engines if type(e).__name__ == "DeepSpeedEngine"), None)
    where = "none" if engine is None else f"{type(engine).__module__} stage {engine.zero_optimization_stage()}"
    times = {"step_ms": clock.step_ms, "train_s": clock.train_s}
    answer = {"engine": where, "peak_rss_bytes": peak_rss_bytes(), **times, **values}
    Path(JOB["out"], f"rank{RANK}.json").write_text(json.dumps(answer))
    if JOB["engine"] == "none" and torch.distributed.is_initialized():
        # torch says to end by it: gloo's threads may else outlive what they use, and abort a process that is done.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
