"""Weights that come as they are used: the same outputs, in much less memory, as far ahead as there are buffers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from limits import memory_group
from paths import HELPERS
from programs import needs
from torch import nn

import deepspeedlite
from deepspeedlite.config.sections.zero import ZeroOptimization
from deepspeedlite.inference.config import read_inference_config
from deepspeedlite.inference.streamed import StreamedWeights
from deepspeedlite.runtime.errors import CheckpointError, ConfigError, InferenceError

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Tied(nn.Module):
    """Ids to logits, by one embedding for both ends."""

    def __init__(self, width: int = 24, layers: int = 5) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(50, width), nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def section(device: str, path: object, **more: object) -> ZeroOptimization:
    place = {"device": device, "max_in_cpu": 0, "buffer_count": 3}
    if device == "nvme":
        place["nvme_path"] = str(path)
    return ZeroOptimization(stage=3, offload_param=place, stage3_param_persistence_threshold=30, **more)


@needs("c++")
@pytest.mark.parametrize("is_meta", [False, True])
@pytest.mark.parametrize("device", ["none", "cpu", "nvme"])
@distributed(world_size=[1, 2])
def test_outputs_are_the_models(device, is_meta, tmp_path, world_size):
    torch.manual_seed(0)
    model = Tied().eval()
    ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(dist.get_rank()))
    expected, state = model(ids).detach(), {name: value.clone() for name, value in model.state_dict().items()}
    asked: list[list[str]] = []

    def read(names):
        asked.append(list(names))
        return {name: state[name] for name in names}

    if is_meta:
        with torch.device("meta"):
            model = Tied().eval()
            model.head.weight = model.embed.weight
    streamed = StreamedWeights(model, section(device, tmp_path), CPU, read=read)
    for number in range(3):
        with torch.inference_mode() if number else torch.no_grad():
            assert torch.equal(model(ids), expected)
    assert model.embed.weight.numel() == 0 and model.head.weight is model.embed.weight
    found = model.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    layers = asked[1:]  # the first are small ones, which are not streamed
    assert len(layers) == (6 if is_meta else 0) and all(len(names) <= 3 for names in layers), "one after the other"
    streamed.close()
    assert not list(tmp_path.iterdir())


@needs("c++")
@distributed(world_size=1)
def test_layers_are_read_ahead_and_let_go(tmp_path):
    model = Tied(layers=8)
    streamed = StreamedWeights(model, section("nvme", tmp_path), CPU)
    events: list[str] = []
    for number, values in enumerate(streamed._values):

        def fetch(number=number, fetch=values.store.fetch):
            had, got = values_here(streamed), fetch()
            if got and values_here(streamed) > had:
                events.append(f"read {number}")
            return got

        values.store.fetch = fetch
    used = [model.embed, *model.blocks]
    for number, module in enumerate(used):
        module.register_forward_hook(lambda *_, number=number: events.append(f"used {number}"))
    with torch.no_grad():
        model(torch.arange(3))
        assert values_here(streamed) == 0
        events.clear()
        model(torch.arange(3))
    for number in range(1, len(used)):
        assert events.index(f"read {number}") < events.index(f"used {number - 1}"), events
    assert events.index("read 0", events.index("used 0")) < events.index(f"used {len(used) - 1}"), "the next pass's"
    assert values_here(streamed)
    streamed.close()
    assert not values_here(streamed), "what was on its way has its memory until it is there"


def values_here(streamed: StreamedWeights) -> int:
    """How many layers are in memory, or on the way there."""
    return sum(values.store._buffer is not None for values in streamed._values)


@needs("c++")
@pytest.mark.parametrize("is_meta", [False, True])
@distributed(world_size=[1, 2])
def test_an_engine_generates_with_streamed_weights(tmp_path, world_size, is_meta):
    """Prompts are each rank's own, and so is how many tokens it generates."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=50, pad_token_id=0)).eval()
    rank = dist.get_rank()
    ids = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(rank))
    words = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5 + 3 * rank, "do_sample": False}
    expected = model.generate(ids, **words), model.generate(ids, num_beams=2, **words)
    disk = tmp_path / "disk"
    disk.mkdir(exist_ok=True)
    zero = section("nvme", disk).model_dump(exclude_unset=True)
    config = {"dtype": "fp32", "zero": zero, "replace_with_kernel_inject": True}
    if is_meta:
        folder = tmp_path / "weights"
        if rank == 0:
            model.save_pretrained(folder)
        dist.barrier()
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(model.config).eval()
        last = world_size - 1  # the only one that looks elsewhere; the others are told
        with pytest.raises(CheckpointError if rank == last else InferenceError, match="nowhere"):
            place = tmp_path / "nowhere" if rank == last else folder
            deepspeedlite.init_inference(model, config={**config, "checkpoint": str(place)})
        first = deepspeedlite.init_inference(model, config={**config, "checkpoint": str(folder)})
        assert torch.equal(first.generate(ids, **words), expected[0])
    engine = deepspeedlite.init_inference(model, config=config)
    second = deepspeedlite.init_inference(model, config=config)
    assert torch.equal(engine.generate(ids, **words), expected[0])
    assert torch.equal(second.generate(ids, num_beams=2, **words), expected[1])
    engine.destroy()
    if is_meta:
        first.destroy()
    assert torch.equal(second.generate(ids, **words), expected[0])
    with pytest.raises(InferenceError, match="build it anew"):
        deepspeedlite.init_inference(model, config={"dtype": "fp32"})
    second.destroy()
    assert not list(disk.iterdir()), "the disk has its space back"
    with pytest.raises(InferenceError, match="build it anew"):
        deepspeedlite.init_inference(model, config=config)


@pytest.mark.parametrize(
    "more, problem",
    [
        ({"tensor_parallel": {"tp_size": 2}}, "tensor_parallel splits them"),
        ({"dtype": "int8"}, "quantized weights are not streamed"),
        ({"zero": {"stage": 1, "offload_param": {"device": "cpu"}}}, "at stage 3 only"),
        ({"zero": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme_path"),
        ({"zero": {"stage": 3, "ofload_param": {}}}, "did you mean"),
    ],
)
def test_what_streaming_does_not_go_with_is_refused(more, problem):
    with pytest.raises(ConfigError, match=problem):
        read_inference_config({"zero": {"stage": 3}, **more}, {})


LIMITED = """
import json, os, sys, torch
sys.path[:0] = sys.argv[1:3]
from test_streamed import CPU, Tied, section, StreamedWeights
from deepspeedlite import comm
from safetensors import safe_open
weights, disk, group = sys.argv[3:]
torch.set_num_threads(1)
comm.init_process_group()
small = Tied()
StreamedWeights(small, section("nvme", disk), CPU).close()  # what a first use imports and compiles
with torch.device("meta"):
    model = Tied(1024, 22).eval()
    model.head.weight = model.embed.weight
if group:
    open(group + "/cgroup.procs", "w").write(str(os.getpid()))
def read(names):
    with safe_open(weights, "pt") as file:
        return {name: file.get_tensor(name) for name in names}
if group:
    StreamedWeights(model, section("nvme", disk), CPU, read=read)
else:
    model.load_state_dict(read(name for name, _ in model.named_parameters()), strict=False, assign=True)
    model.head.weight = model.embed.weight
ids = torch.arange(4)[None]
with torch.inference_mode():
    for _ in range(6):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
print(json.dumps([ids.tolist(), sum(p.ds_numel if group else p.numel() for p in model.parameters()) * 4]))
"""


@pytest.mark.slow
@needs("c++")
def test_a_model_of_four_times_the_memory_generates(tmp_path):
    """Memory counted from before the model is made: what Python and torch take is outside the group."""
    from safetensors.torch import save_file

    torch.manual_seed(1)
    weights = tmp_path / "model.safetensors"
    made = Tied(1024, 22)
    save_file({name: value for name, value in made.state_dict().items() if name != "head.weight"}, weights)
    del made
    limit_mib, found = 128, []
    (tmp_path / "disk").mkdir()
    with memory_group(limit_mib) as group:
        for limited in (str(group), ""):
            places = [str(Path(__file__).parent), str(HELPERS), weights, tmp_path / "disk", limited]
            words = [sys.executable, "-c", LIMITED, *places]
            done = subprocess.run(words, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-2000:]
            found.append(json.loads(done.stdout))
    assert found[0] == found[1] and found[0][1] >= 4 * (limit_mib << 20)
