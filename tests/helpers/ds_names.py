"""Asks names below `deepspeed` what they give, and prints it; run by test_names_peer.py with two Pythons.

PYTHON ds_names.py FOLDER       with stage2/ and stage3/ of checkpoints in DeepSpeed's layout
"""

import json
import os
import sys
import tempfile
from collections import Counter, OrderedDict

import torch
from deepspeed import checkpoint, checkpointing, constants
from deepspeed.compression.helper import recursive_getattr, recursive_setattr
from deepspeed.git_version_info import accelerator_name
from deepspeed.launcher import runner
from deepspeed.runtime import utils
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo, TorchCheckpointEngine
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum, get_zero_config
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils import zero_to_fp32
from deepspeed.utils.timer import trim_mean

found = {}
folder = sys.argv[1]


hostfile = os.path.join(tempfile.mkdtemp(), "hosts")


def hosts(text):
    with open(hostfile, "w") as file:
        file.write(text)
    try:
        return list(runner.fetch_hostfile(hostfile).items())
    except ValueError:
        return "refused"


texts = ["w1 slots=2\n# c\n\nw2 slots=4 # x\n", "w1 slots=2\nw1 slots=3\n", "w1\n", "", "w1 slots=x\n"]
found["hostfiles"] = [*map(hosts, texts), runner.fetch_hostfile("/no/such/file")]
pool = OrderedDict(w1=2, w2=4)


def chosen(include, exclude):
    try:
        left = runner.parse_resource_filter({h: list(range(n)) for h, n in pool.items()}, include, exclude)
        assert list(left.items()) == list(runner.parse_inclusion_exclusion(pool, include, exclude).items())
        return list(left.items())
    except ValueError:
        return "refused"


choices = [("", ""), ("w2:0,2", ""), ("", "w1"), ("", "w2:1"), ("w1@w2:3", ""), ("w9", ""), ("w1:7", ""), ("w1", "w2")]
found["choices"] = [chosen(*choice) for choice in choices]
found["exported"] = sorted(set(runner.EXPORT_ENVS) - {"NCCL", "GLOO"})  # ours are two more


found["files"] = [
    checkpoint.get_layer_ckpt_name_for_rank("b/", "layer_3", 2),
    checkpoint.get_model_ckpt_name_for_rank("/x", "01"),
    checkpoint.get_zero_ckpt_name_for_rank("/x", 1, 2),
]


for stage in (2, 3):
    tag = os.path.join(folder, f"stage{stage}")
    files = zero_to_fp32.get_optim_files(tag)
    read_stage, world, groups, paddings = zero_to_fp32.parse_optim_states(files, tag)
    sums = [[float(x.double().sum()) for x in (g if isinstance(g, list) else [g])] for g in groups]
    models = zero_to_fp32.parse_model_states(zero_to_fp32.get_model_state_files(tag))
    found[f"stage {stage}"] = [
        [os.path.basename(file) for file in files],
        os.path.basename(zero_to_fp32.get_model_state_file(tag, stage)),
        int(read_stage),
        world,
        sums,
        paddings,
        [
            [
                sorted((k, float(v.sum())) for k, v in m.buffers.items()),
                [sorted((k, list(s)) for k, s in g.items()) for g in m.param_shapes],
                m.shared_params,
                m.ds_version,
                sorted(m.frozen_param_shapes or {}),
                sorted(m.frozen_param_fragments or {}),
            ]
            for m in models
        ],
    ]


def refused(call, *given):
    try:
        return call(*given)
    except Exception as error:
        return [kind.__name__ for kind in (FileNotFoundError, ValueError) if isinstance(error, kind)]


found["part"] = refused(zero_to_fp32.parse_optim_states, files[:1], tag)
found["missing"] = [
    refused(zero_to_fp32.get_optim_files, folder),
    refused(zero_to_fp32.get_model_state_file, folder, 2),
]


model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 2)))
recursive_setattr(model, "0.1", torch.nn.ReLU())
found["recursive"] = [recursive_getattr(model, "0.0.weight") is model[0][0].weight, str(model)]


found["means"] = [
    trim_mean(d, p) for d, p in [([1, 2, 3, 100], 0.25), ([5], 0.1), (list(range(10)), 0.15), ([9, 1, 4], 0.4)]
]


def told(one):
    steps = [step for step in one if step]
    told = [repr(i) for step in steps for i in step]
    passes = [name for name in told if name.startswith(("Forward", "Backward"))]
    return sorted(Counter(told).items()), passes, one.num_pipe_buffers()


found["schedules"] = []
for micro_batches in (1, 2, 3, 5, 8):
    for stages in (1, 2, 4):
        for stage in range(stages):
            train = schedule.TrainSchedule(micro_batches=micro_batches, stages=stages, stage_id=stage)
            found["schedules"].append([told(train), train.is_first_stage, train.is_last_stage, train.num_micro_batches])
            if stages > 1:
                found["schedules"].append(told(schedule.InferenceSchedule(micro_batches, stages, stage)))
    found["schedules"].append(told(schedule.DataParallelSchedule(micro_batches, 1, 0)))
names = (
    "PipeInstruction BufferOpInstruction LoadMicroBatch ForwardPass BackwardPass SendActivation RecvActivation "
    "SendGrad RecvGrad ReduceGrads ReduceTiedGrads OptimizerStep"
)
made = [
    getattr(schedule, name)(3)
    if issubclass(getattr(schedule, name), schedule.BufferOpInstruction)
    else getattr(schedule, name)(a=1)
    for name in names.split()
]
found["instructions"] = [[repr(one), one.name, one.kwargs] for one in made]


class Group:
    rank, size = 0, 3
    get_rank = staticmethod(lambda group=None: Group.rank)
    get_world_size = staticmethod(lambda group=None: Group.size)


sys.modules[utils.PartitionedTensor.__module__].dist = Group
found["pieces"] = []
for rank in range(3):
    Group.rank = rank
    piece = utils.PartitionedTensor(torch.arange(8.0).view(2, 4), None)
    again = utils.PartitionedTensor.from_meta(piece.to_meta(), piece.data(), None)
    found["pieces"].append(
        [piece.to_meta().tolist(), piece.data().tolist(), list(piece.full_size()), list(piece.local_size())]
    )
    found["pieces"].append([again.to_meta().tolist(), list(again.full_size()), again.data().tolist()])


engine = TorchCheckpointEngine()
path = os.path.join(tempfile.mkdtemp(), "a", "b.pt")
engine.makedirs(os.path.dirname(path), exist_ok=True)
info = CheckpointCommitInfo("t", "d", True)
engine.create(info)
engine.save({"x": torch.ones(2)}, path)
found["engine"] = [
    engine.load(path, map_location="cpu")["x"].tolist(),
    engine.commit(info),
    engine.name,
    engine.is_data_parallel_writer(0),
    engine.is_data_parallel_writer(1),
    engine.is_decoupled(),
    engine.preserves_storage_sharing(),
]


section = DeepSpeedZeroConfig(stage=3, offload_param={"device": "cpu"}, leaf_module={"classes": ["A"]})
found["sections"] = [
    int(section.stage),
    section.offload_param.device,
    section.leaf_module.classes,
    section.contiguous_gradients,
    DeepSpeedZeroOffloadOptimizerConfig(device="nvme", nvme_path="/x").device,
    DeepSpeedZeroOffloadParamConfig().device,
    DeepSpeedZeroLeafModuleConfig(names=["a"]).names,
    DeepSpeedZeroConfig().stage == ZeroStageEnum.disabled,
    int(get_zero_config({"zero_optimization": {"stage": 2}, "unknown": 1}).stage),
    int(get_zero_config({}).stage),
]


tracker = checkpointing._CUDA_RNG_STATE_TRACKER
tracker.add(checkpointing._MODEL_PARALLEL_RNG_TRACKER_NAME, 7)
found["small"] = [
    accelerator_name,
    constants.CROSS_RANK,
    list(tracker.get_states()),
    tracker is checkpointing.get_cuda_rng_tracker(),
]
tracker.reset()

print("ANSWER" + json.dumps(found, default=str))
