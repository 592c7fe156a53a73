"""`init_inference` on one rank: what it takes, what its engine does, and what it says of mistakes."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import deepspeedlite
from deepspeedlite.inference.config import DeepSpeedInferenceConfig, read_inference_config
from deepspeedlite.runtime.errors import (
    ConfigError,
    EngineStateError,
    InferenceError,
    UnsupportedError,
)


def net(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
    )


def x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


# --- the configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, path, value",
    [
        ({"kernel_inject": True}, "replace_with_kernel_inject", True),
        ({"mp_size": 2}, "tensor_parallel.tp_size", 2),
        ({"tp": {"tp_size": 2}}, "tensor_parallel.tp_size", 2),
        ({"mp_size": 2, "tensor_parallel": {"tp_size": 2}}, "tensor_parallel.tp_size", 2),
        ({"dtype": torch.half}, "dtype", "fp16"),
        ({"dtype": "torch.bfloat16"}, "dtype", "bf16"),
        ({"dtype": "float"}, "dtype", "fp32"),
        ({"dtype": torch.int8}, "dtype", "int8"),
        ({}, "dtype", "fp16"),
        ({"max_tokens": 7, "min_tokens": 3}, "max_out_tokens", 7),
        ({"injection_dict": {torch.nn.ReLU: ("a",)}}, "injection_policy", {torch.nn.ReLU: ("a",)}),
        ({"moe": False}, "moe.enabled", False),
        ({"cpu_offload": False}, "keep_module_on_host", False),
        ({"moe_experts": [4]}, "moe.moe_experts", [4]),
        ({"ckpt_config": {"base_dir": "/x"}}, "checkpoint_config.base_dir", "/x"),
        ({"quant": {"weight": {"num_bits": 4}}}, "quant.weight.num_bits", 4),
    ],
)
def test_spellings(given, path, value):
    """Given as keywords, as a dict, and to the class itself."""
    for made in (
        read_inference_config(None, given),
        read_inference_config(given, {}),
        DeepSpeedInferenceConfig(**given),
    ):
        found = made
        for name in path.split("."):
            found = getattr(found, name)
        assert found == value


def test_keywords_go_before_the_configuration(tmp_path):
    file = tmp_path / "inference.json"
    file.write_text(json.dumps({"dtype": "fp16", "tensor_parallel": {"tp_size": 4, "enabled": False}}))
    made = read_inference_config(str(file), {"dtype": torch.float32, "mp_size": 2})
    assert (made.dtype, made.tensor_parallel.tp_size, made.tensor_parallel.enabled) == ("fp32", 2, False)
    assert read_inference_config(made, {}) is made
    assert read_inference_config(made, {"dtype": "bf16"}).tensor_parallel.tp_size == 2


@pytest.mark.parametrize(
    "given, said",
    [
        ({"dtypo": "fp16"}, "dtypo = .*unknown key; did you mean dtype?"),
        ({"dtype": "fp64"}, 'dtype = "fp64": must be "fp32"'),
        ({"mp_size": "2"}, 'mp_size = "2": must be a whole number'),
        ({"tp": {"tp_sise": 2}}, r"tp.tp_sise = 2: unknown key; did you mean .*tp_size\?"),
        (
            {"mp_size": 2, "tensor_parallel": {"tp_size": 4}},
            "mp_size = 2: is another spelling of tensor_parallel.tp_size",
        ),
        ({"quant": {"weight": {"num_bits": 3}}}, "quant.weight.num_bits = 3: must be 8 or 4"),
        ({"use_triton": True}, "use_triton = true: there are none"),
        ({"cpu_offload": True}, "cpu_offload = true: DeepSpeed has this key no more; give zero: .*offload_param"),
        ({"ep_size": 2}, "ep_size = 2: expert parallelism is not in this release"),
        ({"training_mp_size": 2}, "training_mp_size = 2: pieces of a Megatron-style training"),
        ({"max_out_tokens": 0}, "max_out_tokens = 0: must be a whole number > 0"),
        ({"mp_size": 2}, "tp_size = 2: 1 rank cannot be divided into groups of 2"),
    ],
)
def test_mistakes_are_named(given, said):
    with pytest.raises(ConfigError, match=said):
        deepspeedlite.init_inference(net(), **{"dtype": "fp32", **given})


def test_all_mistakes_at_once():
    with pytest.raises(ConfigError) as told:
        deepspeedlite.init_inference(net(), {"dtypo": 1, "mp_size": "x"}, use_triton=True)
    assert "3 faults" in str(told.value)


def test_model_must_be_a_module():
    with pytest.raises(ConfigError, match=r"needs model=, a torch.nn.Module; got dict"):
        deepspeedlite.init_inference({}, dtype="fp32")


def test_dtype_that_the_device_cannot_do(monkeypatch):
    def refuse(*_args: object, **_kwargs: object) -> torch.Tensor:
        raise RuntimeError('"addmm_impl" not implemented for Half')

    monkeypatch.setattr(torch.nn.functional, "linear", refuse)
    with pytest.raises(UnsupportedError, match=r"dtype torch.float16 cannot be computed with on cpu"):
        deepspeedlite.init_inference(net())


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_the_modules(dtype):
    model = net().eval()
    expected = copy.deepcopy(model).to(dtype)(x(dtype))
    engine = deepspeedlite.init_inference(model, dtype=dtype)
    out = engine(x(dtype))
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=0)
    assert not out.requires_grad and engine.module is model and not engine.training


def test_attributes_are_the_modules():
    model = net()
    model.note = "mine"
    engine = deepspeedlite.init_inference(model, dtype="fp32")
    assert engine.note == "mine" and len(list(engine.parameters())) == 6
    with pytest.raises(AttributeError, match="no_such"):
        engine.no_such  # noqa: B018
    with pytest.raises(InferenceError, match="Sequential has no generate"):
        engine.generate(x())


def test_training_calls_say_what_to_do():
    engine = deepspeedlite.init_inference(net(), dtype="fp32")
    for call in (engine.train, engine.step, lambda: engine.backward(torch.ones(()))):
        with pytest.raises(EngineStateError, match=r"does not train: .*deepspeedlite.initialize\(model="):
            call()
    assert engine.train(False) is engine and engine.eval() is engine
    assert engine(x()).shape == (5, 4)


def test_times_of_passes():
    engine = deepspeedlite.init_inference(net(), dtype="fp32")
    with pytest.raises(EngineStateError, match="profile_model_time"):
        engine.model_times()
    engine.profile_model_time()
    engine.profile_model_time(use_cuda_events=False)
    engine(x()), engine(x())
    assert len(times := engine.model_times()) == 2 and min(times) > 0
    assert engine.model_times() == []


def test_compile_once(monkeypatch):
    engine = deepspeedlite.init_inference(net(), dtype="fp32")
    expected = engine(x())
    assert not engine.is_compiled
    engine.compile(backend="eager")
    engine.compile()
    assert engine.is_compiled
    torch.testing.assert_close(engine(x()), expected)


def test_destroyed():
    model = net().eval()
    engine = deepspeedlite.init_inference(model, dtype="fp32")
    engine.profile_model_time()
    engine.destroy(), engine.destroy()
    for call in (lambda: engine(x()), engine.compile, lambda: engine.generate(x())):
        with pytest.raises(EngineStateError, match="after destroy"):
            call()
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert model(x()).shape == (5, 4)


def test_second_engine_of_one_model():
    """In the same settings both run the model; in others the second runs a copy, and the first goes on."""
    model = net().eval()
    expected = model(x()).detach()
    first = deepspeedlite.init_inference(model, dtype="fp32")
    assert deepspeedlite.init_inference(model, dtype="fp32").module is model
    other = deepspeedlite.init_inference(model, dtype="bf16")
    assert other.module is not model and other(x(torch.bfloat16)).dtype == torch.bfloat16
    torch.testing.assert_close(first(x()), expected, rtol=0, atol=0)
    first.destroy()
    del first
    assert deepspeedlite.init_inference(other.module, dtype="bf16").module is other.module
    again = deepspeedlite.init_inference(other, dtype="bf16")
    assert again.module is other.module


@pytest.mark.parametrize("given, is_another", [({"kernel_inject": True}, True), ({"dtype": "int8"}, True), ({}, False)])
def test_saving_a_model_that_is_another_one_now(given, is_another, tmp_path):
    """Is refused: transformers would read hardly any of its weights, with a warning."""
    pytest.importorskip("transformers")
    from tiny_transformers import logits_of, tiny

    engine = deepspeedlite.init_inference(tiny("llama"), **{"dtype": "fp32", **given})
    if is_another:
        for call in (
            engine.save_pretrained,
            engine.module.save_pretrained,
            copy.deepcopy(engine.module).save_pretrained,
        ):
            with pytest.raises(InferenceError, match="save it before init_inference"):
                call(tmp_path)
        assert not list(tmp_path.iterdir())
    else:
        engine.save_pretrained(tmp_path)
        again = type(engine.module).from_pretrained(tmp_path)
        assert torch.equal(logits_of(again, "llama"), logits_of(engine, "llama"))


def test_empty_tensors_need_a_checkpoint():
    with torch.device("meta"):
        model = torch.nn.Linear(4, 4)
    with pytest.raises(InferenceError, match=r"2 tensors of the model have no values .*weight; give checkpoint="):
        deepspeedlite.init_inference(model, dtype="fp32")


def test_under_deepspeeds_name():
    from deepspeedlite.inference import DeepSpeedTPConfig
    from deepspeedlite.inference.config import DtypeEnum
    from deepspeedlite.inference.engine import InferenceEngine

    engine = InferenceEngine(
        net(), config=DeepSpeedInferenceConfig(dtype=torch.float32, tp=DeepSpeedTPConfig(tp_size=1))
    )
    assert isinstance(engine, deepspeedlite.InferenceEngine)
    assert DtypeEnum.from_str("half") is DtypeEnum.fp16
    halved = deepspeedlite.init_inference(net(), deepspeedlite.default_inference_config())
    assert halved.module[0].weight.dtype == torch.half
