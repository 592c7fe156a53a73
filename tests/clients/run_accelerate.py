"""A training loop of one's own with Accelerate: accumulation, clipping, save_state, load_state, unwrap, evaluate."""

from __future__ import annotations

import torch
from common import BATCH, JOB, LEARNING_RATE, RANK, Clock, Tokens, engine_config, gpt2, report


def main() -> None:
    """Train `steps`, saving after `save_at`; with `resume`, go on from there."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import InitProcessGroupKwargs

    clock, accumulation = Clock(), JOB.get("accumulation", 1)
    more = {}
    if JOB["engine"] != "none":
        config = engine_config(gradient_accumulation_steps=accumulation, zero_allow_untested_optimizer=True)
        more["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config)
        more["mixed_precision"] = "bf16" if JOB.get("bf16") else "no"
    accelerator = Accelerator(
        cpu=JOB["engine"] == "none",  # else Accelerate leaves DeepSpeed out
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
        **more,
    )
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
    loader = torch.utils.data.DataLoader(Tokens(), batch_size=BATCH)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    start = 0
    if JOB.get("resume"):
        accelerator.load_state(JOB["resume"])
        start = JOB["save_at"]
    losses = []
    batches = list(loader)
    for step in range(start, JOB["steps"]):
        with accelerator.accumulate(model):
            loss = model(**batches[step]).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        clock.step()
        if step + 1 == JOB.get("save_at") and JOB.get("save"):
            accelerator.save_state(JOB["save"])
    model.eval()
    with torch.no_grad():
        evaluated = accelerator.gather(model(**batches[-1]).loss.detach().reshape(1)).mean().item()
    state = accelerator.get_state_dict(model)
    total = None
    if RANK == 0:
        total = {name: value.double().abs().sum().item() for name, value in state.items()}
    unwrapped = type(accelerator.unwrap_model(model)).__name__
    report(model, clock, losses=losses, evaluated=evaluated, weights=total, unwrapped=unwrapped)


main()
