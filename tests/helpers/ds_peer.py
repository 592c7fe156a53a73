"""Trains, saves and loads with the real DeepSpeed, and the models and the runner that tests share with it.

    PEER_PYTHON ds_peer.py JOBS.json STORE WORLD

Run by the Python of an environment that has DeepSpeed, which is imported once: ranks are forked. JOBS.json is a list
of jobs, see `Job`. Each builds `peer_model`, loads a checkpoint if one is named, trains `steps`, saves if a folder is
named, and trains `more_steps`; rank 0 writes to `out` all ranks' losses, and the masters and optimizer states after
`steps`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import TiedTokenModel, tied_model, tokens

CLIENT_STATE = {"epoch": 3, "note": ["a", (1, 2.5)], "noise": torch.arange(4)}
STATES = ("exp_avg", "exp_avg_sq")
DTYPES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    # DeepSpeed 0.19.8 divides gradients by the loss scale twice at stage 0 in fp16, which shows at any scale but 1.
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 0, "loss_scale_window": 1000}},
}


@dataclass
class Job:
    """One training in DeepSpeed. Steps are [first, last + 1]."""

    name: str
    config: dict[str, Any]
    variant: str = "plain"
    load: str | None = None
    save: str | None = None
    steps: list[int] = field(default_factory=lambda: [0, 3])
    more_steps: list[int] = field(default_factory=lambda: [3, 6])
    seed: int = 0
    states: list[str] = field(default_factory=lambda: list(STATES))  # that the optimizer keeps per element
    out: str = ""


def configuration(stage: int, dtype: str, **more: Any) -> dict[str, Any]:
    """One that DeepSpeed and deepspeedlite take alike, on a CPU and without a compiler."""
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "weight_decay": 0.05}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20, "warmup_max_lr": 0.01}},
        "zero_optimization": {"stage": stage},
        **DTYPES[dtype],
        **more,
    }


def peer_model(variant: str, seed: int = 0) -> tuple[TiedTokenModel, list[dict[str, Any]] | None]:
    """The model and its param groups: `plain`, or `mixed` with frozen parameters and two groups, each in its order."""
    model = tied_model(seed)
    if variant == "plain":
        return model, None
    model.up[0].weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    trained = [param for param in model.parameters() if param.requires_grad][::-1]
    return model, [
        {"params": [param for param in trained if param.dim() > 1], "weight_decay": 0.1},
        {"params": [param for param in trained if param.dim() == 1], "weight_decay": 0.0},
    ]


def train(engine: Any, steps: Iterable[int]) -> list[float]:
    """The losses of this rank."""
    losses = []
    for step in range(*steps):
        loss = engine(*tokens(step, 0, dist.get_rank() if dist.is_initialized() else 0))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def run_peer(folder: Path, jobs: list[Job], world: int = 2, timeout_s: float = 500) -> dict[str, dict[str, Any]]:
    """Do the jobs in processes of DSL_PEER_PYTHON; what each wrote, by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        job.out = str(folder / f"{job.name}.out")
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    python = os.environ["DSL_PEER_PYTHON"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"DS_ACCELERATOR": "cpu", "PATH": f"{Path(python).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [python, __file__, str(folder / "jobs.json"), f"{scratch}/store", str(world)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stdout[-6000:]
    return {job.name: torch.load(job.out) for job in jobs}


# --- in DeepSpeed's processes -----------------------------------------------------------------------------------------


def everything(engine: Any, states: list[str]) -> dict[str, torch.Tensor]:
    """Masters and optimizer states of all trained parameters, whole."""
    named = [(name, param) for name, param in engine.module.named_parameters() if param.requires_grad]
    if engine.zero_optimization_stage() == 0:
        found = _everything_at_stage_0(engine, states)
        return {f"{kind} {name}": value for name, param in named for kind, value in found[id(param)].items()}
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # by itself it does the first group's only
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    values = {f"master {name}": safe_get_full_fp32_param(param) for name, param in named}
    for kind in states:
        values.update({f"{kind} {name}": safe_get_full_optimizer_state(param, kind) for name, param in named})
    return {key: value.detach().clone() for key, value in values.items()}


def _everything_at_stage_0(engine: Any, states: list[str]) -> dict[int, dict[str, torch.Tensor]]:
    optimizer, state = engine.optimizer, engine.basic_optimizer.state
    halves = getattr(optimizer, "fp16_groups", [list(engine.module.parameters())])
    found = {}
    for number, params in enumerate(halves):
        if hasattr(optimizer, "fp32_groups_flat"):
            flat = optimizer.fp32_groups_flat[number]
            pieces = [tensor.split([p.numel() for p in params]) for tensor in (flat, *(state[flat][k] for k in states))]
            rows = zip(params, *pieces)
        else:
            masters = optimizer.fp32_groups[number] if hasattr(optimizer, "fp32_groups") else params
            rows = ((p, m, *(state[m][k] for k in states)) for p, m in zip(params, masters) if m in state)
        for param, *tensors in rows:
            values = [tensor.detach().clone().view(param.shape) for tensor in tensors]
            found[id(param)] = dict(zip(("master", *states), values))
    return found


def do(job: Job) -> None:
    """One job."""
    import deepspeed

    model, groups = peer_model(job.variant, job.seed)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups or model.parameters(), config=job.config)
    client_state: dict[str, Any] = {}
    if job.load:
        path, client_state = engine.load_checkpoint(job.load)
        assert path is not None, "DeepSpeed found no checkpoint"
    losses = train(engine, job.steps)
    if job.save:
        engine.save_checkpoint(job.save, client_state=CLIENT_STATE)
    tensors = everything(engine, job.states)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (losses, train(engine, job.more_steps)))
    if dist.get_rank() == 0:
        answer = {
            "losses": [first for first, _ in told],
            "more_losses": [more for _, more in told],
            "tensors": tensors,
            "global_steps": engine.global_steps,
            "lr": engine.get_lr(),
            "client_state": {key: client_state[key] for key in CLIENT_STATE if key in client_state},
        }
        torch.save(answer, job.out)
    engine.destroy()


def on_forked_ranks(world: int, body: Callable[[int], None]) -> None:
    """Run the body on each rank, forked from this process; exits with 1 where a rank does not end well."""
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
            status = 1
            try:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
                torch.set_num_threads(1)
                body(rank)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        pids.append(pid)
    failed = 0
    for _ in pids:  # whoever ends first; the others of one that fails may hang
        failed = os.waitstatus_to_exitcode(os.wait()[1])
        if failed:
            break
    sys.exit(1 if failed else 0)


def main() -> None:
    """Do all jobs."""
    jobs, store, world = sys.argv[1:]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import deepspeed  # noqa: F401  (once, for all that are forked)
    import torch._dynamo  # noqa: F401  (which making an optimizer imports)

    on_forked_ranks(int(world), lambda rank: work(jobs, store, rank, int(world)))


def work(jobs: str, store: str, rank: int, world: int) -> None:
    """One rank's."""
    import deepspeed

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    deepspeed.init_distributed("gloo")
    # It asks the processor whether it multiplies fp16 numbers itself; torch computes with them on any.
    type(deepspeed.accelerator.get_accelerator()).is_fp16_supported = lambda self: True
    for job in json.loads(Path(jobs).read_text()):
        do(Job(**job))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
