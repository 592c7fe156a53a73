"""BERT's layers replaced by ours and put back: same outputs and gradients, trained weights carried, clients' calls."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from harness import distributed
from tiny_transformers import VOCABULARY, tiny
from torch import nn
from torch.nn import functional as F

import deepspeedlite
from deepspeedlite import zero
from deepspeedlite.compat.module_inject import module_inject, replace_transformer_layer, revert_transformer_layer
from deepspeedlite.ops.transformer import DeepSpeedTransformerLayer
from deepspeedlite.runtime.errors import UnsupportedError

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def layer_class(family):
    from transformers.models.bert.modeling_bert import BertLayer
    from transformers.models.roberta.modeling_roberta import RobertaLayer

    return {"bert": BertLayer, "roberta": RobertaLayer}[family]


def batch():
    ids = torch.randint(2, VOCABULARY, (3, 21), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    return ids, mask


def layers_of(model):
    return model.base_model.encoder.layer


def replaced(model, family="bert", **more):
    return replace_transformer_layer(layer_class(family), copy.deepcopy(model), 3, model.config, **more)


@pytest.mark.parametrize("family, implementation", [("bert", "sdpa"), ("bert", "eager"), ("roberta", "sdpa")])
def test_a_replaced_model_is_the_same_function(family, implementation):
    """Outputs, hidden states and gradients, in a model that is used as before; and back to the bit."""
    model = tiny(family, attn_implementation=implementation)
    state = torch.get_rng_state()
    ours = replaced(model, family)
    assert torch.equal(torch.get_rng_state(), state) and not any(layer.training for layer in layers_of(ours))
    assert all(isinstance(layer, DeepSpeedTransformerLayer) for layer in layers_of(ours))
    again = pickle.loads(pickle.dumps(ours))
    ids, mask = batch()
    seen, each = mask.bool(), {"attention_mask": mask, "output_hidden_states": True}
    expected, found = model(ids, **each), ours(ids, **each)
    torch.testing.assert_close(found.logits[seen], expected.logits[seen], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    assert torch.equal(again(ids, attention_mask=mask).logits, found.logits)
    weight = torch.randn(found.logits.shape, generator=torch.Generator().manual_seed(2)) * mask[..., None]
    for output in (expected, found):
        (output.logits * weight).sum().backward()
    theirs = dict(model.named_parameters())
    back = revert_transformer_layer(layer_class(family), copy.deepcopy(ours), model.config)
    assert not any(module.training for module in back.modules())
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    for name, parameter in ours.named_parameters():
        if "layer." not in name:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-4)
    for layer, own in zip(layers_of(model), layers_of(ours), strict=True):
        attention = layer.attention.self
        fused = [getattr(attention, name).weight.grad for name in ("query", "key", "value")]
        torch.testing.assert_close(own.attn_qkvw.grad, torch.cat(fused), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own.attn_nb.grad, layer.attention.output.LayerNorm.bias.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own.inter_w.grad, layer.intermediate.dense.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_the_copy_has_the_attributes_of_the_layer():
    """Device of the weights, dtype, train or eval, what is frozen; and recomputation, which transformers ask for."""
    model = tiny("bert", **NO_DROPOUT).double().train()
    layers_of(model)[0].requires_grad_(False)
    ours = replaced(model)
    first, second = layers_of(ours)
    assert first.attn_qkvw.dtype == torch.float64 and first.training and not first.config.fp16
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert all(parameter.requires_grad for parameter in second.parameters())
    plain = ours(batch()[0]).logits
    ours.gradient_checkpointing_enable()
    assert second.gradient_checkpointing
    again = ours(batch()[0]).logits
    again.sum().backward()
    assert torch.equal(plain, again) and second.attn_qkvw.grad is not None
    back = revert_transformer_layer(layer_class("bert"), ours)
    assert {name for name, one in back.named_parameters() if not one.requires_grad} == {
        name for name, one in model.named_parameters() if not one.requires_grad
    }
    assert layers_of(back)[1].attention.self.layer_idx == 1


@pytest.mark.parametrize("stage", [1, 3])
@distributed(world_size=2)
def test_trained_weights_come_back(stage):
    """Two steps sharded, and put back, are two steps of the model as it was, unsharded."""
    model = tiny("bert", **NO_DROPOUT).train()
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0,
    }
    engine, *_ = deepspeedlite.initialize(model=replaced(model), config=config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ids, mask = batch()
    for _ in range(2):
        engine.backward(engine(ids, attention_mask=mask, labels=ids).loss)
        engine.step()
        optimizer.zero_grad()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        optimizer.step()
    if stage == 3:
        with pytest.raises(UnsupportedError, match="GatheredParameters"):
            revert_transformer_layer(layer_class("bert"), engine.module, model.config)
    with zero.GatheredParameters(list(engine.module.parameters())):
        back = revert_transformer_layer(layer_class("bert"), engine.module, model.config)
        state = {name: value.clone() for name, value in layers_of(back).state_dict().items()}
    for name, value in layers_of(model).state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_what_is_another_function_is_refused():
    layer = layer_class("bert")
    with pytest.raises(UnsupportedError, match="hidden_act='relu'"):
        replaced(tiny("bert", hidden_act="relu"))
    with pytest.raises(UnsupportedError, match="is_decoder"):
        replaced(tiny("bert", is_decoder=True))
    with pytest.raises(UnsupportedError, match="Linear has no BertLayer"):
        replace_transformer_layer(layer, nn.Linear(1, 1), config=SimpleNamespace())
    with pytest.raises(UnsupportedError, match="has no BertLayer"):
        replace_transformer_layer(layer, replaced(tiny("bert")))  # twice
    with pytest.raises(UnsupportedError, match="no DeepSpeedTransformerLayer"):
        revert_transformer_layer(layer, tiny("bert"))
    with pytest.raises(UnsupportedError, match="init_inference"):
        replace_transformer_layer(layer, tiny("bert"), None, SimpleNamespace(), tiny("bert").config)
    partly = tiny("bert")
    layers_of(partly)[0].attention.self.query.weight.requires_grad_(False)
    with pytest.raises(UnsupportedError, match="freeze all of them or none"):
        replaced(partly)
    ours = layers_of(replaced(tiny("bert")))[0]
    with pytest.raises(UnsupportedError, match="takes no cache"):
        ours(torch.zeros(1, 2, 64), None, cache=object())


# --- layers with norms before, as NVIDIA's BERT has ------------------------------------------------------------------


class Activated(nn.Linear):
    def forward(self, x):
        return F.gelu(super().forward(x))


class BertLayer(nn.Module):
    """The parts and names of DeepSpeedExamples' modelingpreln, computed in the plainest way."""

    def __init__(self, config):
        super().__init__()
        wide, self.heads = config.hidden_size, config.num_attention_heads
        self.attention = nn.Module()
        self.attention.self, self.attention.output = nn.Module(), nn.Module()
        for name in ("query", "key", "value"):
            setattr(self.attention.self, name, nn.Linear(wide, wide))
        self.attention.output.dense = nn.Linear(wide, wide)
        self.intermediate, self.output = nn.Module(), nn.Module()
        self.intermediate.dense_act = Activated(wide, config.intermediate_size)
        self.output.dense = nn.Linear(config.intermediate_size, wide)
        self.PreAttentionLayerNorm = nn.LayerNorm(wide, eps=1e-12)
        self.PostAttentionLayerNorm = nn.LayerNorm(wide, eps=1e-12)

    def forward(self, hidden_states, attention_mask):
        x = self.PreAttentionLayerNorm(hidden_states)
        parts = (getattr(self.attention.self, name)(x) for name in ("query", "key", "value"))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        context = F.scaled_dot_product_attention(q, k, v, attention_mask).transpose(1, 2).flatten(2)
        hidden_states = hidden_states + self.attention.output.dense(context)
        return hidden_states + self.output.dense(
            self.intermediate.dense_act(self.PostAttentionLayerNorm(hidden_states))
        )


CONFIG = SimpleNamespace(
    hidden_size=32,
    intermediate_size=96,
    num_attention_heads=4,
    num_hidden_layers=2,
    initializer_range=0.02,
    hidden_act="gelu",
    **NO_DROPOUT,
)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(CONFIG) for _ in range(2))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x, mask):
        for layer in self.layer:
            x = layer(x, mask)
        return x


@pytest.mark.parametrize(
    "call",
    [
        lambda model: replace_transformer_layer(BertLayer, model, 2, CONFIG, 1234, 512, True, False),  # DeepSpeed 0.3.0
        lambda model: replace_transformer_layer(
            BertLayer, model, micro_batch_size=2, bert_config=CONFIG, seed=3, preln=True, fp16=False, huggingface=False
        ),
        lambda model: module_inject(BertLayer, model, CONFIG, 2, 512, 1234, True),  # the first of all
    ],
)
def test_norms_before(call):
    torch.manual_seed(0)
    model = Encoder()
    x, mask = torch.randn(2, 10, 32), torch.zeros(2, 1, 1, 10)
    mask[0, ..., 7:] = -10000.0
    expected = model(x, mask)
    ours = call(copy.deepcopy(model))
    assert all(layer.config.pre_layer_norm for layer in ours.layer)
    torch.testing.assert_close(ours(x, mask), expected, rtol=1e-5, atol=1e-5)
    back = revert_transformer_layer(BertLayer, ours, CONFIG, preln=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(back.get_parameter(name), parameter), name


def test_as_numentas_nupic_does():
    """By the root's name, with a policy that is not here, for a model's base; its layers taken up by indices."""
    from deepspeedlite.module_inject import HFBertLayerPolicy
    from transformers import BertLayer as Original

    model = tiny("bert").base_model
    ids, mask = batch()
    expected = model(ids, attention_mask=mask)[0]
    made = deepspeedlite.replace_transformer_layer(
        Original, model, policy=HFBertLayerPolicy, fp16=False, config=model.config, training=True, encoder_decoder=True
    )
    assert made is model and made.encoder.layer[1].attn_qkvw.shape == (192, 64)
    torch.testing.assert_close(made(ids, attention_mask=mask)[0][mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
    deepspeedlite.revert_transformer_layer(Original, made, made.config)
    assert type(made.encoder.layer[0]) is Original
