"""The images for GPUs, built where there is none, with nvcc and hipcc and a torch for the CPU; and one with a compiler.

Their bases alone have gigabytes, so these run only where DSL_TEST_GPU_IMAGES=1 asks for them: `make test-images` does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_bed import Image, build_cache_removed_after, built, env, make_base, needs_engine, remove_tags
from programs import program

from deepspeedlite.ops.op_builder import OPS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.images,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.environ.get("DSL_TEST_GPU_IMAGES") != "1", reason="needs DSL_TEST_GPU_IMAGES=1: takes minutes"
    ),
]
ON_GPU = [spec.name for spec in OPS.values() if spec.gpu]


@pytest.fixture(scope="module")
def cuda(tmp_path_factory) -> Iterator[Image]:
    wrapper = Path(program("nvcc"))
    toolkit = re.search(r"(/\S+)/bin/nvcc", wrapper.read_text(errors="ignore")[:200])
    home = Path(toolkit[1]) if toolkit else wrapper.resolve().parent.parent

    def bases(repository: str) -> list[str]:
        copy = f"copy-in {home} /usr/local"
        make_base(f"{repository}:devel", "g++", copy, f'chroot "$1" ln -s {home.name} /usr/local/cuda')
        make_base(f"{repository}:base")
        return ["--base", f"{repository}:devel", "--run-base", f"{repository}:base"]

    options = ("--archs", "8.0;9.0", "--verbose")
    with built("cuda-13.0", tmp_path_factory.mktemp("wheels"), bases, *options) as made:
        yield made


@pytest.fixture(scope="module")
def rocm(tmp_path_factory) -> Iterator[Image]:
    def bases(repository: str) -> list[str]:
        make_base(f"{repository}:devel", "g++,hipcc")
        make_base(f"{repository}:base", "libamdhip64-5")
        return ["--base", f"{repository}:devel", "--run-base", f"{repository}:base"]

    with built("rocm-6.4", tmp_path_factory.mktemp("wheels"), bases, "--archs", "gfx90a", "--verbose") as made:
        yield made


@pytest.fixture(scope="module")
def jit(tmp_path_factory) -> Iterator[Image]:
    def bases(repository: str) -> list[str]:
        make_base(f"{repository}:base")
        return ["--base", f"{repository}:base"]

    with built("cpu", tmp_path_factory.mktemp("wheels"), bases, "--with-jit", "--ops", "utils") as made:
        yield made


def test_the_whole_image_is_built_by_buildkit_too(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_BUILDKIT", "1")

    def bases(repository: str) -> list[str]:
        make_base(f"{repository}:base")
        return ["--base", f"{repository}:base"]

    with build_cache_removed_after(needs_engine()), built("cpu", tmp_path, bases, "--ops", "utils") as made:
        assert re.search(r"^\[wheel 8/12\] +\S+ s  RUN mkdir deepspeedlite/ops", made.said, re.MULTILINE), made.said
        assert re.search(r"^built in \S+ s by BuildKit", made.said, re.MULTILINE)
        assert re.search(r"^[\d.]+ MB +RUN \[ .* apt-get update", made.said, re.MULTILINE), "layers tell what made them"
        assert "ok  training" in made.said and "cpu: tagged" in made.said
        assert float(re.search(r"([\d.]+) times torch's own", made.said)[1]) <= 1.3
        mounts = [entry for entry in made.client.df()["BuildCache"] if entry["Type"] == "exec.cachemount"]
        assert [entry for entry in mounts if "/root/.cache/pip" in entry["Description"] and entry["UsageCount"] >= 3]


def test_an_image_with_a_compiler_compiles_what_its_wheel_does_not_bring(jit):
    assert re.search(r"^ok  compiler .*c\+\+ .*; compiled \S+/cpu_adam-\w+.so", jit.said, re.MULTILINE), jit.said
    assert re.search(r"^ok  op utils", jit.said, re.MULTILINE) and "op cpu_lion" not in jit.said
    assert (
        "cpu: tagged" in jit.said
        and jit.client.images.get(f"{jit.tag}-jit").labels["org.deepspeedlite.with-jit"] == "1"
    )


def test_the_cuda_image_has_code_for_every_gpu_asked_for_and_works_on_the_cpu(cuda):
    for name in ON_GPU:
        assert re.search(rf"^ +{name}.so +sm_80 sm_90$", cuda.said, re.MULTILINE), "cuobjdump, inside the build"
        assert re.search(rf"^ok  op {name} ", cuda.said, re.MULTILINE)
    assert re.search(r"^ok  what is inside .*\+cpu, \d+ ops for 8.0 9.0", cuda.said, re.MULTILINE)
    labels = cuda.client.images.get(cuda.tag).labels
    assert labels["org.deepspeedlite.archs"] == "8.0;9.0"
    assert labels["org.deepspeedlite.torch"].endswith("+cpu"), "the label says that its torch is for the CPU"
    assert "no NVIDIA driver answers" in cuda.run("report", "--only", "disk")


def test_the_matrix_builds_side_by_side(cuda):
    """With other ops than before, so that both have something to compile."""
    bases = ["--base", f"cuda-13.0={cuda.options[1]}", "--run-base", f"cuda-13.0={cuda.options[3]}"]
    repository = f"{cuda.options[cuda.options.index('--repository') + 1]}-m"
    wheels = cuda.options[4:8]
    more = ["--archs", "cuda-13.0=9.0", "--ops", "utils,async_io", "--repository", repository]
    try:
        said = env("matrix", "cpu", "cuda-13.0", *bases, "--base", f"cpu={cuda.options[3]}", *wheels, *more)
        begun = max(said.index(f"{name}: building") for name in ("cpu", "cuda-13.0"))
        assert begun < min(said.index(f"{name}: built in") for name in ("cpu", "cuda-13.0")), said
        for name in ("cpu", "cuda-13.0"):
            assert re.search(rf"^{name} +ok +\d+ s +\d+ s +[\d,.]+ MB +{repository}:[\d.]+-{name}$", said, re.MULTILINE)
        assert cuda.client.images.get(f"{repository}:cuda-13.0").labels["org.deepspeedlite.archs"] == "9.0"
    finally:
        remove_tags(cuda.client, repository)


def test_the_rocm_image_has_code_for_every_gpu_asked_for_and_works_on_the_cpu(rocm):
    for name in ON_GPU:
        assert re.search(rf"^ +{name}.so +gfx90a$", rocm.said, re.MULTILINE)
        assert re.search(rf"^ok  op {name} ", rocm.said, re.MULTILINE)
    labels = rocm.client.images.get(rocm.tag).labels
    assert (labels["org.deepspeedlite.accelerator"], labels["org.deepspeedlite.archs"]) == ("rocm", "gfx90a")
