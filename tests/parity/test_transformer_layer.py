"""Transformer layers: against plain torch in float64 with the very masks, what they keep, and how they train."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

import pytest
import torch
from harness import distributed
from pairwise import each_pair
from programs import needs
from test_zero_models import Case, follow, squared_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import deepspeedlite
from deepspeedlite.ops.transformer import (
    DeepSpeedTransformerConfig,
    DeepSpeedTransformerLayer,
    Dropout,
    draw_stream,
)
from deepspeedlite.ops.transformer.dropout import kept
from deepspeedlite.runtime.errors import ConfigError, OpError

HIDDEN, HEADS, BATCH, TOKENS = 24, 3, 2, 11
OPTIONS = ("normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint")
ATTENTION_RATIO, HIDDEN_RATIO = 0.2, 0.3


def config(**more: Any) -> DeepSpeedTransformerConfig:
    given = {
        "hidden_size": HIDDEN,
        "heads": HEADS,
        "attn_dropout_ratio": ATTENTION_RATIO,
        "hidden_dropout_ratio": HIDDEN_RATIO,
        "num_hidden_layers": 2,
        "initializer_range": 0.3,
        "layer_norm_eps": 1e-5,
        "seed": 7,
    }
    return DeepSpeedTransformerConfig(**{**given, **more})


def layer(**more: Any) -> DeepSpeedTransformerLayer:
    torch.manual_seed(0)
    made = DeepSpeedTransformerLayer(config(**more))
    with torch.no_grad():
        for parameter in made.parameters():  # so that no bias is 0, no norm 1
            parameter += 0.2 * torch.randn_like(parameter)
    return made


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape or (BATCH, TOKENS, HIDDEN), generator=torch.Generator().manual_seed(seed))


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


class Plain:
    """The layer in torch's own words, in float64, with the masks of a seed that torch was given before."""

    def __init__(self, of: DeepSpeedTransformerLayer, seed: int) -> None:
        self.config = of.config
        self.weights = {name: one.detach().double().requires_grad_() for name, one in of.named_parameters()}
        torch.manual_seed(seed)
        self.stream = draw_stream()

    def dropped(self, x: Tensor, ratio: float, index: int) -> Tensor:
        dropout = Dropout(ratio, self.config.seed, self.stream + index)
        return x * kept(dropout, x.numel()).double().view_as(x)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, x.shape[-1:], self.weights[f"{name}w"], self.weights[f"{name}b"], self.config.layer_norm_eps
        )

    def product(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}w"], self.weights[f"{name}b"])

    def attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, hidden = x.shape
        heads = self.product(x, "attn_qkv").view(batch, tokens, 3, self.config.heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
        mixed = self.dropped(scores.softmax(-1), self.config.attn_dropout_ratio, 0) @ v
        mixed = self.product(mixed.transpose(1, 2).reshape(batch, tokens, hidden), "attn_o")
        return self.dropped(mixed, self.config.hidden_dropout_ratio, 1)

    def mlp(self, x: Tensor) -> Tensor:
        active = F.gelu(self.product(x, "inter_"), approximate="tanh" if self.config.gelu == "tanh" else "none")
        return self.dropped(self.product(active, "output_"), self.config.hidden_dropout_ratio, 2)

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.config.pre_layer_norm:
            x = x + self.attention(self.norm(x, "norm_"), mask)
            return x + self.mlp(self.norm(x, "attn_n"))
        x = self.norm(x + self.attention(x, mask), "attn_n")
        return self.norm(x + self.mlp(x), "norm_")


def mask_of(kind: str) -> Tensor | None:
    padded = torch.arange(TOKENS) < torch.tensor([[TOKENS], [7]])
    return {
        "none": None,
        "padding": padded,
        "added": torch.where(padded, 0.0, -10000.0)[:, None, None],
        "causal": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None],
    }[kind]


@each_pair(
    pre_layer_norm=[True, False],
    invertible=[False, True],
    recompute=[False, True],
    gelu=["tanh", "erf"],
    dropout=[False, True],
    mask=["none", "padding", "added", "causal"],
    dtype=[torch.float32, torch.float64],
)
def test_a_layer_is_what_torch_makes_of_it(pre_layer_norm, invertible, recompute, gelu, dropout, mask, dtype):
    ratios = {} if dropout else {"attn_dropout_ratio": 0.0, "hidden_dropout_ratio": 0.0}
    made = layer(
        pre_layer_norm=pre_layer_norm,
        normalize_invertible=invertible,
        gelu_checkpoint=recompute,
        attn_dropout_checkpoint=recompute,
        gelu=gelu,
        **ratios,
    ).to(dtype)
    plain = Plain(made, 5)
    x, g = inputs().to(dtype).requires_grad_(), inputs(seed=2)
    x_exact = x.detach().double().requires_grad_()
    torch.manual_seed(5)
    found = made(x, mask_of(mask))
    exact_mask = mask_of(mask)
    if mask == "padding" and exact_mask is not None:
        exact_mask = exact_mask[:, None, None]
    expected = plain(x_exact, exact_mask)
    found.backward(g.to(dtype))
    expected.backward(g.double())
    near = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-6}
    torch.testing.assert_close(found.double(), expected, **near)
    torch.testing.assert_close(grad_of(x).double(), grad_of(x_exact), **near)
    for name, parameter in made.named_parameters():
        exact = grad_of(plain.weights[name])
        torch.testing.assert_close(
            grad_of(parameter).double(),
            exact,
            rtol=near["rtol"],
            atol=near["atol"] * exact.abs().max().item(),
            msg=name,
        )


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_layer_is_torchs_encoder_layer(norm_first):
    theirs = nn.TransformerEncoderLayer(
        HIDDEN, HEADS, 4 * HIDDEN, 0.1, activation="gelu", batch_first=True, norm_first=norm_first
    ).eval()
    ours = layer(pre_layer_norm=norm_first, gelu="erf").eval()
    first, second = ("norm1", "norm2") if norm_first else ("norm2", "norm1")
    places = {"attn_qkv": "self_attn.in_proj_", "attn_o": "self_attn.out_proj.", "inter_": "linear1."}
    places |= {"output_": "linear2.", "norm_": f"{first}.", "attn_n": f"{second}."}
    weights = {
        place + name: ours.get_parameter(mine + name[0])
        for mine, place in places.items()
        for name in ("weight", "bias")
    }
    theirs.load_state_dict(weights)
    x = inputs()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_follow_float64(dtype):
    made = layer().to(dtype)
    plain = Plain(made, 3)
    x = inputs().to(dtype).requires_grad_()
    x_exact = x.detach().double().requires_grad_()
    torch.manual_seed(3)
    found, expected = made(x), plain(x_exact)
    found.sum().backward()
    expected.sum().backward()
    for one, other in ((found, expected), (grad_of(x), grad_of(x_exact))):
        off = (one.double() - other).abs().max() / other.abs().max()
        assert off < 4 * torch.finfo(dtype).eps


# --- what is kept -----------------------------------------------------------------------------------------------------


def kept_bytes(made: nn.Module, x: Tensor) -> int:
    """Of what autograd keeps beside weights and the input, each memory once."""
    known = {one.untyped_storage().data_ptr() for one in (*made.parameters(), x)}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("pre_layer_norm", [True, False])
@pytest.mark.parametrize("ratio", [0.1, 0.0])
def test_options_keep_less(pre_layer_norm, ratio):
    heads, tokens = 2, 64
    numel = BATCH * tokens * 64
    x = inputs(BATCH, tokens, 64).requires_grad_()

    def of(*options: str) -> float:
        """In tensors as large as the input."""
        made = layer(
            hidden_size=64,
            heads=heads,
            pre_layer_norm=pre_layer_norm,
            attn_dropout_ratio=ratio,
            hidden_dropout_ratio=ratio,
            **dict.fromkeys(options, True),
        )
        return kept_bytes(made, x) / (4 * numel)

    probabilities = 2 * heads if ratio else 0  # of 64 x 64 for each head, before dropout and after it
    saved = {option: of() - of(option) for option in OPTIONS}
    assert saved["gelu_checkpoint"] == pytest.approx(4, abs=0.1)
    assert saved["attn_dropout_checkpoint"] == pytest.approx(probabilities, abs=0.1)
    # Post-norm: two sums; what is kept instead is kept by products, but for the result, which is kept by what follows.
    # Pre-norm: the second norm's input; the first one's is the layer's input.
    assert saved["normalize_invertible"] == pytest.approx(1, abs=0.1)
    if ratio:
        assert of(*OPTIONS) <= 0.6 * of()


# --- masks ------------------------------------------------------------------------------------------------------------


def test_torchs_seed_decides_on_masks():
    made, x = layer(), inputs()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(made(x))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
    assert not torch.equal(made(x), made(x)), "the same mask twice"
    made.config.seed = 8
    torch.manual_seed(1)
    assert not torch.equal(made(x), results[0])
    before = torch.get_rng_state()
    made.eval()
    assert torch.equal(made(x), made(x)) and torch.equal(torch.get_rng_state(), before)
    assert not layer(training=False).training


def both_passes(run: Any, made: nn.Module) -> list[Tensor]:
    x = inputs().requires_grad_()
    made.zero_grad()
    torch.manual_seed(4)
    result = run(x)
    result.square().sum().backward()
    return [result, grad_of(x), *(grad_of(parameter).clone() for parameter in made.parameters())]


def test_checkpointing_drops_the_same_again():
    made = layer(normalize_invertible=True)
    expected = both_passes(made, made)
    ways = [partial(checkpoint, made, use_reentrant=reentrant, preserve_rng_state=True) for reentrant in (True, False)]
    for way in (*ways, partial(deepspeedlite.checkpointing.checkpoint, made)):
        assert all(torch.equal(one, other) for one, other in zip(both_passes(way, made), expected))
    # Without the state the second pass drops others, as torch's own dropout does.
    anew = both_passes(partial(checkpoint, made, use_reentrant=False, preserve_rng_state=False), made)
    assert torch.equal(anew[0], expected[0]) and not torch.equal(anew[1], expected[1])
    made.eval()
    still = both_passes(partial(checkpoint, made, use_reentrant=False, preserve_rng_state=False), made)
    assert all(torch.equal(one, other) for one, other in zip(still, both_passes(made, made)))


# --- training ---------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Two layers, with activation checkpointing or not."""

    def __init__(self, checkpointing: bool, **more: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DeepSpeedTransformerLayer(config(**more)) for _ in range(2))
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for one in self.layers:
            x = checkpoint(one, x, use_reentrant=False) if self.checkpointing else one(x)
        return x


def sequences(step: int, micro: int, rank: int) -> tuple[Tensor]:
    """And the seed of the masks, which whoever asks for them drops next."""
    torch.manual_seed(1000 * step + 100 * micro + rank)
    return (torch.randn(2, 5, HIDDEN),)


@each_pair(
    stage=[0, 1, 2, 3, "3 tight"],
    pre_layer_norm=[True, False],
    options=[(), OPTIONS],
    checkpointing=[False, True],
    offload=[False, True],
)
@distributed(world_size=2)
def test_training_follows_an_unsharded_loop(stage, pre_layer_norm, options, checkpointing, offload):
    offloaded = {"offload_optimizer": {"device": "cpu"}} if offload and stage != 0 else {}
    if offload and stage in (3, "3 tight"):
        offloaded["offload_param"] = {"device": "cpu"}
    made = partial(Model, checkpointing, pre_layer_norm=pre_layer_norm, **dict.fromkeys(options, True))
    case = Case(made, sequences, squared_error, loss_atol=3e-6, weight_atol=2e-5)
    follow(case, stage, steps=2, **offloaded)


def losses(stage: int, dtype: str, offload: bool, steps: int = 6) -> list[float]:
    torch.manual_seed(0)
    model = Model(False, initializer_range=0.1, attn_dropout_ratio=0.05, hidden_dropout_ratio=0.05)
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    engine, *_ = deepspeedlite.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
            "zero_optimization": zero,
            dtype: {"enabled": True},
        },
    )
    found = []
    for step in range(steps):
        torch.manual_seed(1000 + step)
        x = inputs(2, 5, HIDDEN).to(next(engine.module.parameters()).dtype)
        loss = (engine(x).float() - torch.sin(3 * x.float())).square().mean()
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    engine.destroy()
    return found


@each_pair(stage=[1, 2, 3], dtype=["bf16", "fp16"], offload=[False, True])
@distributed(world_size=2)
def test_16_bits_train_at_every_stage_alike(stage, dtype, offload):
    ours = losses(stage, dtype, offload)
    assert ours == pytest.approx(losses(0, dtype, False), rel=0.02)
    assert ours[-1] < 0.9 * ours[0]


@needs("c++")
def test_a_stochastic_layer_uses_its_own_op():
    both = [layer(stochastic_mode=mode) for mode in (False, True)]
    found = [both_passes(made, made) for made in both]
    assert not all(torch.equal(one, other) for one, other in zip(*found))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4 * one.detach().abs().max().item())


@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_no_rows_give_no_gradient_and_frozen_weights_get_none(pre_layer_norm):
    made = layer(pre_layer_norm=pre_layer_norm)
    x = inputs(0, TOKENS, HIDDEN).requires_grad_()
    made(x).sum().backward()
    assert grad_of(x).shape == x.shape and all((grad_of(one) == 0).all() for one in made.parameters())
    whole = both_passes(made, made)
    trained = ("attn_nw", "inter_b", "output_w")
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name in trained)
    made.zero_grad()
    torch.manual_seed(4)
    made(inputs()).square().sum().backward()
    for (name, parameter), expected in zip(made.named_parameters(), whole[2:]):
        assert torch.equal(grad_of(parameter), expected) if name in trained else parameter.grad is None


def test_autocast_multiplies_in_its_dtype():
    made = layer()
    x = inputs().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = made(x, mask_of("padding"))
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert x.grad is not None and all(grad_of(one).dtype == torch.float32 for one in made.parameters())


# --- what they are made of --------------------------------------------------------------------------------------------


def test_weights_are_drawn_as_configured():
    torch.manual_seed(0)
    for adjust, output_std in ((True, 0.02 / math.sqrt(8)), (False, 0.02)):
        made = DeepSpeedTransformerLayer(
            config(hidden_size=128, heads=4, num_hidden_layers=4, initializer_range=0.02, adjust_init_range=adjust)
        )
        for name, expected in (
            ("attn_qkvw", 0.02),
            ("inter_w", 0.02),
            ("attn_ow", output_std),
            ("output_w", output_std),
        ):
            weight = made.get_parameter(name)
            assert weight.std().item() == pytest.approx(expected, rel=0.05) and abs(weight.mean()) < 0.001
        assert (made.attn_nw == 1).all() and (made.norm_w == 1).all() and (made.inter_b == 0).all()
    assert made.inter_w.shape == (512, 128)
    assert made.config.layer_id == DeepSpeedTransformerLayer.layer_id - 1


def test_weights_may_be_given():
    sizes = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN,), (4 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN), (HIDDEN,)]
    weights = [nn.Parameter(torch.randn(size)) for size in sizes]
    biases = [torch.randn(size[0]) for size in sizes]
    made = DeepSpeedTransformerLayer(config(initializer_range=-1), weights, biases)
    assert torch.equal(made.attn_qkvw, torch.cat([one.detach() for one in weights[:3]]))
    assert torch.equal(made.attn_qkvb, torch.cat(biases[:3]))
    assert made.attn_ow is weights[3] and made.norm_w is weights[7] and torch.equal(made.inter_b, biases[5])
    assert len(list(made.parameters())) == 12
    with pytest.raises(ConfigError, match="go together, 8 tensors each"):
        DeepSpeedTransformerLayer(config(), weights)
    with pytest.raises(ConfigError, match=r"inter_w is \[24, 96\], and by the configuration \[96, 24\]"):
        DeepSpeedTransformerLayer(config(), [*weights[:5], weights[6], weights[5], weights[7]], biases)


def test_a_configuration_is_read_from_files(tmp_path):
    for encoding in ("utf-8", "utf-16"):
        file = tmp_path / f"{encoding}.json"
        file.write_text(json.dumps({"hidden_size": 32, "heads": 4, "vocab_size": 99}), encoding=encoding)
        read = DeepSpeedTransformerConfig.from_json_file(str(file))
        assert (read.hidden_size, read.heads, read.intermediate_size, read.vocab_size) == (32, 4, 128, 99)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds no JSON object but list"):
        DeepSpeedTransformerConfig.from_json_file(str(tmp_path / "list.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        DeepSpeedTransformerConfig.from_json_file(str(tmp_path / "broken.json"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hidden_size": -1}, "hidden_size=-1 must be above 0"),
        ({"heads": 5}, "heads=5 does not divide hidden_size=24"),
        ({"attn_dropout_ratio": 1.5}, "attn_dropout_ratio=1.5 must be from 0 to 1"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps=-1.0 must not be below 0"),
        ({"gelu": "relu"}, "gelu='relu' is none of tanh, erf"),
        ({"initializer_range": -1}, "initializer_range=-1 must not be below 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1 must be 1 or more"),
    ],
)
def test_what_no_layer_can_be_made_of_is_told(given, said):
    with pytest.raises(ConfigError, match=said):
        DeepSpeedTransformerLayer(config(**given))


def test_what_a_layer_cannot_take_is_told():
    made, x = layer(return_tuple=True), inputs()
    assert isinstance(made(x), tuple) and made(x)[0].shape == x.shape
    for arguments, said in (
        ({"head_mask": x}, "takes no head_mask"),
        ({"encoder_hidden_states": x, "output_attentions": True}, "takes no encoder_hidden_states, output_attentions"),
        ({"attention_mask": torch.ones(3, 4)}, r"lie over scores \[2, 3, 11, 11\]"),
        ({"attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long)}, "make it bool"),
    ):
        with pytest.raises(OpError, match=said):
            made(x, **arguments)
    for wrong in (x.double(), x[0], x[..., :8]):
        with pytest.raises(OpError, match=r"it must be \[batch, tokens, 24\] of torch.float32"):
            made(wrong)
