"""The configuration: every fault is reported at once, by path, with its remedy; what is right is read as DeepSpeed
reads it; the batch triangle agrees with brute force; nothing but ConfigError ever comes out of a bad file.
"""

from __future__ import annotations

import base64
import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT

from deepspeedlite.config import (
    FEATURES,
    BatchSizes,
    ConfigError,
    DeepSpeedConfig,
    Feature,
    load_config,
    solve_batch,
)
from deepspeedlite.tools.config_docs import render, schema
from deepspeedlite.tools.config_keys import ALL_SECTIONS, iter_keys

CIFAR = {
    "train_batch_size": 16,
    "steps_per_print": 2000,
    "optimizer": {
        "type": "Adam",
        "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000},
    },
    "gradient_clipping": 1.0,
    "prescale_gradients": False,
    "bf16": {"enabled": False},
    "fp16": {
        "enabled": False,
        "loss_scale": 0,
        "loss_scale_window": 500,
        "hysteresis": 2,
        "min_loss_scale": 1,
        "initial_scale_power": 15,
    },
    "wall_clock_breakdown": False,
    "zero_optimization": {
        "stage": 0,
        "allgather_partitions": True,
        "reduce_scatter": True,
        "allgather_bucket_size": 5e8,
        "reduce_bucket_size": 5e8,
        "overlap_comm": True,
        "contiguous_gradients": True,
    },
    "comms_logger": {"enabled": False, "prof_ops": ["all_reduce"]},
    "tensorboard": {"enabled": False, "output_path": "logs"},
}


def faults_of(source, world_size=None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(source, world_size)
    return [line[4:] for line in str(caught.value).splitlines() if line.startswith("  - ")]


def only_fault(source, world_size=None) -> str:
    lines = faults_of(source, world_size)
    assert len(lines) == 1, lines
    return lines[0]


# -- what is right ------------------------------------------------------------------------------------------------


def test_the_tutorials_configuration_loads_with_its_values():
    given_dict = copy.deepcopy(CIFAR)
    config = load_config(given_dict, world_size=2)
    assert given_dict == CIFAR
    assert config.batch(2) == BatchSizes(16, 8, 1)
    assert (config.optimizer.type, config.optimizer.params["betas"]) == ("Adam", [0.8, 0.999])
    assert config.scheduler.params["warmup_num_steps"] == 1000
    bucket = config.zero_optimization.reduce_bucket_size
    assert bucket == 500_000_000 and type(bucket) is int
    assert config.raw == CIFAR
    config.raw["optimizer"]["type"] = "changed"
    assert config.raw == CIFAR


def test_defaults_are_deepspeeds():
    config = load_config({})
    assert config.optimizer is None and config.scheduler is None
    assert config.gradient_clipping == 1.0 and config.gradient_predivide_factor == 1.0
    assert config.steps_per_print is None and config.communication_data_type is None
    assert (config.fp16.initial_scale_power, config.fp16.loss_scale_window, config.fp16.hysteresis) == (16, 1000, 2)
    assert config.bf16.check_grad_overflow and not config.bf16.enabled
    assert config.zero_optimization.stage == 0 and config.zero_optimization.reduce_bucket_size is None
    assert config.zero_optimization.offload_optimizer.device == "none"
    assert (config.wandb.project, config.csv_monitor.job_name) == ("deepspeed", "DeepSpeedJobName")
    assert config.comms_logger.prof_all and config.comms_logger.prof_ops == []
    assert (config.flops_profiler.profile_step, config.flops_profiler.module_depth) == (1, -1)
    assert (config.aio.block_size, config.aio.queue_depth) == (1_048_576, 8)


def test_defaults_given_in_full_are_accepted():
    """Each section written out with its own default values asks for nothing and so is never refused."""
    full = {name: getattr(load_config({}), name) for name in ALL_SECTIONS}
    config = load_config({name: section.model_dump() for name, section in full.items() if section is not None})
    for name, section in full.items():
        assert getattr(config, name) == section


def test_every_source_gives_the_same(tmp_path):
    path = tmp_path / "ds_config.json"
    text = json.dumps(CIFAR)
    path.write_text(text)
    bom = tmp_path / "bom.json"
    bom.write_bytes(b"\xef\xbb\xbf" + text.encode())
    loaded = load_config(CIFAR)
    packed = base64.urlsafe_b64encode(text.encode()).decode()
    for source in (path, str(path), os.fsencode(path), bom, packed, packed.rstrip("="), loaded):
        assert load_config(source) == loaded
        assert load_config(source).raw == CIFAR
    assert load_config(loaded) is loaded
    with pytest.raises(ConfigError, match=r"16.*world size 3"):
        load_config(loaded, world_size=3)


def test_infinite_steps_per_print_means_never(tmp_path):
    assert load_config({"steps_per_print": math.inf}).steps_per_print is None
    path = tmp_path / "written_by_python.json"
    path.write_text(json.dumps({"steps_per_print": math.inf}))
    assert load_config(path).steps_per_print is None
    assert "steps_per_print = -Infinity" in only_fault({"steps_per_print": -math.inf})


@pytest.mark.parametrize("spelling", ["fp16", "FP16", "float16", "half", "torch.float16"])
def test_dtypes_have_one_name(spelling):
    config = load_config({"communication_data_type": spelling, "torch_autocast": {"dtype": spelling}})
    assert (config.communication_data_type, config.torch_autocast.dtype) == ("fp16", "fp16")


def test_torch_dtype_objects_are_dtypes():
    torch = pytest.importorskip("torch")
    assert load_config({"communication_data_type": torch.bfloat16}).communication_data_type == "bf16"
    assert "float64" in only_fault({"communication_data_type": torch.float64})


def test_case_of_enumerations_follows_deepspeed():
    assert load_config({"checkpoint": {"tag_validation": "WARN"}}).checkpoint.tag_validation == "warn"
    assert load_config({"checkpoint": {"tag_validation": "Warn"}}).checkpoint.tag_validation == "warn"


def test_null_sections_are_absent_sections():
    nulls = dict.fromkeys(ALL_SECTIONS)
    assert load_config(nulls).model_dump() == load_config({}).model_dump()
    assert "gradient_clipping = null" in only_fault({"gradient_clipping": None})


def test_objects_in_a_dict_are_kept_not_copied():
    class Handle:
        def __deepcopy__(self, memo):
            raise RuntimeError("must not be copied")

    handle = Handle()
    config = load_config({"optimizer": {"type": "Adam", "params": {"callback": handle}}}, handed=["optimizer"])
    assert config.optimizer.params["callback"] is handle and config.raw["optimizer"]["params"]["callback"] is handle


# -- older spellings ----------------------------------------------------------------------------------------------


def test_bfloat16_is_bf16():
    assert load_config({"bfloat16": {"enabled": True}}).bf16.enabled
    assert "bfloat16.enabeld" in only_fault({"bfloat16": {"enabeld": True}})
    assert "older spelling of bf16" in only_fault({"bfloat16": {"enabled": True}, "bf16": {"enabled": True}})


def test_boolean_zero_optimization():
    assert load_config({"zero_optimization": False}).zero_optimization.stage == 0
    assert load_config({"zero_optimization": True}).zero_optimization.stage == 1


ZERO_RENAMES = {
    "stage3_gather_fp16_weights_on_model_save": ("stage3_gather_16bit_weights_on_model_save", True),
    "gather_16bit_weights_on_model_save": ("stage3_gather_16bit_weights_on_model_save", True),
    "prefetch_bucket_size": ("stage3_prefetch_bucket_size", 17),
    "param_persistence_threshold": ("stage3_param_persistence_threshold", 17),
    "max_live_parameters": ("stage3_max_live_parameters", 17),
    "max_reuse_distance": ("stage3_max_reuse_distance", 17),
}


@pytest.mark.parametrize("old", ZERO_RENAMES)
def test_older_zero_keys(old):
    new, value = ZERO_RENAMES[old]
    assert getattr(load_config({"zero_optimization": {old: value}}).zero_optimization, new) == value
    assert f"zero_optimization.{old}" in only_fault({"zero_optimization": {old: "much"}})
    assert f"zero_optimization.{old}" in only_fault({"zero_optimization": {old: value, new: value}})


@pytest.mark.parametrize("old", ["cpu_offload", "cpu_offload_param", "cpu_offload_params"])
def test_older_offload_switches(old):
    assert load_config({"zero_optimization": {old: False}}).model_dump() == load_config({}).model_dump()
    section = {"cpu_offload": "offload_optimizer"}.get(old, "offload_param")
    by_either_name = [{"stage": 3, old: True}, {"stage": 3, section: {"device": "cpu"}}]
    loaded = [load_config({"zero_optimization": zero}).zero_optimization.model_dump() for zero in by_either_name]
    assert loaded[0] == loaded[1] and loaded[0][section]["device"] == "cpu"
    assert f'zero_optimization.{old} = "yes"' in only_fault({"zero_optimization": {old: "yes"}})


def test_older_aio_and_pinning():
    assert load_config({"aio": {"thread_count": 4}}).aio.intra_op_parallelism == 4
    assert load_config({"zero_optimization": {"cpu_offload_use_pin_memory": True}}).hints


# -- faults by table ----------------------------------------------------------------------------------------------

FAULTS = [
    # source, path, parts of the message
    ({"train_batch_sise": 8}, "train_batch_sise", ["= 8", "unknown key", "did you mean train_batch_size?"]),
    ({"zero_optimization": {"stgae": 0}}, "zero_optimization.stgae", ["did you mean zero_optimization.stage?"]),
    ({"fp16": {"loss_scale_windw": 5}}, "fp16.loss_scale_windw", ["fp16.loss_scale_window?"]),
    (
        {"zero_optimization": {"offload_optimizer": {"devise": "none"}}},
        "zero_optimization.offload_optimizer.devise",
        ["did you mean zero_optimization.offload_optimizer.device?"],
    ),
    (
        {"data_efficiency": {"data_sampling": {"curriculum_learning": {"enabledd": False}}}},
        "data_efficiency.data_sampling.curriculum_learning.enabledd",
        ["curriculum_learning.enabled?"],
    ),
    (
        {"tensor_parallel": {"partition_config": {"layer_specs": [{}, {"patern": ["x"]}]}}},
        "tensor_parallel.partition_config.layer_specs[1].patern",
        ["patterns?"],
    ),
    ({"zero_hpz_partition_size": 2}, "zero_hpz_partition_size", ["it belongs in zero_optimization"]),
    ({"fp16": {"gradient_clipping": 1.0}}, "fp16.gradient_clipping", ["it belongs at the top level"]),
    ({"batch_size": 2}, "batch_size", ["train_micro_batch_size_per_gpu"]),
    ({"optimizer": {"type": "Adam", "lr": 1}}, "optimizer.lr", ["go into optimizer.params"]),
    ({"optimizer": {"params": {}}}, "optimizer.type", ["is not given"]),
    ({"scheduler": {"type": ""}}, "scheduler.type", ['= ""', "not empty"]),
    ({"xyzzy": 1}, "xyzzy", ["unknown key; remove it"]),
    ({"": 1}, '[""]', ["unknown key"]),
    (
        {"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}},
        "optimizer.params.max_grad_norm",
        ["gradient_c"],
    ),
    # types: nothing is converted
    ({"train_batch_size": True}, "train_batch_size", ["= true", "a whole number >= 1"]),
    ({"train_batch_size": "8"}, "train_batch_size", ['= "8"', "write 8 without quotes"]),
    ({"train_batch_size": 8.5}, "train_batch_size", ["= 8.5", "a whole number"]),
    (
        {"zero_optimization": {"reduce_bucket_size": "5e8"}},
        "zero_optimization.reduce_bucket_size",
        ["write 5e8 without"],
    ),
    ({"wall_clock_breakdown": "true"}, "wall_clock_breakdown", ["true or false", "write true without quotes"]),
    ({"wall_clock_breakdown": 2}, "wall_clock_breakdown", ["= 2", "true or false"]),
    ({"gradient_clipping": True}, "gradient_clipping", ["a number"]),
    ({"gradient_clipping": math.inf}, "gradient_clipping", ["= Infinity"]),
    ({"gradient_clipping": math.nan}, "gradient_clipping", ["= NaN"]),
    ({"gradient_clipping": 10**400}, "gradient_clipping", ["a number"]),
    ({"train_batch_size": 2**63}, "train_batch_size", ["a whole number"]),
    ({"fp16": True}, "fp16", ["= true", "must be an object"]),
    ({"fp16": [1]}, "fp16", ["must be an object"]),
    ({"comms_logger": {"prof_ops": "all_reduce"}}, "comms_logger.prof_ops", ["a list of strings"]),
    ({"comms_logger": {"prof_ops": ["all_reduce", 3]}}, "comms_logger.prof_ops", ["a list of strings"]),
    ({"tensorboard": {"job_name": 3}}, "tensorboard.job_name", ["a string"]),
    ({"optimizer": {"type": "Adam", "params": [1]}}, "optimizer.params", ["an object"]),
    ({"optimizer": {"type": "Adam", "params": {"lr": math.nan}}}, "optimizer.params.lr", ["is not a number"]),
    ({"communication_data_type": "int8"}, "communication_data_type", ['"fp32", "fp16" or "bf16"']),
    ({"communication_data_type": "bf61"}, "communication_data_type", ['did you mean "bf16"?']),
    ({"torch_autocast": {"dtype": "fp32"}}, "torch_autocast.dtype", ['"fp16" or "bf16"']),
    ({"checkpoint": {"tag_validation": "Fial"}}, "checkpoint.tag_validation", ['did you mean "fail"?']),
    # ranges
    ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu", [">= 1"]),
    ({"gradient_accumulation_steps": -2}, "gradient_accumulation_steps", ["= -2", ">= 1"]),
    ({"gradient_clipping": -1}, "gradient_clipping", [">= 0"]),
    ({"gradient_predivide_factor": 0}, "gradient_predivide_factor", ["> 0"]),
    ({"steps_per_print": 0}, "steps_per_print", [">= 1"]),
    ({"fp16": {"loss_scale": -1}}, "fp16.loss_scale", [">= 0"]),
    ({"fp16": {"loss_scale_window": 0}}, "fp16.loss_scale_window", [">= 1"]),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage", ["= 4", "0, 1, 2 or 3"]),
    ({"zero_optimization": {"reduce_bucket_size": -5}}, "zero_optimization.reduce_bucket_size", [">= 1"]),
    (
        {"zero_optimization": {"offload_optimizer": {"ratio": 1.5}}},
        "zero_optimization.offload_optimizer.ratio",
        ["<= 1"],
    ),
    ({"aio": {"queue_depth": 0}}, "aio.queue_depth", [">= 1"]),
    # placeholders
    ({"train_batch_size": "auto"}, "train_batch_size", ["Hugging Face"]),
    ({"fp16": {"enabled": "auto"}}, "fp16.enabled", ["Hugging Face"]),
    ({"zero_optimization": "auto"}, "zero_optimization", ["Hugging Face"]),
    ({"optimizer": {"type": "Adam", "params": {"betas": "auto"}}}, "optimizer.params.betas", ["Hugging Face"]),
    ({"optimizer": {"type": "auto"}}, "optimizer.type", ["Hugging Face"]),
    ({"tensorboard": {"job_name": "auto"}}, "tensorboard.job_name", ["Hugging Face"]),
    # contradictions
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled", ["both enabled"]),
    ({"torch_autocast": {"enabled": True}, "fp16": {"enabled": True}}, "torch_autocast.enabled", ["disable fp16"]),
    ({"data_types": {"grad_accum_dtype": "fp16"}}, "data_types.grad_accum_dtype", ["fp32"]),
    (
        {"data_types": {"grad_accum_dtype": "fp16"}, "bf16": {"enabled": True}},
        "data_types.grad_accum_dtype",
        ["model's own"],
    ),
    (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}},
        "zero_optimization.offload_optimizer.nvme_path",
        ["is needed"],
    ),
    (
        {
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "nvme", "nvme_path": "/a"},
                "offload_optimizer": {"device": "nvme", "nvme_path": "/b"},
            }
        },
        "zero_optimization.offload_param.nvme_path",
        ["one directory in both"],
    ),
    ({"comms_logger": {"enabled": True, "prof_all": False}}, "comms_logger.prof_ops", ["nothing would be recorded"]),
    (
        {"fp16": {"enabled": True, "initial_scale_power": 2, "min_loss_scale": 8}},
        "fp16.min_loss_scale",
        ["initial_scale_power"],
    ),
    (
        {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2},
        "train_batch_size",
        ["no world size fits"],
    ),
    # not in this release
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
        "zero_optimization.offload_optimizer.super_offload",
        ["not in this release"],
    ),
    ({"aio": {"use_gds": True}}, "aio.use_gds", ["by way of host memory"]),
    (
        {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
        "fp16.fp16_master_weights_and_grads",
        ["fp32"],
    ),
    ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states", ["go together"]),
    (
        {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
        "fp16.fp16_master_weights_and_grads",
        ["fp32"],
    ),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_optimization.zero_quantized_weights", ["ZeRO++"]),
    ({"zero_optimization": {"zenflow": {}}}, "zero_optimization.zenflow", ["ZenFlow"]),
    ({"checkpoint": {"use_node_local_storage": True}}, "checkpoint.use_node_local_storage", ["not in this release"]),
    ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size", ["autotp_size to 0"]),
    ({"pipeline": {"activation_checkpoint_interval": -1}}, "pipeline.activation_checkpoint_interval", ["0"]),
    ({"compile": {"deepcompile": True}}, "compile.deepcompile", ["torch.compile"]),
    ({"autotuning": {"enabled": True}}, "autotuning.enabled", ["autotuner"]),
    ({"gradient_allreduce_op": "max"}, "gradient_allreduce_op", ["mean"]),
    ({"prescale_gradients": 2}, "prescale_gradients", ["true or false"]),
    ({"prescale_gradients": 1.0}, "prescale_gradients", ["true or false"]),
    ({"weight_quantization": {}}, "weight_quantization", ["quantizing"]),
    ({"amp": {"enabled": True, "opt_level": "O1"}}, "amp", ["torch_autocast"]),
    ({"sparse_attention": {"mode": "fixd"}}, "sparse_attention.mode", ['did you mean "fixed"']),
    ({"elasticity": {"enabled": True}}, "elasticity", ["batch sizes"]),
    ({"datastates_ckpt": True}, "datastates_ckpt", ["remove"]),
    (
        {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}}},
        "compression_training",
        ["removed"],
    ),
    # shape of the dict
    ({3: 1}, "[3]", ["keys are strings"]),
    ({"fp16": {True: 1}}, "fp16[true]", ["keys are strings"]),
]


@pytest.mark.parametrize("source, path, parts", FAULTS, ids=[f"{path}-{n}" for n, (_, path, _) in enumerate(FAULTS)])
def test_fault(source, path, parts):
    line = only_fault(source)
    assert re.match(re.escape(path) + r"( = |: )", line), line
    for part in parts:
        assert part in line


def test_all_faults_of_a_file_come_at_once():
    """Unknown keys, types, features, contradictions and the triangle in one message, none hiding another."""
    source = {
        "train_batch_size": 10,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": "1.0",
        "fp16": {"enabled": True, "hysteresys": 2},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 4, "reduce_bucket_size": -1, "nonsense": {"a": 1}},
        "optimizer": {"params": {"lr": "auto"}},
        "scheduler": 7,
        "autotuning": {"enabled": True},
    }
    lines = faults_of(source, world_size=2)
    expected = [
        "train_batch_size = 10",
        "gradient_clipping",
        "fp16.hysteresys",
        "fp16.enabled",
        "zero_optimization.stage",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.nonsense",
        "optimizer.type",
        "optimizer.params.lr",
        "scheduler",
        "autotuning.enabled",
    ]
    for path in expected:
        assert sum(bool(re.match(re.escape(path) + r"( = |: )", line)) for line in lines) == 1, (path, lines)
    assert len(lines) == len(expected)


def test_a_contradiction_is_not_reported_on_top_of_a_fault():
    assert "fp16.enabled" in only_fault({"fp16": {"enabled": "yes"}, "bf16": {"enabled": True}})


SWITCHED_OFF = [
    {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "none", "pin_memory": False}}},
    {"amp": {"enabled": False, "opt_level": "O1"}},
    {"elasticity": {"enabled": False, "max_train_batch_size": 2000}},
    {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}}},
    {"autotuning": {"enabled": False, "fast": False}},
    {"data_efficiency": {"enabled": False, "data_sampling": {"enabled": True}}},
    {"tensor_parallel": {"autotp_size": 1, "tp_overlap_comm": True}},
    {"hybrid_engine": {"enabled": False, "max_out_tokens": 8}},
    {"weight_quantization": {"enabled": False}},
    {"compile": {"deepcompile": False, "debug_log": True}},
    {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}},
    {"curriculum_learning": {}},
    {"datastates_ckpt": False},
]


@pytest.mark.parametrize("source", SWITCHED_OFF, ids=lambda source: next(iter(source)))
def test_a_section_that_is_switched_off_is_fine(source):
    assert load_config(source).hints == ()


def test_hints_are_said_once_and_only_for_given_keys(monkeypatch):
    said = []
    monkeypatch.setattr("deepspeedlite.config.load.log_once", said.append)
    config = load_config({"zero_optimization": {"load_from_fp32_weights": True, "enable_sanity_checks": True}})
    assert len(said) == len(config.hints) == 1
    assert "zero_optimization.load_from_fp32_weights, zero_optimization.enable_sanity_checks" in said[0]
    said.clear()
    load_config({"train_batch_size": 8})
    assert said == []


def test_a_feature_becomes_supported_by_one_line(monkeypatch):
    """The promise of features.py, by a verdict of unsupported.json."""
    monkeypatch.setattr("deepspeedlite.config.load.log_once", lambda line: None)
    for name in ("super_offload", "zero_tuning"):
        monkeypatch.setitem(FEATURES, name, Feature("supported"))
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu", "super_offload": True}, "enable_sanity_checks": True}
    config = load_config({"zero_optimization": zero})
    assert config.zero_optimization.offload_optimizer.super_offload and config.hints == ()


# -- reading files ------------------------------------------------------------------------------------------------


def write(tmp_path, text):
    path = tmp_path / "ds.json"
    path.write_text(text)
    return path


def test_duplicate_keys_are_found_at_any_depth(tmp_path):
    text = """{"train_batch_size": 8, "train_batch_size": 16,
      "optimizer": {"type": "Adam", "params": {"lr": 1, "lr": 2}},
      "comms_logger": {"prof_ops": ["a"], "prof_ops": ["b"]},
      "fp16": {"hysteresis": 1, "hysteresis": 1}, "fp16": {}}"""
    lines = faults_of(write(tmp_path, text))
    paths = ["train_batch_size", "optimizer.params.lr", "comms_logger.prof_ops", "fp16.hysteresis", "fp16"]
    assert [line.split(":")[0] for line in lines] == paths
    assert "more than once (8 and 16)" in lines[0]
    assert "train_batch_size" in only_fault(base64.b64encode(b'{"train_batch_size":1,"train_batch_size":2}').decode())


@pytest.mark.parametrize(
    "text, place, advice",
    [
        ('{\n  "a": 1,\n  "b" 2\n}', ":3:7:", '"b" 2'),
        ('{\n  "a": 1,\n}', ":", "remove the comma"),
        ('{"a": [1, 2,]}', ":1:", "remove the comma"),
        ('{\n  // a comment\n  "a": 1}', ":2:3:", "JSON has no comments"),
        ("{'a': 1}", ":1:2:", "double quotes"),
        ('{"a": True}', ":1:7:", "write true"),
        ('{"a": None}', ":1:7:", "write null"),
        ("", ":1:1:", "the file is empty"),
        ('{"a": 1', ":1:8:", "not valid JSON"),
    ],
)
def test_syntax_errors_show_the_place(tmp_path, monkeypatch, text, place, advice):
    monkeypatch.setitem(sys.modules, "hjson", None)  # which reads most of these
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert f"{path}{place}" in message and advice in message
    assert message.splitlines()[-1].strip() == "^"


@pytest.mark.parametrize("text", ["[1]", "3", '"text"', "null"])
def test_the_top_level_must_be_an_object(tmp_path, text):
    with pytest.raises(ConfigError, match="must be a JSON object"):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 60 + "1" + "}" * 60, '{"a": ' + "9" * 6000 + "}"])
def test_absurd_files_are_configuration_errors(tmp_path, text):
    with pytest.raises(ConfigError):
        load_config(write(tmp_path, text))


def test_sources_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"ds_confg\.json.*no such file"):
        load_config("ds_confg.json")
    with pytest.raises(ConfigError, match="no such file"):
        load_config("abcd")  # valid base64, but not of JSON
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"json\.loads"):
        load_config('{"train_batch_size": 8}')
    with pytest.raises(ConfigError, match="got int"):
        load_config(3)
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(binary)
    broken = base64.b64encode(b'{"a": }').decode()
    with pytest.raises(ConfigError, match="base64 configuration:1:7"):
        load_config(broken)


# -- the batch triangle -------------------------------------------------------------------------------------------

maybe = st.one_of(st.none(), st.integers(1, 48))


def solutions(train, micro, accumulation, world):
    """Every whole solution, with DeepSpeed's rule that accumulation is 1 unless given or determined."""
    found = []
    for m in [micro] if micro else range(1, 49):
        for a in [accumulation] if accumulation else range(1, 49):
            t = m * a * world
            if train is not None and t != train:
                continue
            if accumulation is None and not (train and micro) and a != 1:
                continue
            found.append(BatchSizes(t, m, a))
    return found


@pytest.mark.slow
@given(train=maybe, micro=maybe, accumulation=maybe, world=st.integers(1, 6))
@settings(max_examples=400, deadline=None)
def test_triangle_agrees_with_brute_force(train, micro, accumulation, world):
    found = [] if train is None and micro is None else solutions(train, micro, accumulation, world)
    numbers = {"train_batch_size": train, "train_micro_batch_size_per_gpu": micro}
    numbers["gradient_accumulation_steps"] = accumulation
    source = {name: number for name, number in numbers.items() if number is not None}
    if found:
        assert [solve_batch(train, micro, accumulation, world)] == found
        assert load_config(source, world_size=world).batch(world) == found[0]
        return
    with pytest.raises(ConfigError) as caught:
        solve_batch(train, micro, accumulation, world)
    if train is not None:
        for number in (train, micro, accumulation, world):
            assert number is None or re.search(rf"\b{number}\b", str(caught.value))
    with pytest.raises(ConfigError):
        load_config(source, world_size=world)


def test_triangle_proposes_a_batch_that_works():
    with pytest.raises(ConfigError) as caught:
        solve_batch(50, 4, 3, 4)
    assert "micro-batch 4 x accumulation 3 x world size 4 = 48" in str(caught.value)
    solve_batch(48, 4, 3, 4)
    with pytest.raises(ConfigError, match="set train_batch_size to 48 or 64"):
        solve_batch(50, 4, None, 4)
    with pytest.raises(ConfigError, match="neither is given"):
        solve_batch(None, None, 4, 4)
    for world in (0, -1, True, 1.0):
        with pytest.raises(ConfigError, match="world size"):
            solve_batch(8, None, None, world)


# -- fuzzing ------------------------------------------------------------------------------------------------------

VALID = {
    **CIFAR,
    "data_types": {"grad_accum_dtype": "fp32"},
    "aio": {"block_size": 1024},
    "checkpoint": {"tag_validation": "Warn", "parallel_write": {"pipeline_stage": False}},
    "activation_checkpointing": {"number_checkpoints": None},
    "tensor_parallel": {"autotp_size": 0, "partition_config": {"layer_specs": [{"patterns": ["a"], "shape": [2, -1]}]}},
    "data_efficiency": {"enabled": False, "data_sampling": {"curriculum_learning": {"enabled": False}}},
    "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}},
    "flops_profiler": {"enabled": True, "output_file": None, "recompute_fwd_factor": 0},
}


def places(node, path=()):
    """Paths of every key of every object in a tree."""
    for name, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(node, dict):
            yield (*path, name)
        if isinstance(value, dict | list):
            yield from places(value, (*path, name))


PLACES = list(places(VALID))
FREE = ("optimizer.params", "scheduler.params", "compression_training.")
junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just("auto")
    | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def holder_of(tree, path):
    for part in path[:-1]:
        tree = tree[part]
    return tree


def path_text(path):
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def outcome(source):
    """The fault lines, or [] if it loads; anything but ConfigError is the test's failure."""
    try:
        load_config(source, world_size=2)
    except ConfigError as error:
        return [line[4:] for line in str(error).splitlines()[1:]]
    return []


@given(place=st.sampled_from(PLACES), suffix=st.sampled_from(["x", "_", "S", "ed"]))
@settings(max_examples=150, deadline=None)
def test_a_renamed_key_is_named(place, suffix):
    source = copy.deepcopy(VALID)
    holder = holder_of(source, place)
    holder[place[-1] + suffix] = holder.pop(place[-1])
    path = path_text((*place[:-1], place[-1] + suffix))
    lines = outcome(source)
    if path.startswith(FREE):
        return
    assert any(line.startswith((path + " = ", path + ": ")) for line in lines), (path, lines)


@pytest.mark.slow
@given(place=st.sampled_from(PLACES), value=junk)
@settings(max_examples=250, deadline=None)
def test_a_changed_value_is_named_or_right(place, value):
    source = copy.deepcopy(VALID)
    holder_of(source, place)[place[-1]] = value
    for line in outcome(source):
        path = path_text(place)
        related = line.startswith(path) or path.startswith(line.split(" = ")[0].split(":")[0])
        batch = path.startswith(("train_batch_size", "gradient_acc")) and line.startswith("train_batch_size")
        assert related or batch, (path, value, line)


@pytest.mark.slow
@given(
    source=st.dictionaries(st.sampled_from(list(DeepSpeedConfig.model_fields)) | st.text(max_size=5), junk, max_size=6)
)
@settings(max_examples=200, deadline=None)
def test_junk_never_raises_anything_else(source):
    outcome(source)


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_string_as_source_is_a_configuration_error(text):
    with pytest.raises(ConfigError):
        load_config(text)


# -- introspection, documentation, command line -------------------------------------------------------------------


def test_every_key_has_status_type_and_meaning():
    seen = set()
    for info in iter_keys():
        assert info.path not in seen
        seen.add(info.path)
        assert info.status in ("supported", "hint", "refused")
        assert info.status == "supported" or info.note, f"{info.path}: no reason given"
        assert info.doc.endswith("."), info.path
        assert info.kind and (info.kind != "any value" or info.path.startswith("tensor_parallel.")), info.path
    assert len(seen) > 280


def test_every_key_of_deepspeeds_reference_is_known():
    """Names from DeepSpeed 0.19's configuration reference and the models of its package."""
    known = {info.path for info in iter_keys()}
    listed = """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation
    optimizer.type optimizer.params scheduler.type scheduler.params communication_data_type gradient_allreduce_op
    prescale_gradients gradient_predivide_factor fp16.enabled fp16.auto_cast fp16.loss_scale fp16.initial_scale_power
    fp16.loss_scale_window fp16.hysteresis fp16.consecutive_hysteresis fp16.min_loss_scale
    fp16.fp16_master_weights_and_grads bf16.enabled bf16.bf16_master_weights_and_grads bf16.bf16_optimizer_states
    bf16.immediate_grad_update bf16.check_grad_overflow torch_autocast.enabled torch_autocast.dtype
    torch_autocast.lower_precision_safe_modules gradient_clipping zero_optimization.stage
    zero_optimization.allgather_partitions zero_optimization.allgather_bucket_size zero_optimization.compute_grad_norm
    zero_optimization.overlap_comm zero_optimization.reduce_scatter zero_optimization.reduce_bucket_size
    zero_optimization.contiguous_gradients zero_optimization.load_from_fp32_weights
    zero_optimization.round_robin_gradients zero_optimization.parameter_alignment
    zero_optimization.offload_param.device zero_optimization.offload_optimizer.device
    zero_optimization.stage3_max_live_parameters zero_optimization.stage3_max_reuse_distance
    zero_optimization.stage3_prefetch_bucket_size zero_optimization.stage3_param_persistence_threshold
    zero_optimization.sub_group_size zero_optimization.stage3_gather_16bit_weights_on_model_save
    zero_optimization.stage3_module_granularity_threshold zero_optimization.zero_hpz_partition_size
    zero_optimization.zero_quantized_weights zero_optimization.zero_quantized_gradients
    zero_optimization.log_trace_cache_warnings zero_optimization.elastic_checkpoint
    zero_optimization.ignore_unused_parameters zero_optimization.leaf_module.classes
    zero_optimization.save_muon_momentum_buffer_in_memory zero_optimization.offload_optimizer.fast_init
    zero_optimization.offload_optimizer.ratio zero_optimization.offload_param.max_in_cpu aio.block_size
    aio.queue_depth aio.single_submit aio.overlap_events aio.use_gds aio.intra_op_parallelism
    tensor_parallel.autotp_size tensor_parallel.preset_model tensor_parallel.partition_config.layer_specs[].patterns
    hybrid_engine.enabled hybrid_engine.enable_cuda_graph expert_parallel.autoep_size expert_parallel.score_func
    disable_python_gc steps_per_print wall_clock_breakdown memory_breakdown dump_state autotuning.tuner_num_trials
    flops_profiler.detailed flops_profiler.output_file activation_checkpointing.partition_activations
    activation_checkpointing.profile data_efficiency.data_routing.random_ltd.random_ltd_schedule.min_value
    data_efficiency.data_sampling.curriculum_learning.curriculum_metrics tensorboard.output_path wandb.team
    comet.samples_log_interval csv_monitor.job_name comms_logger.prof_ops checkpoint.tag_validation
    checkpoint.load_universal checkpoint.use_node_local_storage checkpoint.parallel_write.pipeline_stage
    compile.passes compile.offload_activation data_types.grad_accum_dtype sparse_gradients amp sparse_attention
    compression_training elasticity nebula curriculum_learning progressive_layer_drop eigenvalue dataloader_drop_last
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer use_data_before_expert_parallelism
    timers.throughput.enabled
    weight_quantization.num_bits seq_parallel_communication_data_type log_level vocabulary_size disable_allgather"""
    assert set(listed.split()) - known == set()


def deepspeed_site():
    python = Path(os.environ.get("DSL_PEER_PYTHON") or "/nowhere/bin/python")
    found = list(python.parent.parent.glob("lib/python3*/site-packages/deepspeed/runtime/zero/config.py"))
    return found[0].parents[2] if found else None


@pytest.mark.skipif(
    deepspeed_site() is None, reason="needs DSL_PEER_PYTHON: the Python of an environment with DeepSpeed"
)
def test_keys_of_deepspeeds_models_are_known():
    """Field names in DeepSpeed's own models, read from its source without importing it."""
    sources = {
        "runtime/zero/config.py": ("DeepSpeedZeroConfig", "zero_optimization"),
        "runtime/zero/offload_config.py": (
            "DeepSpeedZeroOffloadOptimizerConfig",
            "zero_optimization.offload_optimizer",
        ),
        "runtime/precision_config.py": ("DeepSpeedFP16Config", "fp16"),
        "monitor/config.py": ("CometConfig", "comet"),
        "compile/config.py": ("CompileConfig", "compile"),
        "comm/config.py": ("CommsLoggerConfig", "comms_logger"),
    }
    for file, (cls, prefix) in sources.items():
        body = re.search(rf"class {cls}\(.*?\n(?=class |\Z)", (deepspeed_site() / file).read_text(), re.S).group(0)
        fields = re.findall(r"^    (\w+): ", body, re.M)
        assert len(fields) >= 5
        for name in fields:
            source: dict = {name: "a value of no type at all"}
            for part in reversed(prefix.split(".")):
                source = {part: source}
            message = outcome(source)
            assert not any("unknown key" in line for line in message), (file, name, message)


def test_documentation_is_current():
    assert (ROOT / "docs" / "config.md").read_text() == render(), "run: python -m deepspeedlite.config docs"


def test_documentation_has_every_key():
    text = render()
    for info in iter_keys():
        leaf = info.path.split(".", 1)[-1]
        assert f"`{leaf}`" in text or f"## {leaf}" in text or info.section is not None, info.path


def run_cli(*arguments):
    command = [sys.executable, "-m", "deepspeedlite.config", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_cli_check(tmp_path):
    good = write(tmp_path, json.dumps({**CIFAR, "sparse_gradients": True}))
    done = run_cli("check", good, "--world_size", 4)
    assert done.returncode == 0 and done.stderr == ""
    assert f"OK {good}" in done.stdout and "train_micro_batch_size_per_gpu 4" in done.stdout
    assert "hint: sparse_gradients" in done.stdout
    bad = write(tmp_path, '{"train_batch_size": 8, "zero_optimization": {"stgae": 1}, "fp16": 3}')
    done = run_cli("check", bad)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "2 faults" in done.stdout and "zero_optimization.stgae = 1" in done.stdout and "fp16 = 3" in done.stdout
    done = run_cli("check", write(tmp_path, "{}"))
    assert done.returncode == 1 and "neither is given" in done.stdout
    full = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    assert "batch on 3 ranks" in run_cli("check", write(tmp_path, json.dumps(full))).stdout
    assert run_cli("check", tmp_path / "absent.json").returncode == 1


@pytest.mark.slow
def test_cli_schema_docs_and_help(tmp_path):
    done = run_cli("schema")
    made = json.loads(done.stdout)
    assert made == schema() and made["additionalProperties"] is False
    assert made["properties"]["train_batch_size"]["status"] == "supported"
    target = tmp_path / "config.md"
    assert run_cli("docs", "--output", target).returncode == 0
    assert target.read_text() == render() == run_cli("docs", "--output", "-").stdout
    done = run_cli("--help")
    assert done.returncode == 0 and all(word in done.stdout for word in ("check", "schema", "docs"))


def test_loading_imports_neither_torch_nor_rich():
    code = (
        "import sys; from deepspeedlite.config import load_config; load_config({'train_batch_size': 8}, 2);"
        "print([name for name in ('torch', 'rich', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
