"""What the tutorials of DeepSpeed's site show, call by call, by scripts of our own that know it as `deepspeed`.

Each script is started as the tutorials start theirs, by the launcher, on two ranks of this machine.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from harness import distributed
from paths import ROOT
from programs import needs

from deepspeedlite.compat.hosts import fetch_hostfile, parse_inclusion_exclusion
from deepspeedlite.launcher.stand_in import folder as stand_in
from deepspeedlite.ops.op_builder.errors import OpBuildError

MODEL = """
import argparse, json, os, sys
import torch
import torch.nn.functional as F
import deepspeed

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 24), torch.nn.Linear(24, 24), torch.nn.Linear(24, 4)])

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)

class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        x = torch.randn(8, generator=torch.Generator().manual_seed(index))
        return x, int(x[:4].argmax())

def tell(**found):
    if int(os.environ["RANK"]) == 0:
        print("FOUND" + json.dumps(found), flush=True)
"""


TRAINS = """
def trains(engine, loader, epochs=6):
    losses = []
    for _ in range(epochs):
        for inputs, labels in loader:
            dtype = next(engine.module.parameters()).dtype
            inputs, labels = inputs.to(engine.device).to(dtype), labels.to(engine.device)
            loss = F.cross_entropy(engine(inputs).float(), labels)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses
"""


def launched(script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """What a script, after MODEL and TRAINS, tells in two ranks that `deepspeed` has started."""
    path = folder / "train.py"
    path.write_text(MODEL + TRAINS + textwrap.dedent(script))
    environ = {**os.environ, "PYTHONPATH": f"{stand_in()}:{ROOT}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", str(path)]
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=environ, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if "FOUND" in line]
    found: dict[str, Any] = json.loads(line.partition("FOUND")[2])
    return found


def config_file(folder: Path, **more: Any) -> str:
    config = {
        "train_batch_size": 16,
        "steps_per_print": 2000,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": 5}},
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "wall_clock_breakdown": False,
        **more,
    }
    (folder / "ds_config.json").write_text(json.dumps(config))
    return str(folder / "ds_config.json")


@pytest.mark.slow
def test_getting_started(tmp_path):
    """The three calls; checkpoints with a client's state; arguments and configuration by the command line."""
    script = """
    parser = argparse.ArgumentParser(description="My training script.")
    parser.add_argument("--local_rank", type=int, default=-1, help="local rank passed from distributed launcher")
    parser.add_argument("--save_dir")
    parser = deepspeed.add_config_arguments(parser)
    cmd_args = parser.parse_args()
    deepspeed.init_distributed()
    net = Net()
    model_engine, optimizer, loader, _ = deepspeed.initialize(
        args=cmd_args, model=net, model_parameters=net.parameters(), training_data=Points()
    )
    losses = trains(model_engine, loader)
    client_sd = {"step": len(losses), "note": "first"}
    model_engine.save_checkpoint(cmd_args.save_dir, "id7", client_state=client_sd)
    more = trains(model_engine, loader, 1)
    _, loaded = model_engine.load_checkpoint(cmd_args.save_dir, "id7")
    again = trains(model_engine, loader, 1)
    tell(losses=losses, step=loaded["step"], note=loaded["note"], alike=abs(sum(more) - sum(again)) < 1e-4,
         local_rank=cmd_args.local_rank, world=torch.distributed.get_world_size(), seen=os.environ.get("MY_SETTING"))
    """
    (tmp_path / ".deepspeed_env").write_text("MY_SETTING=from the file\n")
    found = launched(
        script,
        tmp_path,
        "--deepspeed",
        "--deepspeed_config",
        config_file(tmp_path),
        "--save_dir",
        str(tmp_path / "saved"),
    )
    assert found["losses"][-1] < found["losses"][0] - 0.3
    assert (found["step"], found["note"], found["world"], found["local_rank"]) == (24, "first", 2, 0)
    assert found["alike"] and found["seen"] == "from the file"
    assert (tmp_path / "saved" / "latest").read_text().strip() == "id7"


@needs("ssh")
def test_hostfiles_and_their_filters(tmp_path):
    """Two machines, and the four ways to leave some of them out."""
    path = tmp_path / "myhostfile"
    path.write_text("worker-1 slots=4\nworker-2 slots=4\n")
    hosts = fetch_hostfile(str(path))
    assert dict(hosts) == {"worker-1": 4, "worker-2": 4}
    chosen = [
        ("worker-2:0,1", "", {"worker-2": [0, 1]}),
        ("", "worker-2:0@worker-2:1", None),
        ("", "worker-1", {"worker-2": [0, 1, 2, 3]}),
        ("worker-1@worker-2:2", "", {"worker-1": [0, 1, 2, 3], "worker-2": [2]}),
    ]
    for include, exclude, left in chosen:
        if left is not None:
            assert dict(parse_inclusion_exclusion(hosts, include, exclude)) == left
    commands = {
        (): ["worker-1", "worker-2"],
        ("--num_nodes=1",): ["worker-1"],
        ("--exclude=worker-2:0@worker-3:0,1",): None,
        ("--include=worker-2:0,1",): ["worker-2"],
    }
    environ = {**os.environ, "PYTHONPATH": f"{stand_in()}:{ROOT}", "DS_ACCELERATOR": "cpu"}
    for options, named in commands.items():
        command = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={path}", *options, "--dry_run"]
        done = subprocess.run([*command, "train.py"], cwd=tmp_path, env=environ, capture_output=True, text=True)
        if named is None:  # a machine that the file does not have
            assert done.returncode != 0 and "worker-3" in done.stderr + done.stdout
            continue
        assert done.returncode == 0, done.stderr
        shown = [host for host in ("worker-1", "worker-2") if host in done.stdout + done.stderr]
        assert shown == named, (options, done.stdout, done.stderr)


@pytest.mark.parametrize(
    "command, libraries",
    [
        ("DS_BUILD_OPS=1", "cpu_adam cpu_adagrad cpu_lion fused_adam fused_lamb fused_lion utils async_io"),
        ("DS_BUILD_FUSED_LAMB=1", "fused_lamb"),
        ("DS_BUILD_OPS=1 DS_BUILD_SPARSE_ATTN=0", "cpu_adam fused_adam async_io"),
        ("DS_BUILD_CPU_ADAM=1 DS_BUILD_UTILS=1", "cpu_adam utils"),
        ("DS_BUILD_AIO=1 DS_BUILD_FUSED_LION=1 DS_BUILD_CPU_LION=1 DS_BUILD_FUSED_ADAM=1", "async_io fused_lion"),
        ("DS_BUILD_OPS=0", ""),
        ("DS_BUILD_STRING=.dev20200101", ""),
        ("DS_BUILD_TRANSFORMER=1 DS_BUILD_STOCHASTIC_TRANSFORMER=1 DS_BUILD_TRANSFORMER_INFERENCE=1", "transformer"),
        ("DS_BUILD_EVOFORMER_ATTN=1", None),
        ("DS_BUILD_RAGGED_DEVICE_OPS=1", None),
        ("DS_BUILD_CUTLASS_OPS=1", None),
        ("DS_BUILD_INFERENCE_CORE_OPS=1", None),
    ],
)
def test_advanced_install(command, libraries):
    """Which libraries each command would compile; what is not here is refused before anything is."""
    from deepspeedlite.ops.op_builder.wheel import asked_for, version

    environ = dict(word.split("=", 1) for word in command.split())
    if libraries is None:
        with pytest.raises(OpBuildError, match="asks for an op that deepspeedlite does not have"):
            asked_for(environ)
        return
    asked = asked_for(environ)
    assert set(libraries.split()) <= set(asked) and (asked or not libraries)
    assert "sparse_attn" not in asked or "SPARSE_ATTN" not in command
    assert version("1.0", environ) == "1.0" + environ.get("DS_BUILD_STRING", "")


@pytest.mark.slow
@pytest.mark.parametrize("dtype, stage", [("fp32", 0), ("bf16", 1), ("bf16", 3)])
def test_cifar_10(dtype, stage, tmp_path):
    """A dictionary for a configuration, a loader from `initialize`, the model's own dtype for its inputs."""
    script = """
        import deepspeed.moe.utils  # at the head of the tutorial's script, which does not call it
        from deepspeed.accelerator import get_accelerator
        parser = argparse.ArgumentParser(description="CIFAR")
        parser.add_argument("-e", "--epochs", default=6, type=int)
        parser.add_argument("--local_rank", type=int, default=-1)
        parser.add_argument("--dtype", default="fp16", type=str)
        parser.add_argument("--stage", default=0, type=int, choices=[0, 1, 2, 3])
        parser = deepspeed.add_config_arguments(parser)
        args = parser.parse_args()
        deepspeed.init_distributed()
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
        config = {
            "train_batch_size": 16,
            "steps_per_print": 2000,
            "optimizer": {"type": "Adam",
                          "params": {"lr": 0.01, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
            "scheduler": {"type": "WarmupLR",
                          "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": 5}},
            "gradient_clipping": 1.0,
            "prescale_gradients": False,
            "bf16": {"enabled": args.dtype == "bf16"},
            "fp16": {"enabled": args.dtype == "fp16", "fp16_master_weights_and_grads": False, "loss_scale": 0,
                     "loss_scale_window": 500, "hysteresis": 2, "min_loss_scale": 1, "initial_scale_power": 15},
            "wall_clock_breakdown": False,
            "zero_optimization": {"stage": args.stage, "allgather_partitions": True, "reduce_scatter": True,
                                  "allgather_bucket_size": 50000000, "reduce_bucket_size": 50000000,
                                  "overlap_comm": True, "contiguous_gradients": True, "cpu_offload": False},
        }
        net = Net()
        parameters = filter(lambda p: p.requires_grad, net.parameters())
        model_engine, optimizer, trainloader, __ = deepspeed.initialize(
            args=args, model=net, model_parameters=parameters, training_data=Points(), config=config)
        target_dtype = torch.bfloat16 if model_engine.bfloat16_enabled() else None
        losses = trains(model_engine, trainloader, args.epochs)
        model_engine.module.eval()
        right = 0
        with torch.no_grad():
            for inputs, labels in torch.utils.data.DataLoader(Points(), batch_size=32):
                right += int((net(inputs.to(target_dtype or torch.float32)).argmax(1) == labels).sum())
        tell(losses=losses, right=right, stage=model_engine.zero_optimization_stage())
        """
    found = launched(script, tmp_path, "--deepspeed", "--dtype", dtype, "--stage", str(stage))
    assert found["losses"][-1] < found["losses"][0] - 0.3 and found["right"] > 32 and found["stage"] == stage


ZERO = [
    {"stage": 1, "reduce_bucket_size": 5e8},
    {
        "stage": 2,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "allgather_bucket_size": 5e8,
    },
    {
        "stage": 3,
        "contiguous_gradients": True,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_prefetch_bucket_size": 1e7,
        "stage3_param_persistence_threshold": 1e5,
        "reduce_bucket_size": 1e7,
        "sub_group_size": 1e9,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
    {
        "stage": 3,
        "contiguous_gradients": True,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_prefetch_bucket_size": 1e7,
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": 1e7,
        "sub_group_size": 1e9,
        "offload_optimizer": {"device": "nvme", "nvme_path": "HERE", "buffer_count": 4, "pipeline_read": True},
        "offload_param": {"device": "nvme", "nvme_path": "HERE", "max_in_cpu": 0},
    },
]


@pytest.mark.slow
@pytest.mark.parametrize("zero", ZERO, ids=["stage 1", "stage 2", "offload", "infinity"])
def test_zero(zero, tmp_path):
    """The sections of the tutorial; modules built sharded; a parameter gathered to be changed; weights put together."""
    script = """
        deepspeed.init_distributed()
        config = json.load(open(sys.argv[-1]))
        stage = config["zero_optimization"]["stage"]
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3):
            net = Net()
        with deepspeed.zero.GatheredParameters(net.layers[0].weight, modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                net.layers[0].weight.data.mul_(0.5)
        engine, _, loader, _ = deepspeed.initialize(
            model=net, model_parameters=net.parameters(), training_data=Points(), config=config)
        deepspeed.zero.register_external_parameter(net, net.layers[0].bias)
        losses = trains(engine, loader)
        engine.save_checkpoint("saved")
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
        if torch.distributed.get_rank() == 0:
            state = get_fp32_state_dict_from_zero_checkpoint("saved")
            plain = Net()
            plain.load_state_dict(state)
            batch = [torch.stack(column) if torch.is_tensor(column[0]) else torch.tensor(column)
                     for column in zip(*(Points()[i] for i in range(64)))]
            loss = F.cross_entropy(plain(batch[0]), batch[1]).item()
            tell(losses=losses, saved=loss, shapes={name: list(value.shape) for name, value in state.items()})
        """
    here = json.loads(json.dumps(zero).replace("HERE", str(tmp_path)))
    config = config_file(tmp_path, zero_optimization=here)
    found = launched(script, tmp_path, config)
    assert found["losses"][-1] < found["losses"][0] - 0.2 and found["saved"] < found["losses"][0] - 0.2
    assert found["shapes"]["layers.0.weight"] == [24, 8] and len(found["shapes"]) == 6


@pytest.mark.slow
def test_activation_checkpointing(tmp_path):
    """The section of the configuration, `configure` by an mpu or without, and `checkpoint` in the model."""
    script = """
        deepspeed.init_distributed()
        config = json.load(open(sys.argv[-1]))

        class Checkpointed(Net):
            def forward(self, x):
                x.requires_grad_(True)
                x = deepspeed.checkpointing.checkpoint(lambda y: F.relu(self.layers[0](y)), x)
                return self.layers[2](deepspeed.checkpointing.checkpoint(lambda y: F.relu(self.layers[1](y)), x))

        runs = []
        for kind in (Net, Checkpointed):
            net = kind()
            engine, _, loader, _ = deepspeed.initialize(
                model=net, model_parameters=net.parameters(), training_data=Points(), config=config)
            deepspeed.checkpointing.configure(mpu_=None, deepspeed_config=config)
            runs.append(trains(engine, loader, 2))
        tell(runs=runs, configured=deepspeed.checkpointing.is_configured())
        """
    section = {
        "partition_activations": False,
        "cpu_checkpointing": True,
        "contiguous_memory_optimization": False,
        "number_checkpoints": None,
        "synchronize_checkpoint_boundary": False,
        "profile": False,
    }
    found = launched(script, tmp_path, config_file(tmp_path, activation_checkpointing=section))
    assert found["configured"] and found["runs"][0] == pytest.approx(found["runs"][1], abs=1e-5)


@pytest.mark.slow
def test_pipelines(tmp_path):
    """A list of layers, layers built where they are needed, a tied one, batches by iterator and by `training_data`."""
    script = """
        from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
        from deepspeed.utils import RepeatingLoader
        deepspeed.init_distributed()
        config = json.load(open(sys.argv[-1]))
        loss_fn = torch.nn.CrossEntropyLoss()

        def layers():
            return [LayerSpec(torch.nn.Linear, 8, 24), torch.nn.ReLU(),
                    TiedLayerSpec("middle", torch.nn.Linear, 24, 24), F.relu,
                    TiedLayerSpec("middle", torch.nn.Linear, 24, 24), LayerSpec(torch.nn.Linear, 24, 4)]

        torch.manual_seed(1)
        net = PipelineModule(layers=layers(), num_stages=2, loss_fn=loss_fn, partition_method="parameters",
                             activation_checkpoint_interval=1)
        engine, _, _, _ = deepspeed.initialize(
            model=net, model_parameters=[p for p in net.parameters() if p.requires_grad],
            training_data=Points(), config=config)
        losses = [float(engine.train_batch()) for _ in range(20)]
        loader = torch.utils.data.DataLoader(Points(), batch_size=4)
        batches = iter(RepeatingLoader(loader))
        losses += [float(engine.train_batch(data_iter=batches)) for _ in range(20)]
        tell(losses=losses, evaluated=float(engine.eval_batch(batches)), steps=engine.global_steps,
             stages=engine.num_stages, first=engine.is_first_stage())
        """
    config = config_file(tmp_path, train_micro_batch_size_per_gpu=4, steps_per_print=5)
    found = launched(script, tmp_path, config)
    assert found["losses"][-1] < found["losses"][0] - 0.3 and found["evaluated"] < found["losses"][0]
    assert (found["steps"], found["stages"], found["first"]) == (40, 2, True)


def documented() -> list[Any]:
    """README's configuration, and those of the documentation's pages, each laid over it."""
    blocks = re.compile(r"```json\n(.*?)```", re.DOTALL)
    base = json.loads(blocks.findall((ROOT / "README.md").read_text())[0])
    found = [pytest.param(base, id="README")]
    for page in sorted((ROOT / "docs").glob("*.md")):
        for number, text in enumerate(blocks.findall(page.read_text())):
            found.append(pytest.param({**base, **json.loads(text)}, id=f"{page.stem}-{number}"))
    return found


def readmes_words(config: dict[str, Any], folder: Path) -> list[str]:
    """Put README's script and `config` into `folder`; the words that start it there.

    As printed; but for a disk that is here, and for monitors whose packages or accounts are not.
    """
    script = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    (folder / "train.py").write_text(script)
    config = json.loads(json.dumps(config).replace("/local_nvme", str(folder)))
    for name in ("wandb", "comet"):
        config.pop(name, None)
    (folder / "ds_config.json").write_text(json.dumps(config))
    return ["train.py", "--deepspeed_config", "ds_config.json"]


def learns(printed: str, ranks: int) -> None:
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss (\S+)", printed)]
    assert len(losses) == 5 * ranks and min(losses[-2:]) < max(losses[:2])


@pytest.mark.slow
def test_readmes_script_is_launched(tmp_path):
    words = ["--num_gpus", "2", *readmes_words(documented()[0].values[0], tmp_path)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "deepspeedlite.launcher", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    learns(done.stdout, 2)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("config", documented()[1:])
@distributed(world_size=2, init_process_group=False, env={"DS_ACCELERATOR": "cpu"})
def test_readmes_script_with_the_documentations_configurations(config, tmp_path):
    """In ranks that have imported torch already: a configuration is tried here, not the launch once more."""
    folder = tmp_path / os.environ["RANK"]
    folder.mkdir()
    argv, printed = readmes_words(config, folder), io.StringIO()
    os.chdir(folder)
    with mock.patch("sys.argv", argv), contextlib.redirect_stdout(printed):
        runpy.run_path(argv[0], run_name="__main__")
    learns(printed.getvalue(), 1)


def test_published_files_of_configurations(tmp_path):
    """Keys that nobody reads, at the top of files that people publish: warnings under this name, errors under ours."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "comms_config": {"verbose": True},
        "monitor_config": {},
        "_comment": "for one node",
        "cuda_visible_devices": "0,1",
    }
    code = f"""
import json, sys
import {{name}}
from deepspeedlite.config import load_config
try:
    print("PASSED" + json.dumps(load_config({config!r}, world_size=1).passed_over))
except {{name}}.runtime.config.DeepSpeedConfigError as error:
    print("FAILED" + str(error).replace(chr(10), " "))
"""
    environ = {**os.environ, "PYTHONPATH": f"{stand_in()}:{ROOT}"}
    said = {}
    for name in ("deepspeed", "deepspeedlite"):
        text = code.replace("{name}", name).replace("import deepspeedlite\n", "import deepspeedlite.runtime.config\n")
        text = text.replace("import deepspeed\n", "import deepspeed.runtime.config\n")
        done = subprocess.run([sys.executable, "-c", text], env=environ, capture_output=True, text=True)
        said[name] = done.stdout + done.stderr
    unknown = [key for key in config if key != "train_micro_batch_size_per_gpu"]
    assert "PASSED" in said["deepspeed"] and all(f"{key}: unknown key" in said["deepspeed"] for key in unknown), said
    assert "FAILED" in said["deepspeedlite"] and all(f"{key}" in said["deepspeedlite"] for key in unknown), said
