"""The one table of what this release does: each feature's status and, unless it is supported, what to do instead.

A key of the configuration names its feature (`key(..., feature="zero_plus_plus")`), so a release that gains a feature
changes one line here and the checks, the messages and docs/config.md follow. Statuses:
`supported`: the engine acts on the key. `hint`: taken, and nothing changes; said once when the key is given.
`refused`: asking for it (a value other than the default) is an error that carries the note.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Status = Literal["supported", "hint", "refused"]


class Feature(NamedTuple):
    """What a feature's keys are worth in this release."""

    status: Status
    note: str = ""


def _later(what: str, instead: str) -> Feature:
    return Feature("refused", f"{what} not in this release; {instead}")


def _gone(what: str, instead: str) -> Feature:
    return Feature("refused", f"{what} not part of this library (DeepSpeed removed it too); {instead}")


SUPPORTED = Feature("supported")

FEATURES: dict[str, Feature] = {
    "core": SUPPORTED,
    # ZeRO and where tensors live
    "zero_tuning": Feature("hint", "changes nothing"),
    "super_offload": _later(
        "SuperOffload is", "set it to false; the step overlaps the disk's work and the copies anyway"
    ),
    "zero_plus_plus": _later("ZeRO++ is", "leave the key out"),
    "zenflow": _later("ZenFlow is", "remove the section"),
    "mics": _gone("MiCS is", "leave the key out"),
    "gds": _later(
        "moving data between the disk and a GPU directly is", "set it to false: it goes by way of host memory"
    ),
    # precision
    "low_precision_masters": _later("master weights below fp32 are", "set it to false: masters are kept in fp32"),
    # checkpoints and activations
    "checkpoint": SUPPORTED,
    "checkpoint_tuning": Feature("hint", "changes nothing: each rank writes its own shards"),
    "node_local_checkpoints": _later("a checkpoint spread over nodes' own disks is", "save to a shared file system"),
    "activation_checkpointing": SUPPORTED,
    "contiguous_checkpoints": Feature("hint", "changes nothing: the allocator keeps memory whole"),
    # parallelism
    "pipeline": SUPPORTED,
    "pipeline_tuning": Feature("hint", "changes nothing: the PipelineModule decides it"),
    "tensor_parallel": _later("tensor parallelism is", "set autotp_size to 0"),
    "expert_parallel": _later("expert parallelism is", "set enabled to false"),
    "sequence_parallel": _later("sequence parallelism is", "remove the key"),
    "hybrid_engine": _later("the hybrid engine is", "set enabled to false"),
    # data, compilation, search
    "data_efficiency": _later("the data efficiency library is", "set enabled to false"),
    "deepcompile": _later("DeepCompile is", "set it to false; torch.compile the module before `initialize`"),
    "compile_tuning": Feature("hint", "is read only by DeepCompile, which is off"),
    "autotuning": _later("the autotuner is", "set enabled to false"),
    "weight_quantization": _later("quantizing weights at load is", "remove the section"),
    "comet": _later("the Comet monitor is", "set enabled to false and use tensorboard, wandb or csv_monitor"),
    "gradient_sum": _later("summing gradients over ranks is", 'use "mean" and multiply the loss by the world size'),
    "unmanaged_accumulation": _later(
        "accumulation counted by the client is", "use engine.set_gradient_accumulation_boundary"
    ),
    "datastates": _later("DataStates checkpointing is", "remove the section"),
    # what DeepSpeed itself has dropped
    "amp": _gone("Apex AMP is", "use bf16, fp16 or torch_autocast"),
    "nebula": _gone("Nebula is", "remove the section"),
    "compression": _gone("the compression library is", "remove the section"),
    "quantize_training": _gone("Mixture-of-Quantization is", "remove the section"),
    "sparse_attention": _gone("block-sparse attention is", "use torch's flex_attention in the model"),
    "elasticity": _gone("elastic training is", "set the batch sizes directly"),
    "eigenvalue": _gone("the eigenvalue estimate is", "remove the section"),
    "progressive_layer_drop": _gone("progressive layer dropping is", "drop layers in the model"),
    "curriculum_learning": _gone("the top-level curriculum_learning section is", "order the data in the sampler"),
    "graph_harvesting": _gone("graph harvesting is", "set it to false"),
}
