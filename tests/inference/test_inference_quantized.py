"""Weights of 8 and 4 bits: what becomes of a model's layers, and what it costs a model that has learnt something."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from paths import ROOT
from torch import nn

import deepspeedlite
from deepspeedlite.inference.quantized import QuantizedLinear, quantize_linears


class Net(nn.Module):
    """Layers that are quantized, and layers that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.block = nn.Sequential(nn.Linear(64, 160), nn.ReLU(), nn.Linear(160, 64, bias=False))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.block(self.embed(ids))))


@pytest.mark.parametrize("bits, error", [(8, 0.01), (4, 0.15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_are_quantized_where_nobody_else_has_their_weight(bits, error, dtype):
    torch.manual_seed(0)
    net = Net().to(dtype)
    ids = torch.randint(40, (3, 9))
    whole = net(ids).float()
    lines = quantize_linears(net, bits=bits, group_size=32, dtype=dtype)
    assert lines == [
        f"2 linear layers quantized to {bits} bits",
        "1 module not quantized: the weight is another module's too",
    ]
    assert [type(part) for part in net.block] == [QuantizedLinear, nn.ReLU, QuantizedLinear]
    first = net.block[0]
    assert (first.weight.shape, first.weight.dtype, first.bias.dtype) == ((160, 64), dtype, dtype)
    assert first.packed.weight_bytes < 160 * 64 * bits / 8 * 1.2
    found = net(ids).float()
    assert 0 < (found - whole).norm() / whole.norm() < error + (0.01 if dtype is torch.bfloat16 else 0)


def test_weights_are_filled_one_layer_at_a_time():
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    asked = []

    def fill(module):
        assert not any(isinstance(part, nn.Linear) and not part.weight.is_meta for part in net), "one at a time"
        name = next(name for name, part in net.named_children() if part is module)
        asked.append(name)
        module.load_state_dict(expected[int(name)].state_dict(), assign=True)

    quantize_linears(net, bits=8, group_size=16, dtype=torch.float32, fill=fill)
    quantize_linears(expected, bits=8, group_size=16, dtype=torch.float32)
    x = torch.randn(2, 32)
    assert asked == ["0", "1"] and torch.equal(net(x), expected(x))


@pytest.mark.slow_unless(family=["llama-tied"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "t5", "bert"])
def test_a_checkpoint_is_quantized_as_it_is_read(family, fused, tmp_path):
    """The same as quantizing the model that has it."""
    pytest.importorskip("transformers")
    from tiny_transformers import logits_of, tiny

    model = tiny(family)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = tiny(family)
    config = {
        "dtype": "fp32",
        "quant": {"weight": {"num_bits": 8, "group_size": 32}},
        "replace_with_kernel_inject": fused,
    }
    read = deepspeedlite.init_inference(empty, config={**config, "checkpoint": str(tmp_path)})
    whole = logits_of(model, family)
    made = logits_of(deepspeedlite.init_inference(model, config=config), family)
    assert torch.equal(logits_of(read, family), made) and not torch.equal(made, whole)
    assert (made - whole).norm() < 0.03 * whole.norm()


@pytest.fixture(scope="module")
def trained():
    """The example's GPT, small, after some steps over Python's own sources; and text that it has not seen."""
    sys.path.insert(0, str(ROOT / "examples" / "gpt"))
    try:
        from model import GPT, GPTConfig
        from text import Windows, library_text
    finally:
        del sys.path[0]
    torch.manual_seed(0)
    torch.set_num_threads(1)  # beside other tests two threads wait for each other most of the time
    train, validation = (Windows(text, 64) for text in library_text(600_000))
    net = GPT(GPTConfig(context=64, width=128, layers=2, heads=4))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(150):
        picked = [train[int(number)] for number in torch.randint(len(train), (16,), generator=draw)]
        inputs, targets = (torch.stack(each) for each in zip(*picked))
        loss = nn.functional.cross_entropy(net(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen = [validation[number] for number in range(0, len(validation), max(len(validation) // 64, 1))][:64]
    return net, tuple(torch.stack(each) for each in zip(*unseen))


@pytest.mark.slow
@pytest.mark.parametrize("bits, most", [(8, 1.01), (4, 1.05)])
def test_perplexity_of_real_text_hardly_changes(trained, bits, most):
    import copy

    net, (inputs, targets) = trained

    def perplexity(model: nn.Module) -> float:
        with torch.no_grad():
            logits = model(inputs)
        return math.exp(nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten()))

    whole = perplexity(copy.deepcopy(net).to(torch.bfloat16))
    assert whole < 30, "it has learnt something: 256 knows nothing"
    config = {"dtype": "bf16", "quant": {"weight": {"num_bits": bits}}}
    found = perplexity(deepspeedlite.init_inference(copy.deepcopy(net), config=config))
    print(f"perplexity {whole:.3f} in bf16, {found:.3f} in {bits} bits")
    assert found != whole and found < most * whole
