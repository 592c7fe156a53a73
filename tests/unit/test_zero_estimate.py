"""The memory estimators: formulas against sums done by hand, DeepSpeed's functions, and the command as a process."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from models import tied_model
from paths import ROOT

from deepspeedlite.runtime.errors import ConfigError
from deepspeedlite.tools.memory_plan import estimate
from deepspeedlite.tools.memory_plan.states import OFFLOADS, Setup, all_ways, model_states_bytes

PAGE = ROOT / "docs/zero-memory.md"
G = 10**9
EXAMPLE = ("--params", "7e9", "--largest_layer", "2e8", "--gpus", "8", "--nodes", "2")
# Of models.TiedTokenModel, whose head is its embedding (61 x 32): two times up (32 x 97 + 97) and down (97 x 32 + 32),
# and a LayerNorm of 32 + 32. The largest owner of parameters is one `up`.
TIED_NUMEL = 61 * 32 + 2 * (32 * 97 + 97) + 2 * (97 * 32 + 32) + 64
TIED_LARGEST = 32 * 97 + 97


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deepspeedlite.zero.estimate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


# 7e9 parameters on 2 x 8 GPUs, no buffers. By hand, in units of 7e9 bytes: a sixteenth per sharded byte.
@pytest.mark.parametrize(
    "dtype, stage, offload, gpu, host, nvme",
    [
        ("bf16", 0, "none", 112 * G, 0, 0),  # 2 + 2 + 12
        ("fp16", 0, "none", 112 * G, 0, 0),
        ("bf16", 1, "none", 28 * G + 5.25 * G, 0, 0),  # 4 + 12/16
        ("bf16", 2, "none", 14 * G + 6.125 * G, 0, 0),  # 2 + 14/16
        ("bf16", 3, "none", 7 * G, 0, 0),  # 16/16
        ("bf16", 1, "cpu_optimizer", 28 * G, 42 * G, 0),  # 4 | 12/2
        ("bf16", 2, "cpu_optimizer", 14 * G, 49 * G, 0),  # 2 | 14/2
        ("bf16", 3, "cpu_optimizer", 0.875 * G, 49 * G, 0),  # 2/16 | 14/2
        ("bf16", 3, "cpu_all", 0, 56 * G, 0),  # 0 | 16/2
        ("bf16", 1, "nvme_optimizer", 28 * G, 0, 42 * G),
        ("fp16", 2, "nvme_optimizer", 14 * G, 7 * G, 42 * G),  # 2 | 2/2 | 12/2
        ("bf16", 3, "nvme_optimizer", 0.875 * G, 7 * G, 42 * G),
        ("bf16", 3, "nvme_all", 0, 7 * G, 49 * G),  # 0 | 2/2 | 14/2
        ("fp32", 0, "none", 112 * G, 0, 0),  # 4 + 4 + 8, the master being the parameter
        ("fp32", 1, "none", 56 * G + 3.5 * G, 0, 0),  # 8 + 8/16
        ("fp32", 2, "none", 28 * G + 5.25 * G, 0, 0),  # 4 + 12/16
        ("fp32", 3, "none", 7 * G, 0, 0),  # 16/16
        ("fp32", 2, "cpu_optimizer", 28 * G, 56 * G, 0),  # 4 | (4 + 4 + 8)/2: the host steps a copy
        ("fp32", 3, "cpu_all", 0, 56 * G, 0),  # 0 | 16/2: the host has them all, no copy
    ],
)
def test_formulas(dtype, stage, offload, gpu, host, nvme):
    found = model_states_bytes(7e9, 2e8, gpus=8, nodes=2, dtype=dtype, stage=stage, offload=offload)
    assert (found.gpu_bytes, found.host_bytes, found.nvme_bytes) == (gpu, host, nvme)
    # At stage 3 the largest layer's weights and gradient: 2 x 2 bytes of 2e8 parameters, or 2 x 4.
    layer = {"fp32": 1_600_000_000}.get(dtype, 800_000_000) if stage == 3 else 0
    assert found.layer_bytes == layer and found.gpu_total_bytes == gpu + layer
    assert found.build_bytes == 224 * G  # 4 x 7e9 x 8 ranks of a host
    assert all(isinstance(size, int) for size in found[2:])


def test_the_buffer_factor_multiplies_host_memory_only():
    for bare, more in zip(*(all_ways(Setup(1e6, 1e5, 4, 2, "bf16", factor)) for factor in (1.0, 1.5))):
        assert more.host_bytes == 1.5 * bare.host_bytes and more.build_bytes == 1.5 * bare.build_bytes == 24e6
        assert more._replace(host_bytes=0, build_bytes=0) == bare._replace(host_bytes=0, build_bytes=0)


def test_a_shard_is_rounded_up_to_whole_bytes():
    assert model_states_bytes(7, 7, gpus=3, stage=2).gpu_bytes == 14 + 28 + 5  # 2 x 7, 12 x 7 / 3, 2 x 7 / 3


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_one_gpu_gains_nothing_by_sharding(dtype):
    ways = [way for way in all_ways(Setup(1e6, 1e5, 1, 1, dtype, 1.0)) if way.offload == "none"]
    assert [way.stage for way in ways] == [0, 1, 2, 3]
    assert {way.gpu_bytes for way in ways} == {16_000_000}


def test_every_offload_of_every_stage_is_listed_once_from_least_traffic_to_most():
    ways = [(way.offload, way.stage) for way in all_ways(Setup(1e6, 1e5, 2, 1, "bf16", 1.0))]
    assert ways == [
        *(("none", stage) for stage in (0, 1, 2, 3)),
        *(("cpu_optimizer", stage) for stage in (1, 2, 3)),
        ("cpu_all", 3),
        *(("nvme_optimizer", stage) for stage in (1, 2, 3)),
        ("nvme_all", 3),
    ]
    assert {offload for offload, _ in ways} == set(OFFLOADS)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"params": 0}, "params=0: give the model's number"),
        ({"params": -1}, "params=-1"),
        ({"params": float("nan")}, "params=nan"),
        ({"params": float("inf")}, "params=inf"),
        ({"largest_layer": 101}, "largest_layer=101 must be a part of params=100"),
        ({"largest_layer": -1}, "largest_layer=-1"),
        ({"largest_layer": 0, "stage": 3}, "stage 3 needs"),
        ({"gpus": 0}, "gpus=0 and nodes=1 must each be at least 1"),
        ({"nodes": -2}, "nodes=-2"),
        ({"dtype": "int8"}, "dtype='int8': choose one of fp32, bf16, fp16"),
        ({"stage": 4}, "stage=4: choose 0, 1, 2 or 3"),
        ({"offload": "disk"}, "offload='disk': choose one of none, cpu_optimizer"),
        ({"offload": "cpu_optimizer"}, "offload='cpu_optimizer' needs stage 1 or higher, not 0"),
        ({"offload": "cpu_all", "stage": 2}, "needs stage 3 or higher, not 2"),
        ({"buffer_factor": 0.5}, "buffer_factor=0.5 must be at least 1"),
    ],
)
def test_nonsense_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        model_states_bytes(**{"params": 100, "largest_layer": 10, **wrong})


# DeepSpeed's functions


def test_signatures_are_deepspeeds():
    hardware = {"num_gpus_per_node": 1, "num_nodes": 1, "additional_buffer_factor": 1.5}
    needed = {"2_live": ["model"], "2_cold": ["total_params"]}
    needed |= {"3_live": ["model"], "3_cold": ["total_params", "largest_layer_params"]}
    for which, names in needed.items():
        stage, kind = which.split("_")
        function = getattr(estimate, f"estimate_zero{stage}_model_states_mem_needs_all_{kind}")
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters if p.default is p.empty] == names
        assert {p.name: p.default for p in parameters if p.default is not p.empty} == hardware
        assert [p.name for p in parameters] == [*names, *hardware]


def tied_on_meta() -> torch.nn.Module:
    with torch.device("meta"):
        return tied_model()


def sharded_away() -> torch.nn.Module:
    """As zero.Init leaves a model: empty parameters that remember their whole size."""
    model = tied_model()
    for param in model.parameters():
        param.ds_numel = param.numel()
        param.data = torch.empty(0)
    return model


@pytest.mark.parametrize("make", [tied_model, tied_on_meta, sharded_away])
def test_live_prints_what_cold_prints(make, capsys):
    model, hardware = make(), {"num_gpus_per_node": 4, "num_nodes": 2, "additional_buffer_factor": 2.0}
    estimate.estimate_zero2_model_states_mem_needs_all_live(model, **hardware)
    live = capsys.readouterr().out
    assert f"Model states of {TIED_NUMEL:,} parameters\n" in live
    estimate.estimate_zero2_model_states_mem_needs_all_cold(TIED_NUMEL, 4, 2, 2.0)
    assert capsys.readouterr().out == live
    estimate.estimate_zero3_model_states_mem_needs_all_live(model, **hardware)
    live = capsys.readouterr().out
    assert f"{TIED_NUMEL:,} parameters, largest layer {TIED_LARGEST:,}\n" in live
    estimate.estimate_zero3_model_states_mem_needs_all_cold(TIED_NUMEL, TIED_LARGEST, 4, 2, 2.0)
    assert capsys.readouterr().out == live


def test_cold_prints_gib_with_the_factor(capsys):
    # With 2^30 parameters a byte per parameter is a GiB.
    estimate.estimate_zero2_model_states_mem_needs_all_cold(2**30, 4)
    zero2 = capsys.readouterr().out
    assert re.search(r"^2 +none +5.50 GiB +0 +5.50 GiB +0 +0$", zero2, re.MULTILINE)  # 2 + 14/4
    assert re.search(r"^2 +cpu_optimizer +2.00 GiB +0 +2.00 GiB +21.00 GiB +0$", zero2, re.MULTILINE)  # 14 x 1.5
    assert "without zero.Init takes 24.00 GiB there" in zero2  # 4 x 4 ranks x 1.5
    estimate.estimate_zero3_model_states_mem_needs_all_cold(2**30, 2**28, 4)
    zero3 = capsys.readouterr().out
    assert re.search(r"^3 +none +4.00 GiB +1.00 GiB +5.00 GiB +0 +0$", zero3, re.MULTILINE)
    assert re.search(r"^3 +cpu_all +0 +1.00 GiB +1.00 GiB +24.00 GiB +0$", zero3, re.MULTILINE)  # 16 x 1.5
    assert "\n3" not in zero2 and "\n2" not in zero3


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ConfigError, match="params=0"):
        estimate.estimate_zero3_model_states_mem_needs_all_live(torch.nn.ReLU())


# The command


def test_json_is_what_the_function_returns():
    done = run(*EXAMPLE, "--dtype", "fp32", "--buffer_factor", "1.25", "--gpu_memory", "40", "--json")
    assert done.returncode == 0 and done.stderr == ""
    found = json.loads(done.stdout)
    setup = Setup(7e9, 2e8, 8, 2, "fp32", 1.25)
    assert {name: found[name] for name in Setup._fields} == setup._asdict()
    assert found["ways"] == [way._asdict() for way in all_ways(setup)]
    # 40 GiB hold 4P + 12P/16 = 33.25e9 bytes, but not stage 1's 8P + 8P/16 = 59.5e9.
    assert (found["fit"]["stage"], found["fit"]["offload"]) == (2, "none")


@pytest.mark.parametrize(
    "limits, line",
    [
        (("--gpu_memory", "80"), "stage 1, offload none (30.97 GiB per GPU, 0 per host)."),
        (("--gpu_memory", "20"), "stage 2, offload none (18.74 GiB per GPU, 0 per host)."),
        (("--gpu_memory", "7.5"), "stage 3, offload none (7.26 GiB per GPU, 0 per host)."),
        (("--gpu_memory", "7"), "stage 3, offload cpu_optimizer (1.56 GiB per GPU, 68.45 GiB per host)."),
        (("--gpu_memory", "1"), "stage 3, offload cpu_all (762.94 MiB per GPU, 78.23 GiB per host)."),
        (("--gpu_memory", "1", "--host_memory", "64"), "offload nvme_all (762.94 MiB per GPU, 9.78 GiB per host)."),
        (("--gpu_memory", "0.5"), "Nothing fits: use more GPUs or nodes, or a smaller model."),
        ((), "without zero.Init takes 312.92 GiB there, until it is moved."),
    ],
)
def test_the_last_line_names_the_least_traffic_that_fits(limits, line, capsys):
    estimate.main([*EXAMPLE, *limits])
    assert capsys.readouterr().out.splitlines()[-1].endswith(line)


def test_help_has_an_example_that_runs():
    done = run("--help")
    assert done.returncode == 0
    (example,) = re.findall(r"^ +python -m deepspeedlite\.zero\.estimate (--params .*)$", done.stdout, re.MULTILINE)
    done = run(*shlex.split(example))
    assert done.returncode == 0 and "Least traffic that fits" in done.stdout


@pytest.mark.parametrize(
    "wrong, message",
    [
        (("--params", "0"), "params=0: give the model's number of parameters, such as 7e9"),
        (("--params", "7B"), "argument --params: invalid float value: '7B'"),
        (("--largest_layer", "8e9"), "largest_layer=8e+09 must be a part of params=7e+09"),
        (("--largest_layer", "0"), "largest_layer=0: stage 3 needs"),
        (("--gpus", "0"), "gpus=0 and nodes=2 must each be at least 1"),
        (("--gpus", "2.5"), "argument --gpus: invalid int value"),
        (("--dtype", "int8"), "argument --dtype: invalid choice"),
        (("--buffer_factor", "0.9"), "buffer_factor=0.9 must be at least 1"),
        (("--gpu_memory", "-80"), "gpu_memory, host_memory and disk are in GiB and must be above 0"),
        (("--gpu_memory", "nan"), "must be above 0"),
    ],
)
def test_the_command_refuses_nonsense(wrong, message, capsys):
    with pytest.raises(SystemExit) as exited:
        estimate.main([*EXAMPLE, *wrong])
    said = capsys.readouterr()
    assert exited.value.code == 2 and said.out == ""
    assert message in said.err.splitlines()[-1]


def test_a_refusal_as_a_process():
    done = run("--params", "7e9")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        "the following arguments are required: --params and --largest_layer" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_it_needs_neither_torch_nor_rich():
    code = "import sys, deepspeedlite.tools.memory_plan.estimate as e; e.main(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *EXAMPLE], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not {"torch", "numpy", "rich", "pydantic"} & set(done.stdout.splitlines()[-1].split())


def test_the_page_shows_what_the_command_prints():
    shown = r"```console\n\$ python -m deepspeedlite\.zero\.estimate (.*)\n((?:.*\n)*?)```"
    blocks = re.findall(shown, PAGE.read_text())
    assert blocks
    for arguments, output in blocks:
        assert run(*shlex.split(arguments)).stdout == output


def test_the_page_names_the_configuration_that_the_command_does(capsys):
    """Each cell of its table, of 0.6 of a GPU's memory."""
    head, _, *rows = re.search(r"\| billions of .*\n(?:\|.*\n)+", PAGE.read_text())[0].splitlines()
    machines = re.findall(r"(\d+) x (\d+) x (\d+) GiB, host (\d+)", head)
    assert len(rows) == 7 and len(machines) == 5
    for row in rows:
        model, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        params, largest = re.findall(r"[\d.]+", model)
        for (nodes, gpus, gpu_gib, host_gib), cell in zip(machines, cells, strict=True):
            sizes = ["--params", f"{params}e9", "--largest_layer", f"{largest}e9", "--gpus", gpus, "--nodes", nodes]
            estimate.main([*sizes, "--gpu_memory", str(0.6 * int(gpu_gib)), "--host_memory", host_gib])
            found = re.search(r"stage (\d), offload (\w+) \([^)]*\)\.$", capsys.readouterr().out.strip())
            said = "-" if found is None else f"{found[1]}, {found[2]}".removesuffix(", none")
            assert said == cell, f"{model} on {nodes} x {gpus} x {gpu_gib}"
