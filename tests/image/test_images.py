"""Images for real: built by the tool on a base of Debian packages, run, started as a cluster, and refused where broken.

One image serves all tests; making the base and it takes most of the time. See image_bed.py for what is needed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from children import hear_signals
from image_bed import (
    Image,
    build_cache_removed_after,
    built,
    copy_of_checkout,
    env,
    make_base,
    needs_engine,
    remove_tags,
)
from paths import ROOT
from programs import program

from deepspeedlite.ops.op_builder import OPS
from env import buildkit
from env.context import archive
from env.errors import ImageError
from env.images import push, why_not

docker = pytest.importorskip("docker", reason="needs the docker SDK (make venv-dev)")
pytestmark = [pytest.mark.slow, pytest.mark.images, pytest.mark.timeout(900)]
EXAMPLE = "/opt/deepspeedlite/examples/cifar10"


@pytest.fixture(scope="session")
def image(tmp_path_factory) -> Iterator[Image]:
    def bases(repository: str) -> list[str]:
        if given := os.environ.get("DSL_TEST_BASE"):
            return ["--base", given]
        make_base(f"{repository}:base")
        return ["--base", f"{repository}:base"]

    with built("cpu", tmp_path_factory.mktemp("wheels"), bases) as made:
        yield made


# --- what was built ---------------------------------------------------------------------------------------------------


def test_a_built_image_is_verified_and_tagged(image):
    verified = dict(re.findall(r"^(ok|FAILED) +(op \w+|[\w -]+?)  ", image.said, re.MULTILINE)[::-1])
    assert set(verified) == {"ok"}
    for spec in OPS.values():
        assert re.search(rf"^ok  op {spec.name} ", image.said, re.MULTILINE), image.said
    assert re.search(r"^ok  training .* 20 steps on 2 ranks \(cpu\)", image.said, re.MULTILINE)
    assert re.search(r"runs as dslite \(10001\), no host keys inside", image.said)
    found = image.client.images.get(image.tag)
    assert re.fullmatch(r".*:[\d.]+-cpu", next(tag for tag in found.tags if tag != image.tag))
    assert found.labels["org.deepspeedlite.accelerator"] == "cpu"
    assert found.labels["org.deepspeedlite.torch"] == f"torch=={torch.__version__}"
    assert found.labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_it_is_hardly_larger_than_torch(image):
    """Of the image 1.3 times torch's own size is allowed, and the layers that are listed are all there is."""
    ratio = float(re.search(r"([\d.]+) times torch's own", image.said)[1])
    assert 1 < ratio <= 1.3
    listed_mb = [float(size.replace(",", "")) for size in re.findall(r"^([\d,.]+) MB  ", image.said, re.MULTILINE)]
    assert sum(listed_mb) * 1e6 == pytest.approx(image.client.images.get(image.tag).attrs["Size"], rel=0.01)


def test_an_edit_of_python_code_compiles_nothing_anew_and_what_fails_its_checks_gets_no_tag(image, tmp_path):
    checkout = copy_of_checkout(tmp_path)
    adam = checkout / "deepspeedlite" / "ops" / "multi_tensor.py"
    adam.write_text(adam.read_text().replace("def multi_tensor_l2norm(", "def multi_tensor_l2norm_no_more("))
    options = [*image.options[:-1], f"{image.options[-1]}-broken"]
    said = env("build", "cpu", *options, cwd=checkout, fails=True)
    compiling = re.search(r"\] +(\S+)  RUN ln -s \.\./\.\./csrc deepspeedlite/ops", said)
    assert compiling and compiling[1] == "cached", said
    assert float(re.search(r"built in ([\d.]+) s", said)[1]) < 60, "15 s on a quiet machine: benchmarks/images.py"
    assert re.search(r"^FAILED +op utils .*multi_tensor_l2norm", said, re.MULTILINE), said
    untagged = re.search(
        r"checks failed, so it gets no tag; to look into it: docker run --rm -it (sha256:\S+) bash", said
    )
    image.client.images.remove(untagged[1])
    assert not image.client.images.list(f"{image.options[-1]}-broken")


def test_a_step_that_fails_is_told_with_its_last_lines_and_a_remedy(image):
    options = ["--torch-spec", "torch==99.0.0", "--torch-index", ""]
    said = env("build", "cpu", *image.options, *options, fails=True)
    assert re.search(r"^env build: step \d+ of \d+( of stage torch)? failed: RUN .*venv", said, re.MULTILINE)
    assert re.search(r"^ +ERROR: No matching distribution found for torch==99.0.0", said, re.MULTILINE)
    assert re.search(
        r"^exit status 1\n-> no index has that package for this Python: correct --torch-spec", said, re.MULTILINE
    )


def test_the_matrix_builds_what_can_be_had_and_says_why_the_rest_cannot(image):
    bases = ["--base", f"cpu={image.options[1]}", "--base", "cuda-13.0=registry.invalid/none:1"]
    said = env("matrix", "cpu", "cuda-13.0", *bases, *image.options[2:-1], f"{image.options[-1]}-m")
    assert re.search(r"^cpu +ok +\d+ s +\d+ s +[\d,.]+ MB +\S+-m:[\d.]+-cpu$", said, re.MULTILINE), said
    why = r"left out: registry.invalid/none:1 is not here, and its registry says: \S"
    assert re.search(rf"^cuda-13.0 +- +{why}", said, re.MULTILINE), said
    remove_tags(image.client, f"{image.options[-1]}-m")


BUILDKIT = """
ARG BASE
FROM ${BASE} AS first
USER 0
ARG WORD
# buildkit: --mount=type=cache,target=/kept
RUN echo $WORD >>/kept/log && cat /kept/log
FROM ${BASE}
COPY --from=first /etc/hostname /tmp/
ARG WORD
RUN [ $WORD != third ] || { echo the reason; exit 9; }
"""


def test_buildkit_builds_with_caches_that_outlive_a_build_and_tells_of_the_step_that_fails(image):
    """Spoken to as by the tool, without a client of its own. The whole image: test_images_gpu.py."""
    said: list[str] = []

    def run(word: str) -> Any:
        sent = archive({"Dockerfile": (buildkit.with_mounts(BUILDKIT).encode(), 0o644)}, 0)
        options = {"buildargs": {"BASE": image.tag, "WORD": word}, "labels": {"a.word": word}}
        stream = buildkit.messages(image.client, io.BytesIO(sent), "Dockerfile", options)
        return image.client.images.get(buildkit.follow(stream, said.append, verbose=True)[0])

    with build_cache_removed_after(image.client):
        for number, word in enumerate(["first", "second"], 1):
            made = run(word)
            assert made.labels["a.word"] == word
            image.client.images.remove(made.id)
            times = len(re.findall(r"^ +first$", "\n".join(said), re.MULTILINE))
            assert times == number, "each build prints what the cache has: " + "\n".join(said)
        with pytest.raises(ImageError, match=r"step 3 of 3 .*failed: RUN .*\n +the reason\nexit status 9"):
            run("third")
        with pytest.raises(docker.errors.APIError, match="error reading build args"):
            list(buildkit.messages(image.client, io.BytesIO(b""), "Dockerfile", {"buildargs": "?"}))


# --- docker run -------------------------------------------------------------------------------------------------


def test_it_reports_at_once_whether_it_works_here(image):
    said = image.run()
    assert re.search(r"^software$.*^torch$.*^ops$", said, re.MULTILINE | re.DOTALL)
    assert "nothing broken" in said or "all is well" in said
    assert "only 64 MB of shared memory" in said and "--shm-size=8g" in said
    assert "shared memory (/dev/shm): NCCL" not in image.run(docker=("--shm-size=2g",))
    report = json.loads(image.run("report", "--json", docker=("--shm-size=2g",)))
    assert not [row for row in report["rows"] if row["status"] == "bad"]


def test_it_trains(image):
    config = f"{EXAMPLE}/ds_config.json"
    options = ("--data", "digits", "-e", "2", "--min_accuracy", "0.5")
    said = image.run("train", "--num_gpus", "2", f"{EXAMPLE}/train.py", "--deepspeed_config", config, *options)
    assert re.search(r"handwritten digits.*2 rank\(s\)", said)
    assert float(re.search(r"test accuracy: ([\d.]+)%", said)[1]) > 50


def test_any_other_command_is_run_and_its_exit_status_is_kept(image):
    assert image.run("python", "-c", "print(6 * 7)").strip() == "42"
    assert subprocess.run(["docker", "run", "--rm", image.tag, "sh", "-c", "exit 7"]).returncode == 7
    assert "ok" in image.run("sh", "-c", "deepspeedlite-image health && echo ok")
    said = image.run("--help")
    assert re.search(r"^ +train \[options\] +the launcher", said, re.MULTILINE) and "set -" not in said
    assert list(json.loads(image.run("--json", "--only", "disk", docker=("--shm-size=2g",)))["rows"][0])
    done = subprocess.run(["docker", "run", "--rm", image.tag, "trian", "x.py"], capture_output=True, text=True)
    assert done.returncode == 127 and "no mode and no command trian: see docker run IMAGE --help" in done.stderr


# As clusters run containers. Pairs of what can differ; the commands' own checks say what is missing.
NARROW = ("--network", "none", "--cpus", "1", "--memory", "2g", "--memory-swap", "2g")
READ_ONLY = ("--read-only", "--tmpfs", "/tmp:size=64m")
SOMEBODY = ("--user", "12345:12345")


@pytest.mark.parametrize(
    "options",
    [(*SOMEBODY, *READ_ONLY, *NARROW), (*READ_ONLY, "--init", "--cap-drop", "ALL", "--shm-size=1g")],
    ids=["somebody, read-only, narrow", "read-only, no capabilities"],
)
def test_it_reports_checks_itself_and_trains_as_clusters_run_it(image, options):
    """An arbitrary uid, a read-only root with a small /tmp, no network, 64 MB of /dev/shm, one CPU and 2 GiB."""
    report = json.JSONDecoder().raw_decode(image.run("report", "--json", docker=options))[0]  # before what stderr has
    assert not [row for row in report["rows"] if row["status"] == "bad"], report
    said = image.run("selftest", docker=options)
    assert "FAILED" not in said and re.search(r"^ok +training .* 20 steps on 2 ranks \(cpu\)", said, re.MULTILINE), said


RUNS_ON = """
import os, torch, deepspeedlite
model = torch.nn.Linear(256, 256)
config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "Adam"}}
config |= {"zero_optimization": {"stage": 2}, "checkpoint": {"keep_last": 2}}
engine, *_ = deepspeedlite.initialize(model=model, config=config)
while True:
    engine.backward(engine(torch.randn(4, 256)).square().mean())
    engine.step()
    engine.save_checkpoint("/kept/ckpt")
"""


@pytest.mark.parametrize("options", [("--init",), ()], ids=["init", "no init"])
def test_sigterm_to_the_container_ends_the_ranks_and_leaves_a_whole_checkpoint(image, tmp_path, options):
    """`docker stop`, as a cluster's preemption does it."""
    (tmp_path / "train.py").write_text(RUNS_ON)
    tmp_path.chmod(0o777)
    kept = ("-v", f"{tmp_path}:/kept", *SOMEBODY)
    command = ["docker", "run", "-d", *options, *kept, image.tag, "train", "--num_gpus", "2", "/kept/train.py"]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    try:
        latest = tmp_path / "ckpt" / "latest"
        assert until(lambda: latest.exists() and latest.read_text() not in ("", "global_step1"), 120), logs(name)
        started_s = time.monotonic()
        subprocess.run(["docker", "stop", "-t", "60", name], capture_output=True, check=True)
        assert time.monotonic() - started_s < 30, "it was not the signal that ended it"
        state = image.client.containers.get(name).attrs["State"]
        assert state["ExitCode"] in (130, 143) and not state["OOMKilled"], (state, logs(name))
    finally:
        subprocess.run(["docker", "rm", "--force", name], capture_output=True)
    image.run("python", "-m", "deepspeedlite.checkpoint", "verify", "/kept/ckpt", docker=kept)


def until(holds: Callable[[], bool], within_s: float) -> bool:
    """Whether it comes to hold in that time."""
    end_s = time.monotonic() + within_s
    while not (found := holds()) and time.monotonic() < end_s:
        time.sleep(0.2)
    return found


def logs(name: str) -> str:
    done = subprocess.run(["docker", "logs", name], capture_output=True, text=True)
    return done.stdout + done.stderr


NVIDIA_SMI = """#!/bin/sh
cat <<'END'
| NVIDIA-SMI 550.54.15     Driver Version: 550.54.15     CUDA Version: {able}  |
END
"""


@pytest.mark.parametrize("able", ["12.4", "13.1"])
def test_a_driver_older_than_the_image_is_told(able, image, tmp_path):
    """The GPU and its driver are made up: what is tested is that starting asks for it."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(NVIDIA_SMI.format(able=able))
    tool.chmod(0o755)
    variables = ("-e", "DSL_IMAGE_ACCELERATOR=cuda", "-e", "DSL_IMAGE_ACCELERATOR_VERSION=13.0")
    options = (*variables, "-v", f"{tool}:/usr/local/bin/nvidia-smi:ro")
    said = image.run("report", "--only", "disk", docker=options)
    told = "the host's driver 550.54.15 runs CUDA 12.4 at most, and this image is for CUDA 13.0: update the driver"
    assert (told in said) is (able == "12.4")
    assert "docker run --gpus all" in image.run("report", "--only", "disk", docker=variables)


def test_a_worker_wants_a_public_key_and_no_root(image, tmp_path):
    assert "worker needs the public keys that may log in: docker run -v" in image.run("worker", fails=True)
    wrong = tmp_path / "key"
    wrong.write_text("not a key\n")
    mounted = ("-v", f"{wrong}:/etc/deepspeedlite/authorized_keys:ro")
    assert "mount KEY.pub, not KEY" in image.run("worker", docker=mounted, fails=True)
    assert "leave out docker run --user root" in image.run("worker", docker=("--user", "root"), fails=True)
    assert "leave out docker run --user 4242" in image.run("worker", docker=("--user", "4242"), fails=True)


# --- a cluster --------------------------------------------------------------------------------------------------------

TRAIN = """
import sys, torch, deepspeedlite
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}, "gradient_clipping": 0,
          "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}}}
engine = deepspeedlite.initialize(model=model, config=config)[0]
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
for step in range(int(sys.argv[-1])):
    inputs = torch.randn(world, 4, 16, generator=torch.Generator().manual_seed(step))[rank]
    loss = (engine(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
    engine.backward(loss)
    engine.step()
    torch.distributed.all_reduce(mean := loss.detach().clone())
    if rank == 0:
        print("step", step, "of", world, "loss", mean.item() / world, flush=True)
"""


def unsharded_losses(steps: int, world: int) -> list[float]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    losses = []
    for step in range(steps):
        inputs = torch.randn(world, 4, 16, generator=torch.Generator().manual_seed(step)).flatten(0, 1)
        loss = (model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def cluster(image, tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("scripts")
    folder.chmod(0o755)
    (folder / "train.py").write_text(TRAIN)
    name = image.options[-1]
    said = env("cluster", "up", name, "--nodes", 3, "--image", image.tag, "--volume", f"{folder}:/scripts:ro")
    assert f"{name}-worker-1, {name}-worker-2, {name}-worker-3 from {image.tag}" in said
    yield name
    said = env("cluster", "down", name)
    assert re.search(rf"removed {name}-worker-1, .*{name}-cluster$", said.strip())
    found = {"label": f"org.deepspeedlite.cluster={name}"}
    assert not image.client.containers.list(all=True, filters=found)
    assert not image.client.networks.list(filters=found)
    assert "there is no such cluster" in env("cluster", "down", name)
    assert "there is no cluster" in env("cluster", "train", name, "x.py", fails=True)


def start_training(name: str, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "env", "cluster", "train", name, "/scripts/train.py", str(steps)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, preexec_fn=hear_signals, **pipes)


def read_until(training: subprocess.Popen[str], wanted: str) -> str:
    said = ""
    for line in training.stdout:
        said += line
        if wanted in line:
            return said
    pytest.fail(f"it ended before {wanted!r}:\n{said}")


def in_worker(image: Image, name: str, number: int, command: str) -> tuple[int, str]:
    status, out = image.client.containers.get(f"{name}-worker-{number}").exec_run(["sh", "-c", command])
    return status, out.decode()


@pytest.mark.parametrize("launcher", ["pdsh", "ssh"])
def test_three_containers_train_as_one_machine_would(launcher, image, cluster):
    said = env("cluster", "train", cluster, "--launcher", launcher, "/scripts/train.py", 5)
    losses = [float(loss) for loss in re.findall(r"step \d+ of 3 loss (\S+)", said)]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(unsharded_losses(5, 3)), rtol=1e-4, atol=1e-5)


def test_nobody_gets_into_a_worker_without_the_key(image, cluster):
    status, out = in_worker(image, cluster, 1, "ssh -o BatchMode=yes worker-2 'id -un; command -v deepspeedlite'")
    assert (status, out.split()) == (0, ["dslite", "/opt/deepspeedlite/venv/bin/deepspeedlite"]), out
    status, out = in_worker(image, cluster, 1, "ssh -o BatchMode=yes -i /dev/null -o IdentitiesOnly=yes worker-2 true")
    assert status == 255 and "Permission denied (publickey)" in out
    status, out = in_worker(image, cluster, 1, "ssh -o BatchMode=yes root@worker-2 true")
    assert status == 255 and "Permission denied" in out
    assert in_worker(image, cluster, 2, "ls ~/.ssh/id_ed25519")[0] != 0, "only the first has the private key"
    keys = {in_worker(image, cluster, number, "cat ~/.ssh/host_key.pub")[1] for number in (1, 2, 3)}
    assert len(keys) == 3, "every container makes its own host key"


def test_a_second_cluster_of_that_name_is_refused_and_harms_nothing(image, cluster):
    assert "there is a cluster" in env("cluster", "up", cluster, "--image", image.tag, fails=True)
    assert "there is no image no-such:image" in env("cluster", "up", "other", "--image", "no-such:image", fails=True)
    assert in_worker(image, cluster, 3, "true")[0] == 0


def test_ctrl_c_ends_the_ranks_in_all_containers(image, cluster):
    training = start_training(cluster, 1_000_000)
    read_until(training, "step 3 of 3")
    training.send_signal(signal.SIGINT)
    said = training.communicate(timeout=60)[0]
    assert training.returncode == 130, said
    for number in (1, 2, 3):
        assert (
            in_worker(image, cluster, number, "cat /proc/[0-9]*/cmdline | grep -c scripts/train.p[y]")[1].strip() == "0"
        )


def test_a_container_that_is_killed_ends_the_training_with_its_name(image, cluster):
    """The last test of the cluster, which has two workers afterwards."""
    training = start_training(cluster, 1_000_000)
    read_until(training, "step 10 of 3")
    image.client.containers.get(f"{cluster}-worker-3").kill()
    said = training.communicate(timeout=120)[0]
    assert training.returncode not in (0, None), said
    assert re.search(r"FAILED after .* s, exit status", said), said
    assert re.search(r"worker-3.*(lost|connection|failed first)", said), said
    for number in (1, 2):
        assert (
            in_worker(image, cluster, number, "cat /proc/[0-9]*/cmdline | grep -c scripts/train.p[y]")[1].strip() == "0"
        )


# --- the engine and registries ----------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_who_may_not_use_the_engine_is_told_how_to_be_let():
    """By a process that was root until everything was imported: others may not be able to read the environment."""
    needs_engine()
    code = "import os; from env.engine import connect; connect(); os.setgroups([]); os.setuid(65534); connect()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"no Docker engine answers at .*; you may not use it: sudo usermod -aG docker", done.stderr)


@pytest.fixture
def registry(tmp_path, free_port) -> Iterator[str]:
    program("docker-registry")
    config = tmp_path / "registry.yml"
    storage = f"storage: {{filesystem: {{rootdirectory: {tmp_path}/registry}}}}"
    config.write_text(f"version: 0.1\nlog: {{level: warn}}\n{storage}\nhttp: {{addr: '127.0.0.1:{free_port}'}}\n")
    with subprocess.Popen(["docker-registry", "serve", config], stderr=subprocess.DEVNULL) as server:
        try:
            yield f"127.0.0.1:{free_port}"
        finally:
            server.terminate()


def test_images_are_pushed_and_what_is_refused_is_told(registry):
    client = needs_engine()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("something"))
    tag, nowhere = f"{registry}/team/deepspeedlite:cpu", "127.0.0.1:9/team/deepspeedlite:cpu"
    try:
        client.api.import_image_from_data(packed.getvalue(), repository=tag.rpartition(":")[0], tag="cpu")
        client.images.get(tag).tag(nowhere)
        said: list[str] = []
        assert "connection refused" in why_not(client, nowhere.replace(":cpu", ":none"))
        for _ in range(100):  # until the registry answers
            with contextlib.suppress(ImageError):
                push(client, tag, said.append)
                break
        assert f"pushing {tag}" in said
        client.images.remove(tag)
        assert why_not(client, tag) == "", "the registry has it now"
        with pytest.raises(
            ImageError, match=r"is not pushed: .*connection refused.*\n-> the registry or package index"
        ):
            push(client, nowhere, said.append)
    finally:
        for name in (tag, nowhere):
            with contextlib.suppress(Exception):
                client.images.remove(name, force=True)
