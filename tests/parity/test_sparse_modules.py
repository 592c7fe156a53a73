"""Sparse attention's modules beside dense ones with the pattern as a mask, in transformers' models, as clients do."""

from __future__ import annotations

import copy
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from harness import distributed
from pairwise import each_pair
from tiny_transformers import VOCABULARY, tiny
from torch import nn
from torch.nn.functional import pad

import deepspeedlite
from deepspeedlite.compat.config import DeepSpeedConfig
from deepspeedlite.ops.sparse_attention import (
    BertSparseSelfAttention,
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    SparseAttentionUtils,
    SparseSelfAttention,
    VariableSparsityConfig,
    sparsity_of,
)
from deepspeedlite.runtime.errors import ConfigError, UnsupportedError

BATCH, HEADS, LENGTH, DIM, BLOCK = 2, 4, 64, 8, 16
PATTERNS = {
    "fixed": FixedSparsityConfig(HEADS, BLOCK, num_local_blocks=2),
    "heads": FixedSparsityConfig(HEADS, BLOCK, True, 2, num_different_global_patterns=2, attention="unidirectional"),
    "random": BigBirdSparsityConfig(HEADS, BLOCK, True, num_sliding_window_blocks=1),
    "local": LocalSlidingWindowSparsityConfig(HEADS, BLOCK),
}


def drawn(*shape, seed=0, grad=False):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def entries(pattern, length=LENGTH):
    """Bool `[heads, L, L]`: which scores the pattern keeps."""
    return torch.kron(pattern.make_layout(length), torch.ones(BLOCK, BLOCK, dtype=torch.int64)).bool()


def dense(q, k, v, kept, *added):
    """softmax(q k^T / sqrt(dim) + added) v where `kept`, in float64; rows that see nothing give zeros."""
    q, k, v = (one.double() for one in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    for one in added:
        scores = scores + one.double()
    weights = scores.masked_fill(~kept, -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights @ v


def hiding(zeros_and_ones):
    return torch.zeros_like(zeros_and_ones).masked_fill(zeros_and_ones == 0, -torch.inf)


@each_pair(
    pattern=list(PATTERNS),
    key_mode=["add", "mul", None],
    mask_mode=["add", "mul", None],
    with_rpe=[False, True],
    transposed_key=[False, True],
)
def test_the_module_is_its_definition(pattern, key_mode, mask_mode, with_rpe, transposed_key):
    """Forward, and the gradients of queries, keys and values, with DeepSpeed's meaning of each mask."""
    chosen = PATTERNS[pattern]
    q, k, v = (drawn(BATCH, HEADS, LENGTH, DIM, seed=seed, grad=True) for seed in range(3))
    ones = (drawn(LENGTH, LENGTH, seed=5) > -1).float()
    padding = torch.ones(BATCH, LENGTH)
    padding[1, 40:] = 0
    key_mask = {"add": (1 - padding) * -10000.0, "mul": padding, None: None}[key_mode]
    mask = {"add": drawn(LENGTH, LENGTH, seed=6), "mul": ones, None: None}[mask_mode]
    rpe = drawn(1, HEADS, LENGTH, LENGTH, seed=7) if with_rpe else None
    module = SparseSelfAttention(chosen, key_mode or "add", mask_mode or "add", max_seq_length=2 * LENGTH)
    with torch.no_grad():
        module.master_layout[:, : LENGTH // BLOCK, : LENGTH // BLOCK] = chosen.make_layout(LENGTH).bool()
    given_key = k.mT.contiguous() if transposed_key else k
    given_mask = None if key_mask is None else key_mask[:, None, None, :]
    found = module(q, given_key, v, rpe, given_mask, None if mask is None else mask[None, None])
    added = [
        *([] if rpe is None else [rpe]),
        *([] if key_mask is None else [(hiding(key_mask) if key_mode == "mul" else key_mask)[:, None, None]]),
        *([] if mask is None else [hiding(mask) if mask_mode == "mul" else mask]),
    ]
    expected = dense(q, k, v, entries(chosen), *added)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    weight = drawn(*found.shape, seed=8)
    ours = torch.autograd.grad((found * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_padding_may_be_given_by_head():
    """As AlphaFold2's public implementation does, which repeats it; heads may differ."""
    q, k, v = (drawn(BATCH, HEADS, LENGTH, DIM, seed=seed) for seed in range(3))
    module = SparseSelfAttention(PATTERNS["fixed"], "mul", max_seq_length=LENGTH)
    padding = torch.ones(BATCH, HEADS, LENGTH)
    padding[1, :, 40:] = padding[0, 2, 50:] = 0
    expected = dense(q, k, v, entries(PATTERNS["fixed"]), hiding(padding)[:, :, None])
    torch.testing.assert_close(module(q, k, v, key_padding_mask=padding).double(), expected, rtol=1e-5, atol=1e-5)


def test_causal_hides_later_tokens_of_the_diagonal():
    q, k, v = (drawn(1, HEADS, LENGTH, DIM, seed=seed) for seed in range(3))
    module = SparseSelfAttention(PATTERNS["local"], max_seq_length=LENGTH, causal=True)
    expected = dense(q, k, v, entries(PATTERNS["local"]).tril())
    torch.testing.assert_close(module(q, k, v).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_layout_is_part_of_the_state():
    """DeepSpeed's checkpoints hold the random blocks that a model was trained with, as int64; they replace our own."""
    length, blocks = 2 * LENGTH, 2 * LENGTH // BLOCK
    module = SparseSelfAttention(BigBirdSparsityConfig(HEADS, BLOCK), max_seq_length=2 * length)
    q, k, v = (drawn(1, HEADS, length, DIM, seed=seed) for seed in range(3))
    before = module(q, k, v)
    theirs = BigBirdSparsityConfig(HEADS, BLOCK, seed=7).make_layout(2 * length)
    module.load_state_dict({"master_layout": theirs})
    shorter = theirs[:, :blocks, :blocks]
    assert torch.equal(module.get_layout(length).long(), shorter) and not torch.equal(module(q, k, v), before)
    kept = torch.kron(shorter, torch.ones(BLOCK, BLOCK, dtype=torch.int64)).bool()
    torch.testing.assert_close(module(q, k, v).double(), dense(q, k, v, kept), rtol=1e-5, atol=1e-5)
    again = copy.deepcopy(module)
    assert torch.equal(again(q, k, v), module(q, k, v))


def test_what_cannot_be_is_said(caplog):
    module = SparseSelfAttention(PATTERNS["fixed"], max_seq_length=LENGTH)
    q = drawn(1, HEADS, LENGTH, DIM)
    with pytest.raises(ValueError, match="pad_to_block_size"):
        module(q[:, :, :-1], q[:, :, :-1], q[:, :, :-1])
    with pytest.raises(ValueError, match="max_seq_length=64"):
        module(*(torch.cat([q, q], 2),) * 3)
    with pytest.raises(UnsupportedError, match="self-attention"):
        module(q, q, q[:, :1])
    with pytest.raises(ValueError, match="one of add, mul"):
        SparseSelfAttention(PATTERNS["fixed"], attn_mask_mode="times")
    with pytest.raises(ValueError, match=r"shape \[1, 1, 3\]"):
        module(q, q, q, key_padding_mask=torch.ones(1, 1, 3))
    with pytest.raises(ValueError, match="the pattern is for 4 heads"):
        BertSparseSelfAttention(SimpleNamespace(hidden_size=16, num_attention_heads=2), PATTERNS["fixed"])
    with pytest.raises(ValueError, match="does not divide hidden_size=30"):
        BertSparseSelfAttention(SimpleNamespace(hidden_size=30, num_attention_heads=4))
    with caplog.at_level(logging.INFO):
        module(q, q, q, key_padding_mask=torch.ones(1, LENGTH, dtype=torch.bool))
    assert "hides nothing" in caplog.text


# --- transformers' models ---------------------------------------------------------------------------------------------

TOKENS = 50  # no multiple of the block


def batch(tokens=TOKENS):
    ids = torch.randint(2, VOCABULARY, (BATCH, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, tokens - 9 :] = 0
    return ids, mask


def sparse_of(model, pattern, longest=LENGTH):
    made = copy.deepcopy(model)
    return SparseAttentionUtils.replace_model_self_attention_with_sparse_self_attention(made, longest, pattern)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_dense_layout_changes_nothing(family, implementation):
    """In a model of transformers: the same parameters, the same outputs with padding and without, at any length."""
    model = tiny(family, max_position_embeddings=LENGTH + 2, attn_implementation=implementation)
    sparse = sparse_of(model, DenseSparsityConfig(HEADS, BLOCK))
    names = {name for name, _ in sparse.named_parameters()}
    assert names == {name for name, _ in model.named_parameters()}
    ids, mask = batch()
    for given in ({}, {"attention_mask": mask}):
        expected, found = model(ids, **given).logits, sparse(ids, **given).logits
        seen = given.get("attention_mask", torch.ones_like(ids)).bool()
        torch.testing.assert_close(found[seen], expected[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_pattern_is_the_model_with_that_mask(family):
    """The oracle is the model as it was, given the pattern as a mask `[batch, heads, L, L]`; gradients too."""
    model = tiny(family, max_position_embeddings=LENGTH + 2)
    pattern = PATTERNS["heads"]
    sparse = sparse_of(model, pattern)
    ids, mask = batch(LENGTH)
    kept = entries(pattern)[None] & mask[:, None, None].bool()
    positions = {} if family == "bert" else {"position_ids": torch.arange(2, LENGTH + 2)[None]}
    expected = model(ids, attention_mask=kept, **positions).logits
    found = sparse(ids, attention_mask=mask, **positions).logits
    seen = mask.bool()
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-5, atol=1e-5)
    weight = drawn(*found.shape) * mask[..., None]
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    ours = dict(sparse.named_parameters())
    for name, parameter in model.named_parameters():
        found = ours[name].grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_layers_have_random_blocks_of_their_own_and_the_models_dropout():
    model = tiny("bert", attention_probs_dropout_prob=0.5)
    sparse = sparse_of(model, BigBirdSparsityConfig(HEADS, BLOCK), 1024)
    layouts = [layer.attention.self.sparse_self_attention.master_layout for layer in sparse.bert.encoder.layer]
    assert layouts[0].shape[-1] >= 1024 // BLOCK and not torch.equal(*layouts)
    attention = sparse.bert.encoder.layer[0].attention.self
    x = drawn(1, 32, 64)
    assert torch.equal(attention(x)[0], attention(x)[0])
    attention.train()
    assert not torch.equal(attention(x)[0], attention(x)[0])


def test_masks_that_differ_between_queries_are_refused():
    sparse = sparse_of(tiny("bert"), DenseSparsityConfig(HEADS, BLOCK))
    ids, _ = batch(LENGTH)
    rows = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    with pytest.raises(UnsupportedError, match="differs between queries"):
        sparse(ids, attention_mask=rows)
    with pytest.raises(UnsupportedError, match="is_decoder"):
        sparse_of(tiny("bert", is_decoder=True), DenseSparsityConfig(HEADS, BLOCK))
    with pytest.raises(UnsupportedError, match="Linear is neither"):
        SparseAttentionUtils.extend_position_embedding(nn.Linear(1, 1), 3)


@pytest.mark.parametrize("family, reserved", [("bert", 0), ("roberta", 2)])
def test_positions_are_repeated(family, reserved):
    """To the number asked for; the model then takes inputs of that length, and knows it."""
    whole = tiny(family)
    for model in (whole, tiny(family).base_model):
        table = model.base_model.embeddings.position_embeddings
        before, held = table.weight.detach().clone(), table.weight.shape[0] - reserved
        assert SparseAttentionUtils.extend_position_embedding(model, 150) is model
        table = model.base_model.embeddings.position_embeddings
        assert table.num_embeddings == 150 + reserved and table.weight.requires_grad
        assert table.weight.shape[0] == 150 + reserved == model.config.max_position_embeddings
        for position in (0, 1, held, 149):
            assert torch.equal(table.weight[position + reserved], before[position % held + reserved])
        assert torch.equal(table.weight[:reserved], before[:reserved])
        assert model(torch.full((1, 150), 5))[0].shape[1] == 150
        with pytest.raises(ConfigError, match="150 positions already"):
            SparseAttentionUtils.extend_position_embedding(model, 100)
    with pytest.raises((IndexError, RuntimeError), match=r"out of|must match"):
        whole(torch.full((1, 151), 5))


def test_a_tokenizer_is_told():
    tokenizer = SimpleNamespace(model_max_length=512, init_kwargs={"model_max_length": 512})
    assert SparseAttentionUtils.update_tokenizer_model_max_length(tokenizer, 4096) is tokenizer
    assert tokenizer.model_max_length == tokenizer.init_kwargs["model_max_length"] == 4096


def test_padding_to_the_block_and_back():
    ids, mask = torch.full((2, 21), 7), torch.ones(2, 21, dtype=torch.long)
    embeddings = nn.Embedding(9, 3)
    given = (ids, mask, torch.ones_like(ids), torch.arange(21).expand(2, 21), embeddings(ids))
    rest, *padded = SparseAttentionUtils.pad_to_block_size(16, *given, 5, embeddings)
    assert rest == 11
    for before, after, filled in zip(given, padded, [5, 0, 0, 5, embeddings.weight[5]], strict=True):
        assert after.shape[:2] == (2, 32)
        assert torch.equal(SparseAttentionUtils.unpad_sequence_output(rest, after), before)
        assert bool((after[:, 21:] == filled).all())
    same = SparseAttentionUtils.pad_to_block_size(7, ids, None, None, None, None, 5, None)
    assert same[0] == 0 and same[1] is ids and same[2:] == (None,) * 4
    assert SparseAttentionUtils.unpad_sequence_output(0, ids).shape == ids.shape
    made = SparseAttentionUtils.pad_to_block_size(16, ids, None, None, None, None, 5, None)[2]
    assert torch.equal(made, pad(mask, (0, 11)))
    added = torch.zeros(2, 1, 1, 21)  # as models extend a mask of ones: what is added to scores
    longer = SparseAttentionUtils.pad_to_block_size(16, ids, added, None, None, None, 5, None)[2]
    assert longer.shape == (2, 1, 1, 32) and bool((longer[..., 21:] < -1e9).all()) and not longer[..., :21].any()
    with pytest.raises(ConfigError, match="input_ids or inputs_embeds"):
        SparseAttentionUtils.pad_to_block_size(16, None, mask, None, None, None, 5, None)


@distributed(world_size=2)
def test_it_trains_sharded():
    """By the configuration's section, at stage 3: as the same model does unsharded, and saved and loaded with it."""
    section = {"mode": "bigbird", "block": BLOCK, "num_random_blocks": 1}
    sgd = {"type": "SGD", "params": {"lr": 0.1}}
    config = {"train_micro_batch_size_per_gpu": BATCH, "optimizer": sgd, "zero_optimization": {"stage": 3}}
    config |= {"sparse_attention": section, "gradient_clipping": 0}
    pattern = sparsity_of(deepspeedlite.config.load_config(config).sparse_attention, HEADS)
    alone = sparse_of(tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), pattern).train()
    engine, *_ = deepspeedlite.initialize(model=copy.deepcopy(alone), config=config)
    assert vars(sparsity_of(engine.sparse_attention(), HEADS)) == vars(pattern) and pattern.num_random_blocks == 1
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    ids, mask = batch(LENGTH)
    for _ in range(2):
        loss = engine(ids, attention_mask=mask, labels=ids).loss
        engine.backward(loss)
        engine.step()
        expected = alone(ids, attention_mask=mask, labels=ids).loss
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


# --- clients ----------------------------------------------------------------------------------------------------------


def test_as_bing_bert_does(tmp_path):
    """Of DeepSpeedExamples: the section of its file, a class chosen by the mode, an additive mask, padding and back."""
    file = tmp_path / "config.json"
    keys = {
        "block": BLOCK,
        "different_layout_per_head": True,
        "num_local_blocks": 2,
        "num_different_global_patterns": 2,
    }
    file.write_text(json.dumps({"train_batch_size": 1, "sparse_attention": {"mode": "fixed", **keys}}))
    found = DeepSpeedConfig(str(file)).sparse_attention
    assert found.pop("mode") == "fixed"
    pattern = FixedSparsityConfig(num_heads=HEADS, **found)
    attention = BertSparseSelfAttention(
        SimpleNamespace(hidden_size=HEADS * DIM, num_attention_heads=HEADS), sparsity_config=pattern
    )
    ids = torch.ones(BATCH, 41, dtype=torch.long)
    added = (1.0 - torch.ones(BATCH, 1, 1, 41)) * -10000.0
    rest, ids, added, kinds, positions, embedded = SparseAttentionUtils.pad_to_block_size(
        block_size=pattern.block,
        input_ids=ids,
        attention_mask=added,
        token_type_ids=torch.zeros_like(ids),
        position_ids=None,
        inputs_embeds=None,
        pad_token_id=0,
        model_embeddings=None,
    )
    hidden = drawn(BATCH, ids.shape[1], HEADS * DIM)
    context = SparseAttentionUtils.unpad_sequence_output(rest, attention(hidden, added))
    q, k, v = (
        project(hidden).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        for project in (attention.query, attention.key, attention.value)
    )
    kept = entries(pattern, 2048)[:, :48, :48] & (torch.arange(48) < 41)
    expected = dense(q, k, v, kept).transpose(1, 2).flatten(2)[:, :41]
    assert rest == 7 and kinds.shape == ids.shape and positions is embedded is None
    torch.testing.assert_close(context.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sparse_fixed", "sparse_variable", "local", "bigbird", "bslongformer"])
def test_as_gpt_neox_does(kind):
    """All its types, its imports' paths, its `mpu`, and a mask of true where a token is later, times -10000."""
    from deepspeedlite.ops.sparse_attention.sparse_self_attention import SparseSelfAttention
    from deepspeedlite.ops.sparse_attention.sparsity_config import LocalSlidingWindowSparsityConfig

    common = {"num_heads": HEADS, "block": 16, "attention": "unidirectional"}
    each = {"different_layout_per_head": False}
    made = {
        "sparse_fixed": lambda: FixedSparsityConfig(
            **common,
            **each,
            num_local_blocks=4,
            num_global_blocks=1,
            num_different_global_patterns=1,
            horizontal_global_attention=False,
        ),
        "sparse_variable": lambda: VariableSparsityConfig(
            **common,
            **each,
            num_random_blocks=0,
            local_window_blocks=[4],
            global_block_indices=[0],
            global_block_end_indices=None,
            horizontal_global_attention=False,
        ),
        "local": lambda: LocalSlidingWindowSparsityConfig(**common, num_sliding_window_blocks=4),
        "bigbird": lambda: BigBirdSparsityConfig(
            **common, **each, num_random_blocks=1, num_sliding_window_blocks=3, num_global_blocks=1
        ),
        "bslongformer": lambda: BSLongformerSparsityConfig(
            **common,
            **each,
            num_sliding_window_blocks=3,
            global_block_indices=[0],
            global_block_end_indices=None,
        ),
    }[kind]()
    attention = SparseSelfAttention(sparsity_config=made, max_seq_length=128, attn_mask_mode="add", mpu=object())
    q, k, v = (drawn(128, BATCH, HEADS, DIM, seed=seed).permute(1, 2, 0, 3).contiguous() for seed in range(3))
    later = torch.ones(1, 1, 128, 128).triu(1).bool()
    found = attention(q, k, v, attn_mask=later.to(q.dtype) * -10000, rpe=None)
    expected = dense(q, k, v, entries(made, 128) & ~later[0])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_as_dalle_pytorch_does():
    """Random blocks by the quarter, a dict's keys for the text's blocks, half of the least number in the mask."""
    length, text = 128, 40
    attention = SparseSelfAttention(
        sparsity_config=VariableSparsityConfig(
            num_heads=HEADS,
            block=16,
            num_random_blocks=length // 16 // 4,
            global_block_indices={place // 16: True for place in range(text)}.keys(),
            attention="unidirectional",
        ),
        max_seq_length=length,
        attn_mask_mode="add",
    )
    q, k, v = (drawn(BATCH, HEADS, length, DIM, seed=seed) for seed in range(3))
    later = torch.ones(length, length).triu(1).bool()
    mask = torch.zeros(length, length).masked_fill(later, -torch.finfo(torch.float32).max / 2)
    padded = torch.zeros(BATCH, length).bool()
    padded[1, 100:] = True
    found = attention(q, k, v, attn_mask=mask, key_padding_mask=padded)
    kept = entries(attention.sparsity_config, length) & ~later
    torch.testing.assert_close(
        found.double(), dense(q, k, v, kept, padded.float()[:, None, None]), rtol=1e-5, atol=1e-5
    )


def test_as_affinity_pred_does():
    """Projections put into a module of one's own making, and an encoder that is called by itself."""
    model = tiny("bert", max_position_embeddings=LENGTH).base_model
    ids, mask = batch(LENGTH)
    expected = model(ids, attention_mask=mask)[0]
    from deepspeedlite.ops.sparse_attention.bert_sparse_self_attention import EncoderSparseSelfAttention

    for layer in model.encoder.layer:
        sparse = EncoderSparseSelfAttention(
            config=model.config, sparsity_config=DenseSparsityConfig(HEADS, BLOCK), max_seq_length=LENGTH
        )
        for name in ("query", "key", "value"):
            setattr(sparse, name, getattr(layer.attention.self, name))
        layer.attention.self = sparse.eval()
    extended = (1.0 - mask[:, None, None].float()) * torch.finfo(torch.float32).min  # as transformers' helper did
    found = model.encoder(model.embeddings(input_ids=ids), attention_mask=extended)[0]
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
