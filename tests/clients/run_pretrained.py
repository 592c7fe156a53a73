"""Models that transformers builds, loads, enlarges and shrinks at stage 3, each then trained, and trained unsharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import JOB, LAYERS, LENGTH, RANK, VOCABULARY, WIDTH, WORLD, Clock, engine_config, report

RATE, EPS, STEPS = 1e-2, 1e-4, 3


def llama(tied: bool) -> Any:
    """A configuration."""
    from transformers import LlamaConfig

    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": LAYERS}
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "vocab_size": VOCABULARY}
    return LlamaConfig(**sizes, **heads, max_position_embeddings=LENGTH, pad_token_id=0, tie_word_embeddings=tied)


def build(case: str, folder: str) -> Any:
    """A model of the case; sharded as it is built, where transformers has been told of stage 3."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

    if case == "head":
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    if case == "config":
        return AutoModelForCausalLM.from_config(llama(False))
    if case == "constructor":
        return LlamaForCausalLM(llama(True))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(int(case), mean_resizing=int(case) % 2 == 0)
    return model


def loss_of(model: Any, case: str, step: int, rank: int) -> torch.Tensor:
    """The loss of one rank's part of a step's batch."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(1, 30, (2, LENGTH), generator=generator)
    return model(input_ids=ids, labels=ids[:, 0] % 3 if case == "head" else ids).loss


def one(case: str, folder: str) -> tuple[dict[str, Any], Any]:
    """What both trainings of a case gave, and the engine."""
    import deepspeed
    from transformers import set_seed
    from transformers.integrations import HfDeepSpeedConfig

    more = {"params": {"lr": RATE, "eps": EPS, "weight_decay": 0.0, "torch_adam": True}, "type": "AdamW"}
    config = engine_config(optimizer=more, gradient_clipping=0.0, train_micro_batch_size_per_gpu=2)
    known = HfDeepSpeedConfig(config)  # transformers shards while this lives
    set_seed(5 + RANK)
    if case == "constructor":
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = build(case, folder)
    else:
        model = build(case, folder)
    sharded = sum(param.numel() == 0 for param in model.parameters())
    del known
    set_seed(5)
    plain = build(case, folder)
    named = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        values = {name: param.detach().clone() for name, param in named.items()}
    same = {name: torch.equal(param, values[name]) for name, param in plain.named_parameters()}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    with deepspeed.zero.GatheredParameters(list(named.values())), torch.no_grad():  # all ranks start as rank 0 now
        for name, param in plain.named_parameters():
            param.copy_(named[name])
    optimizer = torch.optim.AdamW(plain.parameters(), lr=RATE, eps=EPS, weight_decay=0.0)
    plain.train(engine.module.training)
    losses, expected = [], []
    for step in range(STEPS):
        loss = loss_of(engine, case, step, RANK)
        engine.backward(loss)
        engine.step()
        optimizer.zero_grad()
        theirs = [loss_of(plain, case, step, rank) for rank in range(WORLD)]
        (sum(theirs) / WORLD).backward()
        optimizer.step()
        losses.append(loss.item())
        expected.append(theirs[RANK].item())
    shapes = {name: list(param.shape) for name, param in plain.named_parameters()}
    found = {"losses": losses, "expected": expected, "sharded": sharded, "same": same, "shapes": shapes}
    return found, engine


def main() -> None:
    """Run the job's cases, each on a tied or an untied checkpoint."""
    from transformers import LlamaForCausalLM

    dist.init_process_group("gloo")
    clock = Clock()
    folder = str(Path(JOB["dir"], f"tied{JOB['tied']}-{WORLD}"))
    if RANK == 0:
        torch.manual_seed(0)
        LlamaForCausalLM(llama(JOB["tied"])).save_pretrained(folder)
    dist.barrier()
    cases = {}
    for case in JOB["cases"]:
        cases[case], engine = one(case, folder)
        clock.step()
    report(engine, clock, losses=[], cases=cases)


main()
