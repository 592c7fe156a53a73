"""Models split over ranks beside the whole ones: logits to 1e-5, the tokens of greedy decoding the same."""

from __future__ import annotations

import copy
import time
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from safetensors.torch import save_file
from tiny_transformers import ENCODERS, FAMILIES, logits_of, prompts, tiny

import deepspeedlite
from deepspeedlite.comm import Group
from deepspeedlite.comm.registry import registry
from deepspeedlite.inference.quantized import QuantizedLinear
from deepspeedlite.parallel.tensor import ColumnParallelLinear, RowParallelLinear, split_model
from deepspeedlite.runtime.errors import CheckpointError, ConfigError, DistributedError, InferenceError

pytest.importorskip("transformers")


def _as_whole(family: str, size: int, **keywords: object) -> None:
    model = tiny(family)
    whole = copy.deepcopy(model)
    engine = deepspeedlite.init_inference(model, dtype=torch.float32, mp_size=size, **keywords)
    for pad in ("", "left"):
        with torch.no_grad():
            expected = logits_of(whole, family, pad)
        torch.testing.assert_close(logits_of(engine, family, pad), expected, rtol=1e-5, atol=1e-5)
    if family not in ENCODERS:
        arguments = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(
            engine.generate(**prompts("left"), **arguments), whole.generate(**prompts("left"), **arguments)
        )
    split = [part for part in engine.module.modules() if isinstance(part, RowParallelLinear)]
    assert len(split) >= 4
    kept = sum(param.numel() for param in engine.module.parameters())
    assert kept < sum(param.numel() for param in whole.parameters()) * (0.62 if size == 2 else 0.5)


@pytest.mark.slow_unless(family=["llama", "gpt2", "t5"])
@pytest.mark.parametrize("family", FAMILIES)
@distributed(world_size=2, timeout_s=120)
def test_two_ranks(family):
    _as_whole(family, 2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "bloom"])
@distributed(world_size=4, timeout_s=120)
def test_four_ranks(family):
    """Of two heads of keys and values, two ranks have each; of one, all do."""
    _as_whole(family, 4)


_FUSED = [
    "llama",
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "phi",
    "gpt2",
    "gpt-neox",
    "opt",
    "bloom",
    "bert",
]


def _fused_as_whole(family: str, size: int, **keywords: object) -> None:
    model = tiny(family)
    whole = copy.deepcopy(model)
    given = {"dtype": torch.float32, "mp_size": size, "replace_with_kernel_inject": True, "max_out_tokens": 32}
    engine = deepspeedlite.init_inference(model, **given, **keywords)
    assert any("Fused" in type(part).__name__ for part in engine.module.modules())
    with torch.no_grad():
        expected = logits_of(whole, family, "left")
    torch.testing.assert_close(logits_of(engine, family, "left"), expected, rtol=1e-5, atol=1e-5)
    if family not in ENCODERS:
        asked = {**prompts("left"), "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(engine.generate(**asked), whole.generate(**asked))


@pytest.mark.slow_unless(family=["llama", "gpt2"])
@pytest.mark.parametrize("family", _FUSED)
@distributed(world_size=2, timeout_s=120)
def test_two_ranks_with_fused_blocks(family):
    _fused_as_whole(family, 2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "bloom"])
@distributed(world_size=4, timeout_s=120)
def test_four_ranks_with_fused_blocks(family):
    _fused_as_whole(family, 4)


@pytest.mark.slow_unless(family=["t5"])
@pytest.mark.parametrize("family", ["t5", "olmo2", "falcon-7b", "llama"])
@distributed(world_size=2, timeout_s=120)
def test_quantized_parts(family):
    """As near to the whole model as when it is quantized on one rank: the groups of columns are others."""
    whole = tiny(family)
    found = {}
    for size in (1, 2):
        quant = {"weight": {"num_bits": 8, "group_size": 16}}
        engine = deepspeedlite.init_inference(tiny(family), dtype=torch.float32, mp_size=size, quant=quant)
        assert sum(isinstance(part, QuantizedLinear) for part in engine.module.modules()) >= 8
        with torch.no_grad():
            found[size] = logits_of(engine, family) - logits_of(whole, family)
    assert 0 < found[2].norm() < 2 * found[1].norm()


@pytest.mark.slow
@distributed(world_size=4, timeout_s=120)
def test_two_models_on_four_ranks():
    """Ranks of different groups are given different prompts."""
    model = tiny("llama")
    whole = copy.deepcopy(model)
    engine = deepspeedlite.init_inference(model, dtype=torch.float32, tensor_parallel={"tp_size": 2})
    first = Group().rank // 2
    mine = prompts()["input_ids"][first : first + 1]
    with torch.no_grad():
        torch.testing.assert_close(engine(mine).logits, whole(mine).logits, rtol=1e-5, atol=1e-5)
    assert engine.mp_world_size == 2
    engine.destroy()


_SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_SIZES |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
_GPTJ = {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4}
_BART = {"vocab_size": 99, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
_BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
_XGLM = {"vocab_size": 99, "d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}


def _other(model_class: str, config_class: str, sizes: dict[str, object]) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)).eval()


@pytest.mark.slow
@distributed(world_size=2, timeout_s=120)
def test_other_models():
    """Of which the splitting code knows nothing by name: right, or refused by the name of what cannot be split."""
    for given in (
        ("GPTJForCausalLM", "GPTJConfig", {**_GPTJ, "rotary_dim": 8}),
        ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_SIZES, "num_key_value_heads": 2, "head_dim": 16}),
        ("BartForConditionalGeneration", "BartConfig", _BART),
        ("XGLMForCausalLM", "XGLMConfig", _XGLM),
        ("DistilBertForMaskedLM", "DistilBertConfig", {"vocab_size": 99, "dim": 64, "n_layers": 2, "n_heads": 4}),
    ):
        model = _other(*given)
        with torch.no_grad():
            expected = model(**prompts()).logits
        engine = deepspeedlite.init_inference(model, dtype=torch.float32, mp_size=2)
        torch.testing.assert_close(engine(**prompts()).logits, expected, rtol=1e-5, atol=1e-5, msg=given[0])
    experts = {**_SIZES, "num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 16}
    for given, said in (
        (("GptOssForCausalLM", "GptOssConfig", experts), r"layers.0.mlp.experts \(GptOssExperts\).*not split"),
        (("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPTJ), "h.0.attn .* in an order that is not known"),
    ):
        with pytest.raises(InferenceError, match=said):
            deepspeedlite.init_inference(_other(*given), dtype=torch.float32, mp_size=2)


_EXPERTS = {
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 72},
    "Qwen2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}


@pytest.mark.parametrize("family", _EXPERTS)
@distributed(world_size=2)
def test_experts(family):
    """Of each expert every rank has some inner columns: logits, tokens and the router's gradient are the whole's."""
    sizes = {**_SIZES, "num_key_value_heads": 2, **_EXPERTS[family]}
    whole = _other(f"{family}ForCausalLM", f"{family}Config", sizes)
    trained = copy.deepcopy(whole)
    split_model(trained, Group())
    for model in (whole, trained):
        model(**prompts("left")).logits.square().mean().backward()
    of_router, expected = (model.model.layers[0].mlp.gate.weight.grad for model in (trained, whole))
    torch.testing.assert_close(of_router, expected, rtol=1e-4, atol=1e-6)
    engine = deepspeedlite.init_inference(copy.deepcopy(whole), dtype=torch.float32, mp_size=2)
    with torch.no_grad():
        expected = whole(**prompts("left")).logits
    torch.testing.assert_close(engine(**prompts("left")).logits, expected, rtol=1e-5, atol=1e-5)
    words = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(engine.generate(**prompts("left"), **words), whole.generate(**prompts("left"), **words))
    experts = engine.module.model.layers[0].mlp.experts
    assert experts.down_proj.numel() < 0.6 * whole.model.layers[0].mlp.experts.down_proj.numel()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@distributed(world_size=2)
def test_bf16(family):
    model = tiny(family)
    whole = copy.deepcopy(model).bfloat16()
    engine = deepspeedlite.init_inference(model, dtype=torch.bfloat16, mp_size=2)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(engine, family), logits_of(whole, family), rtol=2e-2, atol=2e-2)


@distributed(world_size=2)
def test_injection_policy():
    """DeepSpeed's own example: the layers of a T5 block whose outputs are summed."""
    from transformers.models.t5.modeling_t5 import T5Block

    policy = {T5Block: ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo")}
    _as_whole("t5", 2, injection_policy=policy, replace_with_kernel_inject=False)
    with pytest.raises(InferenceError, match="names o_proj, which T5Block has not; its linear layers"):
        deepspeedlite.init_inference(tiny("t5"), dtype="fp32", mp_size=2, injection_policy={T5Block: ("o_proj",)})
    with pytest.raises(InferenceError, match="names BertLayer, of which the model has none"):
        deepspeedlite.init_inference(tiny("t5"), dtype="fp32", mp_size=2, injection_policy={"BertLayer": ("o",)})


@distributed(world_size=2)
def test_by_the_models_parallel_unit_or_group():
    import torch.distributed as dist

    class Unit:
        def get_model_parallel_group(self) -> object:
            return dist.group.WORLD

        def get_model_parallel_world_size(self) -> int:
            return 2

    for given in ({"mpu": Unit()}, {"tensor_parallel": {"tp_group": dist.group.WORLD}}):
        model = tiny("llama")
        expected = logits_of(copy.deepcopy(model), "llama").detach()
        engine = deepspeedlite.init_inference(model, dtype=torch.float32, **given)
        assert engine.mp_world_size == 2
        torch.testing.assert_close(logits_of(engine, "llama"), expected, rtol=1e-5, atol=1e-5)


@distributed(world_size=2)
def test_any_module():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 15), torch.nn.GELU(), torch.nn.Linear(15, 4), torch.nn.LayerNorm(4))
    x = torch.randn(3, 8)
    expected = net(x).detach()
    engine = deepspeedlite.init_inference(net, dtype="fp32", mp_size=2)
    torch.testing.assert_close(engine(x), expected)
    assert engine.module[0].out_features in (7, 8)


@distributed(world_size=2)
def test_sampling_is_one_text_on_all_ranks():
    """Whatever the ranks' own random numbers are: those of the first count."""
    model = tiny("llama")
    whole = copy.deepcopy(model)
    engine = deepspeedlite.init_inference(model, dtype=torch.float32, mp_size=2)
    torch.manual_seed(7)
    wanted = whole.generate(**prompts(), max_new_tokens=6, do_sample=True)
    torch.manual_seed(7 + Group().rank)
    assert torch.equal(engine.generate(**prompts(), max_new_tokens=6, do_sample=True), wanted)
    beams = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    assert torch.equal(engine.generate(**prompts(), **beams), whole.generate(**prompts(), **beams))


@distributed(world_size=2)
def test_ranks_with_different_prompts():
    engine = deepspeedlite.init_inference(tiny("llama"), dtype=torch.float32, mp_size=2)
    mine = prompts()["input_ids"][:, : 5 + Group().rank]
    for call in (engine, engine.generate):
        with pytest.raises(
            DistributedError, match=r"different inputs: rank 0 \[\(2, 5\)\], others .*rank 1 \[\(2, 6\)\]"
        ):
            call(mine)
    assert engine.generate(**prompts(), max_new_tokens=1).shape == (2, 8)


@distributed(world_size=2)
def test_a_rank_that_generates_alone():
    """Hears it when the other cannot come any more, and is waited for as long as it may."""
    engine = deepspeedlite.init_inference(tiny("llama"), dtype=torch.float32, mp_size=2)
    group = Group()
    if group.rank == 0:
        told = patch.object(registry, "seen", lambda rank: "waits in torch.distributed.barrier")
        said = r"generate\(\) was called on rank 0 .*rank 1 waits in torch.dist"
        patient = patch("deepspeedlite.comm.roll_call.PATIENCE_S", 0.5)
        with told, patient, pytest.raises(DistributedError, match=said):
            engine.generate(**prompts(), max_new_tokens=1)
    group.barrier()
    if group.rank == 1:
        time.sleep(1.0)
    with patch("deepspeedlite.comm.roll_call.PATIENCE_S", 0.2):
        assert engine.generate(**prompts(), max_new_tokens=1).shape == (2, 8)


@distributed(world_size=2)
def test_a_rank_that_runs_a_pass_alone():
    """Hears the same, by the one message that a pass has for this; the ranks are out of step then."""
    own = dist.new_group([0, 1])
    engine = deepspeedlite.init_inference(tiny("llama"), dtype=torch.float32, tensor_parallel={"tp_group": own})
    group = Group()
    engine(**prompts())
    if group.rank == 0:
        told = patch.object(registry, "seen", lambda rank: "waits in torch.distributed.barrier")
        said = r"engine\(\) was called on rank 0 .*rank 1 waits in torch.dist.* cannot be used any more"
        start_s = time.monotonic()
        with told, patch("deepspeedlite.inference.checks.PATIENCE_S", 0.3), pytest.raises(DistributedError, match=said):
            engine(**prompts())
        assert 0.3 < time.monotonic() - start_s < 3
    group.barrier()
    time.sleep(0.4 * group.rank)  # late is not away
    with patch.object(registry, "seen", lambda rank: "waits in no collective, but is at its loader"):
        again = deepspeedlite.init_inference(tiny("llama"), dtype=torch.float32, mp_size=2)
        with patch("deepspeedlite.inference.checks.PATIENCE_S", 0.1):
            again(**prompts())


_SIX = {"num_attention_heads": 6, "hidden_size": 96}
_FIVE = {"num_attention_heads": 5, "hidden_size": 80}


@distributed(world_size=2)
def test_rank_that_cannot_make_its_part(tmp_path):
    """Ends the others with its reason; and so do models that differ."""
    rank = Group().rank
    if rank:
        values = {name: value.clone() for name, value in tiny("gpt2").state_dict().items()}
        save_file(values, tmp_path / "model.safetensors")
    folder = tmp_path if rank else tmp_path / "nowhere"
    errors = (CheckpointError, InferenceError)
    with pytest.raises(errors[0] if rank == 0 else errors[1], match=r"nowhere does not exist|rank 0 failed: Check"):
        deepspeedlite.init_inference(tiny("gpt2"), dtype="fp32", mp_size=2, checkpoint=folder)
    with pytest.raises(InferenceError, match="rank 0 a GPT2LMHeadModel, and rank 1 a LlamaForCausalLM"):
        deepspeedlite.init_inference(tiny("llama" if rank else "gpt2"), dtype="fp32", mp_size=2)


@pytest.mark.parametrize(
    "family, changes, said",
    [
        ("llama", {**_FIVE, "num_key_value_heads": 5}, r"0.self_attn has 5 heads, .*be 1, 5"),
        ("llama", {**_SIX, "num_key_value_heads": 3}, "3 heads of keys and values, and 2 ranks"),
        ("gpt2", {"n_head": 1}, "h.0.attn has 1 heads, which 2 ranks cannot share"),
    ],
)
@distributed(world_size=2)
def test_heads_that_cannot_be_shared(family, changes, said):
    model = tiny(family, **changes)
    with pytest.raises(InferenceError, match=said):
        deepspeedlite.init_inference(model, dtype=torch.float32, mp_size=2)
    assert not any(isinstance(part, ColumnParallelLinear) for part in model.modules())
    assert deepspeedlite.init_inference(model, dtype=torch.float32)(**prompts()).logits.shape == (2, 7, 99)


@distributed(world_size=2)
def test_what_cannot_be_split_is_named():
    torch.manual_seed(0)
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2), 2)
    odd = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 9))])}
    )
    for model, said in (
        (torch.nn.Linear(4, 4), r"Linear has no layers that can be split .*its linear layers are Linear"),
        (encoder, r"layers.0 is torch's TransformerEncoderLayer"),
        (odd, r"layers.0 \(Sequential\): 0 \(8 to 8\), 1 cannot be split"),
    ):
        with pytest.raises(InferenceError, match=said):
            deepspeedlite.init_inference(model, dtype="fp32", mp_size=2)
    with pytest.raises(ConfigError, match="2 ranks cannot be divided into groups of 4"):
        deepspeedlite.init_inference(tiny("llama"), dtype="fp32", mp_size=4)


@distributed(world_size=2)
def test_gradients_are_the_wholes():
    """The layers are for training too: this rank's part of every gradient is that of the whole model's."""
    for family in ("llama-tied", "gpt2", "t5"):
        model = tiny(family)
        whole = copy.deepcopy(model)
        said: list[str] = []
        pieces = split_model(model, Group(), say=said.append)
        assert any("2 layers" in line for line in said)
        for one in (model, whole):
            logits_of(one, family).square().mean().backward()
        expected = dict(whole.named_parameters(remove_duplicate=False))
        for name, param in model.named_parameters(remove_duplicate=False):
            grad = expected[name].grad
            part = pieces[name].of(grad) if name in pieces else grad
            torch.testing.assert_close(
                param.grad, part, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
