"""The ways of saving that Accelerate, transformers and PEFT document, with nothing left whole at stage 3."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from common import BATCH, JOB, LEARNING_RATE, Clock, Tokens, engine_config, gpt2, meet, report

HERE = Path(JOB["dir"])
TIMES: dict[str, float] = {}


def config(**more: Any) -> dict[str, Any]:
    """The job's, with a threshold of 0, and gathering as the job says."""
    settings = engine_config(zero_allow_untested_optimizer=True, **more)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if JOB["stage"] == 3:
        settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = JOB.get("gathers", True)
    return settings


def timed(name: str, call: Any) -> Any:
    """What a call returns; how long it took on this rank is reported."""
    start = time.perf_counter()
    result = call()
    TIMES[name] = time.perf_counter() - start
    return result


def weights_of(folder: Path) -> dict[str, float]:
    """The sums of the weights in a folder's files."""
    from safetensors.torch import load_file

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {name: value.double().abs().sum().item() for name, value in load_file(file).items()}
    return found


def accelerate() -> tuple[Any, dict[str, Any]]:
    """`get_state_dict` with `save_pretrained`, `save_model`, `save_state` with `load_state`."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import InitProcessGroupKwargs

    accelerator = Accelerator(
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config(gradient_accumulation_steps=1)),
        mixed_precision="no",
    )
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    loader = torch.utils.data.DataLoader(Tokens(), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = list(loader)

    def step(index: int) -> float:
        loss = model(**batches[index]).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return accelerator.reduce(loss.detach(), "mean").item()

    losses = [step(0), step(1)]
    state = accelerator.get_state_dict(model)
    total = (
        {} if state is None else {name: value.double().abs().sum().item() for name, value in state.items()}
    )  # save_pretrained empties it
    unwrapped = accelerator.unwrap_model(model)
    main = {"is_main_process": accelerator.is_main_process, "save_function": accelerator.save}
    timed("save_pretrained", lambda: unwrapped.save_pretrained(HERE / "pretrained", state_dict=state, **main))
    accelerator.wait_for_everyone()
    timed("save_model", lambda: accelerator.save_model(model, str(HERE / "model")))
    accelerator.wait_for_everyone()
    accelerator.save_state(str(HERE / "state"))
    losses += [step(2), step(3)]
    accelerator.load_state(str(HERE / "state"))
    again = [step(2), step(3)]
    return model, {
        "losses": losses,
        "again": again,
        "state": total,
        "pretrained": weights_of(HERE / "pretrained"),
        "saved": weights_of(HERE / "model"),
    }


def trainer() -> tuple[Any, dict[str, Any]]:
    """`save_model` of a model, or of adapters with modules that are trained as a whole."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(HERE / "out"),
        per_device_train_batch_size=BATCH,
        max_steps=2,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        **meet(),
        deepspeed=config(gradient_clipping="auto", gradient_accumulation_steps="auto"),
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = gpt2()
    if JOB["way"] == "peft":
        from peft import LoraConfig, get_peft_model

        settings = {"lora_dropout": 0.0, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, LoraConfig(r=4, modules_to_save=["ln_f", "wpe"], **settings))
    trainer = Trainer(model=model, args=args, train_dataset=Tokens())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    timed("save_model", lambda: trainer.save_model(str(HERE / "model")))
    torch.distributed.barrier()
    timed("save_model again", lambda: trainer.save_model(str(HERE / "again")))
    engine = trainer.model_wrapped
    state = engine.module.state_dict()
    total = {name: value.double().abs().sum().item() for name, value in state.items()}
    found = {"state": total, "saved": weights_of(HERE / "model"), "again": weights_of(HERE / "again")}
    return engine, {"losses": losses, "folders": sorted(p.name for p in (HERE / "model").iterdir()), **found}


def main() -> None:
    """One way, and what it has left."""
    model, found = accelerate() if JOB["way"] == "accelerate" else trainer()
    clock = Clock()
    clock.step()
    slowest = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(slowest, TIMES)
    report(model, clock, times_s=slowest, **found)


main()
