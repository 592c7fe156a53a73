"""The largest model that fits: sums done by hand for a machine of round numbers, and the command on this machine.

That as much memory as a training takes lets `fit_all` find that training's size is tested in test_zero_memory.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import psutil
import pytest
from paths import ROOT
from programs import needs

from deepspeedlite.runtime.errors import ConfigError
from deepspeedlite.tools.memory_plan import estimate, machine
from deepspeedlite.tools.memory_plan.fit import Fit, Training, activation_bytes, fit_all, step_parts
from deepspeedlite.tools.memory_plan.machine import Machine, measure

G = 10**9
# 1 TFLOP/s; memories of 100 and 50 GB/s, a bus of 10, a disk of 4 and 2.
GPUS = Machine("a GPU", 2, 100 * G, 1000 * G, 10_000 * G, 1e12, 1e11, 5e10, 1e10, 4e9, 2e9, "")
CPUS = GPUS._replace(device="cpu", gpus=0, gpu_bytes=0, device_rate=5e10)
ONE_TOKEN = Training(2, 1, "bf16", 1.0, 10, 1, 1e10)  # on 2 ranks, with next to no activations


def fit_of(stage: int, offload: str, training: Training = ONE_TOKEN, on: Machine = GPUS) -> Fit:
    (found,) = (fit for fit in fit_all(training, on) if fit.states[:2] == (stage, offload))
    return found


# Bytes per parameter of a rank, of the host and of the disk, and the parameters for which the scarcest of them is full.
# Stage 3 also needs a layer, a tenth of the parameters, whole, and its gradient: 2 x 2 / 10 bytes.
@pytest.mark.parametrize(
    "stage, offload, more, params, full",
    [
        (0, "none", {}, 100 / 16, "gpu"),
        (1, "none", {}, 100 / (4 + 6), "gpu"),
        (2, "none", {}, 100 / (2 + 7), "gpu"),
        (3, "none", {}, 100 / (8 + 0.4), "gpu"),
        (1, "cpu_optimizer", {}, 100 / 4, "gpu"),
        (1, "cpu_optimizer", {"host_bytes": 120 * G}, 120 / 12, "host"),
        (2, "cpu_optimizer", {}, 100 / 2, "gpu"),
        (3, "cpu_optimizer", {"host_bytes": 700 * G}, 700 / 14, "host"),
        (3, "cpu_all", {}, 1000 / 16, "host"),
        (3, "nvme_optimizer", {}, 100 / (1 + 0.4), "gpu"),
        (3, "nvme_optimizer", {"disk_bytes": 120 * G}, 120 / 12, "disk"),
        (3, "nvme_all", {}, 100 / 0.4, "gpu"),
        (3, "nvme_all", {"disk_bytes": 140 * G}, 140 / 14, "disk"),
    ],
)
def test_the_largest_model_is_the_one_for_which_there_is_no_room_left(stage, offload, more, params, full):
    found = fit_of(stage, offload, on=GPUS._replace(**more))
    assert found.params == pytest.approx(params * G, rel=1e-3) and found.full == full


def test_a_parameter_more_has_no_room():
    one = GPUS._replace(gpu_bytes=160_000)
    training = ONE_TOKEN._replace(gpus=1)
    found = fit_of(0, "none", training, one)
    for params, fits in ((found.params, True), (found.params + 1, False)):
        assert (16 * params + activation_bytes(params, training) <= one.gpu_bytes) == fits


def test_activations_take_their_part():
    training = Training(1, 1, "bf16", 1.0, layers=12, tokens=1000, exchange_rate=1e10)
    # Blocks of 12 x 1000^2 parameters: 12 inputs and the 17 tensors of one block, of 1000 x 1000 elements.
    assert activation_bytes(144_000_000, training) == 2 * (12 + 17) * 1000 * 1000
    found = fit_of(0, "none", training, GPUS._replace(gpu_bytes=16 * 144_000_000 + 58_000_000))
    assert found.params == 144_000_000 and found.activation_bytes == 58_000_000


@pytest.mark.parametrize("stage, offload, rank, host", [(0, "none", 16, 0), (2, "nvme_optimizer", 2, 2)])
def test_ranks_without_gpus_share_the_hosts_memory(stage, offload, rank, host):
    found = fit_of(stage, offload, on=CPUS)
    assert found.params == pytest.approx(1000 * G / (2 * rank + host), rel=1e-3) and found.full == "host"


@pytest.mark.parametrize("on, disk", [(GPUS, 12), (CPUS, 8)])
def test_fp32_needs_masters_where_the_step_is_elsewhere_than_the_parameters(on, disk):
    training = ONE_TOKEN._replace(dtype="fp32")
    found = fit_of(3, "nvme_optimizer", training, on._replace(disk_bytes=120_000))
    assert found.params == 120_000 // disk and found.full == "disk"
    _, step_s = step_parts(G, 3, "nvme_optimizer", training, on)
    assert step_s["disk"] == pytest.approx(disk / 4 + disk / 2)


def test_the_buffer_factor_is_the_hosts():
    assert fit_of(3, "cpu_all", ONE_TOKEN._replace(buffer_factor=2.0)).params == pytest.approx(1000 * G / 32, rel=1e-3)


def test_nothing_fits_where_there_is_no_room():
    found = fit_of(0, "none", on=GPUS._replace(gpu_bytes=10))
    assert (found.params, found.full, found.seconds) == (0, "gpu", 0)


def test_without_a_disk_nothing_is_offloaded_to_one():
    names = [fit.states.offload for fit in fit_all(ONE_TOKEN, GPUS._replace(read_rate=0, write_rate=0))]
    assert len(names) == 8 and set(names) == {"none", "cpu_optimizer", "cpu_all"}
    assert len(fit_all(ONE_TOKEN, GPUS)) == 12


def test_without_gpus_nothing_is_offloaded_to_the_memory_where_it_is():
    names = [fit.states.offload for fit in fit_all(ONE_TOKEN, CPUS)]
    assert len(names) == 8 and set(names) == {"none", "nvme_optimizer", "nvme_all"}


# 1 G parameters in bf16 on 2 ranks of one host, 1000 tokens: 8 x 1000 G operations at 1 T/s are 8 s. By hand, in GB:
# the weights are 2, a rank's half of them 1, its half of master and moments 6.
@pytest.mark.parametrize(
    "stage, offload, passes, step",
    [
        # ranks: 2 x 2 x 1/2 at 10; memory: 12 read and written, and a gradient and a weight of 2 each, at 100
        (0, "none", {"ranks": 0.2}, {"memory": 0.28}),
        (1, "none", {"ranks": 0.2}, {"memory": 0.14}),
        (3, "none", {"ranks": 0.3}, {"memory": 0.14}),
        # the gradient of 1 leaves by the bus, at 10; the host's memory, at 50, does it for both ranks; 1 comes back
        (2, "cpu_optimizer", {"ranks": 0.2, "bus": 0.1}, {"memory": 0.56, "bus": 0.1}),
        # the weights come twice by the bus, and need not go back
        (3, "cpu_all", {"ranks": 0.3, "bus": 0.3}, {"memory": 0.56}),
        # both ranks' 6 are read at 4 and written at 2
        (3, "nvme_optimizer", {"ranks": 0.3, "bus": 0.1}, {"memory": 0.56, "bus": 0.1, "disk": 3 + 6}),
        # the weights too: both ranks' 1 read twice and written once
        (3, "nvme_all", {"ranks": 0.3, "bus": 0.3, "disk": 1}, {"memory": 0.56, "disk": 3 + 7}),
    ],
)
def test_a_steps_time_is_that_of_the_bytes_moved(stage, offload, passes, step):
    training = ONE_TOKEN._replace(tokens=1000)
    found = step_parts(G, stage, offload, training, GPUS)
    zero = dict.fromkeys(("compute", "ranks", "bus", "disk", "memory"), 0)
    assert found[0] == pytest.approx({name: ({**zero, **passes, "compute": 8})[name] for name in found[0]})
    assert found[1] == pytest.approx({name: ({**zero, **step})[name] for name in found[1]})


def test_ranks_without_gpus_share_the_hosts_rates():
    found = step_parts(G, 1, "none", ONE_TOKEN._replace(tokens=1000), CPUS)
    assert found[0]["compute"] == 16 and found[1]["memory"] == pytest.approx(0.56)


def test_phases_follow_each_other_and_their_parts_overlap():
    found = Fit(fit_of(0, "none").states, 1, 0, "", {"compute": 3.0, "bus": 1.0}, {"memory": 0.5, "disk": 2.0})
    assert found.seconds == 5 and found.held_up_by == "compute + disk"


@pytest.mark.parametrize("name", ["gpus", "nodes", "layers", "tokens", "buffer_factor", "exchange_rate"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_nonsense_is_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        fit_all(ONE_TOKEN._replace(**{name: value}), GPUS)


# The command


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Machine:
    folder = tmp_path_factory.mktemp("disk")
    found = measure("fp32", str(folder))
    assert not any(folder.iterdir())
    return found


@pytest.mark.slow
def test_what_is_measured_is_there(here, tmp_path):
    assert (
        0 < here.host_bytes < psutil.virtual_memory().total and 0 < here.disk_bytes < shutil.disk_usage(tmp_path).free
    )
    assert min(here.flops, here.device_rate, here.host_rate, here.bus_rate) > 0
    assert min(here.read_rate, here.write_rate) > 0 or here.note
    assert (here.gpu_bytes > 0) == (here.gpus > 0)


@needs("c++")
@pytest.mark.slow
def test_the_command_measures_and_tells(here, tmp_path, monkeypatch, capsys):
    command = [sys.executable, "-m", "deepspeedlite.zero.estimate", "--fit", "--path", str(tmp_path), "--gpus", "2"]
    command += ["--nodes", "2", "--tokens", "128", "--host_memory", "2", "--disk", "3", "--gpu_memory", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["training"]["gpus"], found["training"]["nodes"], found["training"]["tokens"]) == (2, 2, 128)
    assert (found["machine"]["host_bytes"], found["machine"]["disk_bytes"]) == (2 << 30, 3 << 30)
    assert {way["offload"] for way in found["ways"]} >= ({"none", "cpu_all"} if here.gpus else {"none"})
    for way in found["ways"]:
        assert way["params"] > 0 and way["seconds"] > 0 and way["nvme_bytes"] <= 3 << 30 and way["full"]
        assert way["host_bytes"] <= 2 << 30
    monkeypatch.setattr(machine, "measure", lambda dtype, path: here)  # as measured a moment ago
    estimate.main(["--fit"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Host: " if not here.gpus else f"{here.gpus} x ")
    rows = [line.split() for line in lines if line[:1].isdigit()]
    assert [row[:2] for row in rows[:4]] == [[str(stage), "none"] for stage in range(4)]
    assert all(row[3] == "B" for row in rows) and all(len(line) <= 110 for line in lines)


def test_a_folder_that_is_not_there_is_no_disk(tmp_path):
    read_rate, write_rate, note = machine._disk_rates(str(tmp_path / "missing"))
    assert (read_rate, write_rate) == (0, 0) and "missing is no folder with 512 MiB of room" in note


@pytest.mark.parametrize(
    "wrong, message",
    [
        (("--layers", "0"), "layers=0 must be above 0"),
        (("--disk", "0"), "gpu_memory, host_memory and disk are in GiB and must be above 0"),
        (("--exchange_rate", "-1"), "exchange_rate=-1e+09 must be above 0"),
        (("--params", "1e9"), "--fit looks for the number of parameters: leave out --params and --largest_layer"),
    ],
)
def test_the_command_refuses_nonsense_before_it_measures(wrong, message, capsys, monkeypatch):
    monkeypatch.setattr(machine, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as exited:
        estimate.main(["--fit", *wrong])
    assert exited.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
