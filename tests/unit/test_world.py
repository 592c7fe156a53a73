"""How a process finds its place from its launcher's variables: runtime/env.py, by table and by hypothesis."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from deepspeedlite.runtime.env import World, discover_world
from deepspeedlite.runtime.errors import DistributedError
from deepspeedlite.schedulers import expand_nodelist

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "1234",
    "TORCHELASTIC_RUN_ID": "none",
}
OMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
OMPI_TWO_HOSTS = {**OMPI, "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "0",
    "MV2_COMM_WORLD_SIZE": "2",
    "MV2_COMM_WORLD_LOCAL_RANK": "0",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}
# What sbatch -N 3 -n 5 sets in its script, and what srun adds for a task there.
SLURM_BATCH = {
    "SLURM_JOB_ID": "42",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "gpu[07-09]",
    "SLURM_NODEID": "0",
}
SLURM_TASK = {
    **SLURM_BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
ALONE = World(0, 1, 0, 1, None, None, "single process")


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        pytest.param({}, ALONE, id="nothing"),
        pytest.param({"RANK": "", "WORLD_SIZE": " "}, ALONE, id="empty counts as unset"),
        pytest.param({"LOCAL_RANK": "-1"}, ALONE, id="LOCAL_RANK -1 of old launchers"),
        pytest.param(TORCHRUN, World(3, 4, 1, 2, "node1", 1234, "torchrun"), id="torchrun"),
        pytest.param(
            {"RANK": "0", "WORLD_SIZE": "1"}, World(0, 1, 0, None, None, None, "RANK and WORLD_SIZE"), id="by hand, one"
        ),
        pytest.param(
            {**OMPI, "MASTER_PORT": "77"}, World(1, 2, 1, 2, "127.0.0.1", 77, "Open MPI"), id="ompi, one host"
        ),
        pytest.param(OMPI_TWO_HOSTS, World(1, 2, 0, 1, None, None, "Open MPI"), id="ompi, hosts unknown"),
        pytest.param(
            {**OMPI_TWO_HOSTS, "MASTER_ADDR": "a"}, World(1, 2, 0, 1, "a", None, "Open MPI"), id="ompi -x MASTER_ADDR"
        ),
        pytest.param(HYDRA, World(2, 4, 0, 2, None, None, "MPICH or Intel MPI"), id="hydra"),
        pytest.param(MVAPICH, World(0, 2, 0, 2, "127.0.0.1", None, "MVAPICH"), id="mvapich"),
        pytest.param(SLURM_BATCH, ALONE, id="sbatch script without srun"),
        pytest.param(
            {**SLURM_BATCH, "SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_STEP_NODELIST": "gpu07"},
            ALONE,
            id="salloc's shell",
        ),
        pytest.param(
            {**SLURM_TASK, "MASTER_PORT": "9"}, World(3, 5, 1, 2, "gpu07", 9, "Slurm"), id="srun, several hosts"
        ),
        pytest.param(
            {**SLURM_TASK, "SLURM_STEP_NODELIST": "gpu08", "MASTER_PORT": "9"},
            World(3, 5, 1, 5, "127.0.0.1", 9, "Slurm"),
            id="srun, one host",
        ),
        pytest.param(
            {**SLURM_TASK, "PMI_RANK": "3", "PMI_SIZE": "5", "MASTER_PORT": "9"},
            World(3, 5, 1, 2, "gpu07", 9, "Slurm"),
            id="srun --mpi=pmi2",
        ),
        pytest.param(
            {**SLURM_TASK, **HYDRA, "MASTER_ADDR": "h", "MASTER_PORT": "9"},
            World(2, 4, 0, 2, "h", 9, "MPICH or Intel MPI"),
            id="mpiexec inside Slurm: its proxies are srun's tasks",
        ),
        pytest.param(
            {**SLURM_TASK, **TORCHRUN}, World(3, 4, 1, 2, "node1", 1234, "torchrun"), id="torchrun under srun"
        ),
        pytest.param(
            {**OMPI, "AZUREML_EXPERIMENT_ID": "x", "AZ_BATCHAI_MPI_MASTER_NODE": "vm0"},
            World(1, 2, 1, 2, "vm0", 54965, "Azure ML"),
            id="azure, one host",
        ),
        pytest.param(
            {**OMPI_TWO_HOSTS, "AZUREML_EXPERIMENT_ID": "x", "AZ_BATCH_MASTER_NODE": "10.0.0.4:6000"},
            World(1, 2, 0, 1, "10.0.0.4", 6105, "Azure ML"),
            id="azure, two hosts",
        ),
        pytest.param(
            {**OMPI_TWO_HOSTS, "SM_TRAINING_ENV": "{}", "SM_HOSTS": '["algo-1", "algo-2"]'},
            World(1, 2, 0, 1, "algo-1", None, "SageMaker"),
            id="sagemaker",
        ),
    ],
)
def test_known_launchers(environ: dict[str, str], world: World) -> None:
    """Each launcher's variables give the world they mean."""
    assert discover_world(environ) == world


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"RANK": "0"}, ["RANK=0", "WORLD_SIZE"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "RANK"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["LOCAL_RANK"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK=1", "RANK and WORLD_SIZE"]),
        ({**TORCHRUN, "RANK": "4"}, ["rank 4", "world of 4"]),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, ["local rank 2", "2 process"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "5"}, ["local rank 5", "world of 2"]),
        ({**TORCHRUN, "RANK": "one"}, ["RANK='one'"]),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, ["MASTER_PORT=70000"]),
        ({k: v for k, v in OMPI.items() if not k.endswith("LOCAL_RANK")}, ["OMPI_COMM_WORLD_LOCAL_RANK not"]),
        ({k: v for k, v in OMPI.items() if k != "OMPI_COMM_WORLD_SIZE"}, ["OMPI_COMM_WORLD_SIZE not"]),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, ["MPI_LOCALRANKID not"]),
        ({k: v for k, v in SLURM_TASK.items() if k != "SLURM_LOCALID"}, ["SLURM_LOCALID not"]),
        ({k: v for k, v in SLURM_TASK.items() if "NODELIST" not in k}, ["SLURM_STEP_NODELIST", "MASTER_ADDR"]),
        ({**OMPI, "AZUREML_EXPERIMENT_ID": "x"}, ["AZ_BATCHAI_MPI_MASTER_NODE"]),
        ({**OMPI, "RANK": "0", "WORLD_SIZE": "1"}, ["WORLD_SIZE=1", "Open MPI started 2", "LOCAL_WORLD_SIZE=1"]),
    ],
)
def test_half_set_or_contradictory_variables_are_named(environ: dict[str, str], named: list[str]) -> None:
    """The error says which variable is missing or wrong."""
    with pytest.raises(DistributedError) as caught:
        discover_world(environ)
    for text in named:
        assert text in str(caught.value)


def test_a_world_of_one_on_purpose_under_mpirun() -> None:
    """A sweep may train alone in every MPI process, when it says so."""
    environ = {**OMPI, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    assert discover_world(environ).world_size == 1


def test_schedulers_can_be_ignored() -> None:
    """`auto_mpi_discovery=False` is a single process under mpirun and srun."""
    assert discover_world({**OMPI, **SLURM_TASK}, schedulers=False) == ALONE


def test_ports_follow_the_job() -> None:
    """Ranks of one job agree on a port; other jobs and other steps get another; MASTER_PORT wins."""
    ports = [
        discover_world({**SLURM_TASK, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).master_port
        for job, step in (("42", "0"), ("42", "1"), ("43", "0"))
    ]
    assert len(set(ports)) == 3
    assert all(port is not None and 10000 <= port < 30000 for port in ports)
    other_rank = {**SLURM_TASK, "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}
    assert discover_world({**other_rank, "SLURM_STEP_ID": "0"}).master_port == ports[0]
    assert discover_world({**SLURM_TASK, "MASTER_PORT": "5"}).master_port == 5


VARIABLES = sorted({*TORCHRUN, *OMPI, *HYDRA, *SLURM_TASK, "SLURM_LAUNCH_NODE_IPADDR"})
VALUES = st.one_of(st.integers(-2, 9).map(str), st.sampled_from(["", "x", "n[1-2]", "2(x2),1", "[", "none"]))


@given(st.dictionaries(st.sampled_from(VARIABLES), VALUES))
def test_any_mixture_is_a_sound_world_or_one_error(environ: dict[str, str]) -> None:
    """No mixture of variables gives an impossible world or another exception."""
    try:
        world = discover_world(environ)
    except DistributedError:
        return
    assert 0 <= world.rank < world.world_size
    assert 0 <= world.local_rank < world.world_size
    assert world.local_size is None or world.local_rank < world.local_size


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("login", ["login"]),
        ("a,b-2", ["a", "b-2"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[01-03,7],login", ["n01", "n02", "n03", "n7", "login"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]c[3,5]-ib", ["r1c3-ib", "r1c5-ib", "r2c3-ib", "r2c5-ib"]),
        ("", []),
    ],
)
def test_nodelists(nodelist: str, hosts: list[str]) -> None:
    """Slurm's notation, in order."""
    assert expand_nodelist(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["n[1-2", "n1-2]", "n[a-b]", "n[2-1]", "n[[1]]"])
def test_broken_nodelists(nodelist: str) -> None:
    """Malformed lists are errors, not odd host names."""
    with pytest.raises(DistributedError, match="node list"):
        expand_nodelist(nodelist)


@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z][a-z0-9\-]{0,5}[a-z]", fullmatch=True), st.integers(0, 99), st.integers(0, 20)),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 4),
)
def test_nodelists_round_trip(parts: list[tuple[str, int, int]], width: int) -> None:
    """A list written with ranges expands to the hosts it was made from."""
    nodelist = ",".join(f"{name}[{first:0{width}d}-{first + more:0{width}d}]" for name, first, more in parts)
    hosts = [f"{name}{number:0{width}d}" for name, first, more in parts for number in range(first, first + more + 1)]
    assert expand_nodelist(nodelist) == hosts


def test_it_needs_no_torch() -> None:
    """runtime/env.py is layer 0."""
    code = "import sys, deepspeedlite.runtime.env; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
