"""The table of ops, finding compilers and GPUs, what a wheel fits, and the cache of compiled ops."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version
from paths import ROOT
from programs import find, needs, program

import deepspeedlite.ops
from deepspeedlite.compat import op_builders
from deepspeedlite.env_report.packages import variables
from deepspeedlite.env_report.rows import BAD
from deepspeedlite.ops import op_builder
from deepspeedlite.ops.op_builder import (
    OPS,
    OpBuildError,
    Record,
    built,
    cache_entries,
    gpu,
    jit,
    misfit,
    prebuilt,
    wheel,
)
from deepspeedlite.ops.op_builder import toolchain as toolchains
from deepspeedlite.ops.op_builder.prebuilt import supports
from deepspeedlite.ops.op_builder.spec import OpSpec
from deepspeedlite.ops.op_builder.toolchain import Toolchain
from deepspeedlite.ops.op_builder.torch_build import TorchBuild, find_torch
from deepspeedlite.ops.op_builder.torch_build import _read as read_torch
from deepspeedlite.runtime.errors import ConfigError, OpError

VARIABLES = "CUDA_HOME CUDA_PATH ROCM_HOME ROCM_PATH TORCH_CUDA_ARCH_LIST PYTORCH_ROCM_ARCH DS_SKIP_CUDA_CHECK MAX_JOBS"
# DeepSpeed's names, from its documentation of DS_BUILD_*.
BUILDERS = {
    "CPUAdamBuilder": ("cpu_adam", "DS_BUILD_CPU_ADAM"),
    "CPUAdagradBuilder": ("cpu_adagrad", "DS_BUILD_CPU_ADAGRAD"),
    "CPULionBuilder": ("cpu_lion", "DS_BUILD_CPU_LION"),
    "FusedAdamBuilder": ("fused_adam", "DS_BUILD_FUSED_ADAM"),
    "FusedLambBuilder": ("fused_lamb", "DS_BUILD_FUSED_LAMB"),
    "FusedLionBuilder": ("fused_lion", "DS_BUILD_FUSED_LION"),
    "UtilsBuilder": ("utils", "DS_BUILD_UTILS"),
    "AsyncIOBuilder": ("async_io", "DS_BUILD_AIO"),
    "TransformerBuilder": ("transformer", "DS_BUILD_TRANSFORMER"),
    "StochasticTransformerBuilder": ("stochastic_transformer", "DS_BUILD_STOCHASTIC_TRANSFORMER"),
    "InferenceBuilder": ("transformer_inference", "DS_BUILD_TRANSFORMER_INFERENCE"),
    "QuantizerBuilder": ("quantizer", "DS_BUILD_QUANTIZER"),
    "SparseAttnBuilder": ("sparse_attn", "DS_BUILD_SPARSE_ATTN"),
}
HERE = list(OPS.values())


@pytest.fixture
def clean(monkeypatch):
    """No variables that say what to compile for, and no GPU."""
    for name in (*VARIABLES.split(), "DS_ACCELERATOR", "DS_ENABLE_NINJA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu, "_gpus_nvidia", tuple)
    monkeypatch.setattr(gpu, "_gpus_amd", tuple)
    return monkeypatch


@pytest.fixture
def cold(tmp_path, clean):
    """A cache in which nothing is compiled yet."""
    clean.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "deepspeedlite"


# --- the table ------------------------------------------------------------------------------------------------------


@needs("c++")
@pytest.mark.parametrize("builder", BUILDERS)
def test_builders_have_deepspeeds_names(builder):
    made = getattr(op_builders, builder)()
    name, flag = BUILDERS[builder]
    assert (made.name, made.NAME, made.BUILD_VAR) == (name, name, flag)
    assert made.absolute_name().endswith(f".{name}_op")
    assert all((ROOT / "csrc" / source).is_file() for source in made.sources())
    assert made.is_compatible()


def test_the_table_is_those_builders():
    assert set(op_builders.BUILDERS) == set(BUILDERS) == {spec.builder for spec in OPS.values()}
    with pytest.raises(AttributeError, match=r"NoSuchBuilder.*CPUAdamBuilder"):
        op_builders.NoSuchBuilder  # noqa: B018


@needs("c++")
def test_a_builder_loads_what_torch_has():
    import torch

    ops = op_builders.CPUAdamBuilder().load()
    assert ops.cpu_adam is torch.ops.deepspeedlite.cpu_adam is deepspeedlite.ops.load("cpu_adam")


def test_an_incompatible_op_says_why(clean):
    clean.setenv("CXX", "/no/such/compiler")
    assert not op_builders.CPUAdamBuilder().is_compatible()
    assert "CXX=/no/such/compiler is not a program" in str(op_builder.why_not(OPS["cpu_adam"]))
    with pytest.raises(OpError, match=r"there is no op nonsense; the ops are cpu_adam"):
        deepspeedlite.ops.load("nonsense")


# --- torch, CUDA and ROCm -------------------------------------------------------------------------------------------


def test_torch_is_read_from_its_files(tmp_path, clean):
    import torch

    assert find_torch() == TorchBuild(
        Path(torch.__file__).parent, torch.__version__, torch.version.cuda, torch.version.hip
    )
    lines = ["__version__ = '2.14.0+cu130'", "cuda: Optional[str] = '13.0'", "hip: Optional[str] = None"]
    (tmp_path / "version.py").write_text("\n".join(lines))
    found = read_torch(tmp_path)
    assert found == TorchBuild(tmp_path, "2.14.0+cu130", "13.0", None) and found.accelerator == "cuda"
    clean.setenv("DS_ACCELERATOR", "cpu")
    assert found.accelerator == "cpu"
    clean.setenv("DS_ACCELERATOR", "cuda")
    assert found._replace(cuda=None).accelerator == "cuda"
    assert found._replace(cuda=None, hip="6.4").accelerator == "rocm"


ISOLATED = """
import sys
sys.path = [p for p in sys.path if "site-packages" not in p]
sys.path.insert(0, ".")
from deepspeedlite.ops import op_builder
print(op_builder.find_torch().home)
"""


def test_torch_is_found_where_pip_hides_it():
    done = subprocess.run([sys.executable, "-c", ISOLATED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == find_torch().home


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0;9.0+PTX", ("8.0", "9.0+PTX")),
        ("8.0 8.6,9.0a", ("8.0", "8.6", "9.0a")),
        ("Ampere;8.0", ("8.0", "8.6+PTX")),
        ("Hopper", ("9.0+PTX",)),
    ],
)
def test_a_list_of_cuda_archs(text, expected, clean):
    clean.setenv("TORCH_CUDA_ARCH_LIST", text)
    assert gpu.cuda_archs((13, 0)) == expected


def test_without_a_list_the_gpus_or_what_the_toolkit_knows(tmp_path, clean):
    assert gpu.cuda_archs((13, 0)) == ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0+PTX")
    assert gpu.cuda_archs((12, 4)) == ("7.0", "7.5", "8.0", "8.6", "9.0+PTX")
    clean.setenv("TORCH_CUDA_ARCH_LIST", "native")
    with pytest.raises(OpBuildError, match="native, but nvidia-smi shows no GPU"):
        gpu.cuda_archs((13, 0))
    clean.undo()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf '9.0\\n8.0\\n[N/A]\\n9.0\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    clean.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    clean.setenv("TORCH_CUDA_ARCH_LIST", "native")
    gpu._gpus_nvidia.cache_clear()
    assert gpu.cuda_archs((13, 0)) == ("8.0", "9.0")
    gpu._gpus_nvidia.cache_clear()


@pytest.mark.parametrize("text", ["sm_80", "8", "80", "Amper", "8.0+ptx"])
def test_what_is_no_arch_is_named(text, clean):
    clean.setenv("TORCH_CUDA_ARCH_LIST", f"9.0;{text}")
    with pytest.raises(OpBuildError, match=rf"{text!r} is neither a capability such as".replace("+", r"\+")):
        gpu.cuda_archs((13, 0))


def test_archs_with_the_same_sources_share_the_way_to_ptx():
    assert gpu.gencode(["8.0", "9.0"]) == ["-gencode=arch=compute_80,code=[sm_80,sm_90]"]
    assert gpu.gencode(["12.0", "7.5", "8.6", "8.0+PTX", "8.0", "9.0a", "7.0"]) == [
        "-gencode=arch=compute_70,code=[sm_70,sm_75]",
        "-gencode=arch=compute_80,code=[sm_80,compute_80,sm_86,sm_120]",
        "-gencode=arch=compute_90a,code=[sm_90a]",
    ]


def test_ptx_is_asked_for_by_name():
    assert gpu.gencode(["8.0", "9.0+PTX"]) == [
        "-gencode=arch=compute_80,code=[sm_80]",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]


def test_sources_differ_between_gpus_where_the_flags_say():
    found = {
        number
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in {".h", ".cu"}
        for number in re.findall(r"__CUDA_ARCH__\s*\S+\s*(\w+)", path.read_text())
    }
    assert found == {"{}{}0".format(*gpu._SOURCES_DIFFER_AT)}


def fake_toolkit(home: Path, version: int) -> Path:
    for folder in ("bin", "include"):
        (home / folder).mkdir(parents=True)
    (home / "include" / "cuda.h").write_text(f"#define CUDA_VERSION {version}\n")
    (home / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (home / "bin" / "nvcc").chmod(0o755)
    return home


def test_cuda_of_another_major_is_refused_unless_told_otherwise(tmp_path, clean):
    clean.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda", 13000)))
    torch = TorchBuild(tmp_path, "2.10.0+cu128", "12.8", None)
    with pytest.raises(OpBuildError, match=r"CUDA 13\.0, but torch was built with CUDA 12\.8.*DS_SKIP_CUDA_CHECK=1"):
        gpu.find_gpu_compiler(torch)
    assert gpu.find_gpu_compiler(torch._replace(cuda="13.2")).version == "13.0"
    clean.setenv("DS_SKIP_CUDA_CHECK", "1")
    found = gpu.find_gpu_compiler(torch)
    assert (found.kind, found.version, found.define) == ("cuda", "13.0", "-DDSL_CUDA")
    clean.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(OpBuildError, match=r"CUDA_HOME=.* has no bin/nvcc; install"):
        gpu.find_gpu_compiler(torch)


def test_an_nvcc_that_pip_put_beside_torch_is_found(tmp_path, clean):
    home = fake_toolkit(tmp_path / "nvidia" / "cu13", 13000)
    clean.setenv("PATH", str(tmp_path))
    torch = TorchBuild(tmp_path / "torch", "2.14.0+cu130", "13.0", None)
    assert gpu.find_gpu_compiler(torch).home == home
    if not Path("/usr/local/cuda").exists():
        shutil.rmtree(home)
        with pytest.raises(OpBuildError, match=r"there is no nvcc on PATH.*pip install nvidia-cuda-nvcc nvidia-nvvm"):
            gpu.find_gpu_compiler(torch)


def test_an_nvcc_that_is_a_script_leads_to_its_toolkit(tmp_path, clean):
    real = program("nvcc")
    (tmp_path / "nvcc").write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    (tmp_path / "nvcc").chmod(0o755)
    clean.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    clean.setenv("DS_ACCELERATOR", "cuda")
    found = gpu.find_gpu_compiler(TorchBuild(tmp_path, "2.14.0+cpu", None, None))
    assert (found.home / "include" / "cuda_runtime.h").is_file() and found.home != tmp_path.parent


def test_rocm_is_found_with_what_it_knows(tmp_path, clean):
    home = tmp_path / "rocm"
    for folder in ("bin", "include/hip"):
        (home / folder).mkdir(parents=True)
    (home / "bin" / "hipcc").write_text("")
    header = "#define HIP_VERSION_MAJOR 6\n#define HIP_VERSION_MINOR 4\n"
    (home / "include" / "hip" / "hip_version.h").write_text(header)
    clean.setenv("ROCM_HOME", str(home))
    torch = TorchBuild(tmp_path, "2.14.0+rocm6.4", None, "6.4.1")
    found = gpu.find_gpu_compiler(torch)
    assert (found.kind, found.version, found.archs) == ("rocm", "6.4", ("gfx90a", "gfx942", "gfx1100"))
    clean.setenv("PYTORCH_ROCM_ARCH", "gfx90a:xnack-;gfx942")
    assert gpu.find_gpu_compiler(torch).archs == ("gfx90a:xnack-", "gfx942")
    command = gpu.find_gpu_compiler(torch).command(Path("a.cu"), Path("csrc"), ["c++"], Path("a.o"))
    assert "--offload-arch=gfx942" in command
    clean.setenv("PYTORCH_ROCM_ARCH", "sm_80")
    with pytest.raises(OpBuildError, match="'sm_80' is no arch such as gfx90a"):
        gpu.find_gpu_compiler(torch)


def test_amds_gpus_are_those_that_the_driver_lists(tmp_path):
    for node, number in enumerate((0, 90010, 90402, 110000)):
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "properties").write_text(f"simd_count 4\ngfx_target_version {number}\n")
    assert gpu._gpus_amd(tmp_path) == ("gfx1100", "gfx90a", "gfx942")


# --- what a wheel fits ----------------------------------------------------------------------------------------------

WHEEL = Record("cuda", "2.13.0+cpu", "13.0", None, ("8.0", "9.0"), "abc", {})


@pytest.mark.parametrize(
    ("archs", "device", "expected"),
    [
        (("8.0", "9.0"), "8.0", True),
        (("8.0", "9.0"), "8.9", True),  # a later minor of the same major
        (("8.6",), "8.0", False),
        (("8.0", "9.0"), "12.0", False),
        (("8.0", "9.0+PTX"), "12.0", True),
        (("9.0+PTX",), "8.0", False),
        (("9.0a",), "9.0", True),
        (("10.0a",), "10.3", False),
        (("10.0f",), "10.3", True),
        (("10.0a+PTX",), "12.0", False),
        (("gfx90a",), "gfx90a:sramecc+:xnack-", True),
        (("gfx90a",), "gfx942", False),
    ],
)
def test_which_gpus_code_runs_on(archs, device, expected):
    assert supports(archs, device) is expected


def test_another_gpu_is_told_the_archs_and_how_to_rebuild():
    reason = misfit(WHEEL, "13.0", "12.0")
    assert "this GPU is 12.0" in reason and "8.0, 9.0 alone" in reason
    assert 'make wheel ACCEL=cuda ARCHS="8.0;9.0;12.0"' in reason
    assert misfit(WHEEL, "13.1", "9.0") is misfit(WHEEL, None, None) is None


def test_another_cuda_is_told_both_versions(clean):
    reason = misfit(WHEEL, "12.8", "9.0")
    assert all(text in reason for text in ("CUDA 13.0", "CUDA 12.8", "DS_SKIP_CUDA_CHECK=1", "make wheel ACCEL=cuda"))
    clean.setenv("DS_SKIP_CUDA_CHECK", "1")
    assert misfit(WHEEL, "12.8", "9.0") is None


def test_a_wheels_library_is_used_for_its_sources_and_accelerator(tmp_path, clean):
    spec = OPS["fused_adam"]
    clean.setattr(prebuilt, "lib", lambda: tmp_path)
    shutil.copy("/bin/true", tmp_path / "fused_adam.so")  # whole, which is looked at
    assert prebuilt.prebuilt(spec, "cpu") is None, "there is no record"
    ops = {spec.name: prebuilt.sources_hash(spec)}
    prebuilt.write_record(WHEEL._replace(ops=ops), tmp_path)
    assert prebuilt.read_record() == WHEEL._replace(ops=ops)
    assert prebuilt.prebuilt(spec, "cpu") == prebuilt.prebuilt(spec, "cuda") == tmp_path / "fused_adam.so"
    assert prebuilt.prebuilt(spec, "rocm") is None
    assert prebuilt.installed_libraries() == {"fused_adam": tmp_path / "fused_adam.so"}
    assert built(spec) == tmp_path / "fused_adam.so", "the wheel's goes before compiling"
    prebuilt.write_record(WHEEL._replace(ops={spec.name: "of other sources"}), tmp_path)
    assert prebuilt.prebuilt(spec, "cpu") is None
    (tmp_path / "record.json").write_text(json.dumps({"of": "another version"}))
    assert prebuilt.read_record() is None


# --- compiling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["many", "0", "-2", "1.5"])
def test_max_jobs_is_a_number(value, clean):
    clean.setenv("MAX_JOBS", value)
    with pytest.raises(OpBuildError, match=f"MAX_JOBS={value} is no number of compilers; set it"):
        toolchains.max_jobs()


@needs("c++")
def test_the_cache_tells_what_is_stale_and_what_is_locked(cold):
    cold.mkdir(parents=True)
    current = cold / f"cpu_adam-{jit._key(OPS['cpu_adam'], Toolchain.find(OPS['cpu_adam']))}.so"
    for file in (current, cold / "cpu_adam-0123.so"):
        file.write_bytes(b"12345")
    for name in ("utils-1.abc.tmp", "utils-2.abc.tmp"):
        (cold / name).mkdir()
        (cold / name / "a.o").write_bytes(b"123")
        (cold / f"{name.split('.')[0]}.lock").touch()
    with (cold / "utils-2.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = {entry.library.name: entry for entry in cache_entries()}
    assert {name: (entry.stale, entry.locked) for name, entry in found.items()} == {
        current.name: (False, False),
        "cpu_adam-0123.so": (True, False),
        "utils-1.abc.tmp": (True, False),
        "utils-2.abc.tmp": (False, True),
    }
    assert found[current.name].size_bytes == 5 and 0 <= found[current.name].age_s < 600


@needs("c++")
def test_each_environment_has_its_own_library(tmp_path, clean):
    spec = OPS["fused_adam"]
    found = Toolchain.find(spec)
    clean.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda", 13000)))
    keys = {jit._key(spec, found), jit._key(spec, Toolchain(found.compiler, found.torch._replace(version="2.12.0")))}
    clean.setenv("DS_ACCELERATOR", "cuda")
    for archs in ("8.0", "9.0"):
        clean.setenv("TORCH_CUDA_ARCH_LIST", archs)
        keys.add(jit._key(spec, Toolchain.find(spec)))
    assert len(keys) == 4


COMPILE = """
from deepspeedlite.ops.op_builder import OPS, built, load_ops
load_ops(OPS["fused_lion"])
print(built(OPS["fused_lion"]))
"""


@pytest.mark.slow
def test_the_gpus_kernels_are_compiled_when_first_needed(cold, cuobjdump):
    """As with a CUDA torch; the result also loads into a CPU torch."""
    clean_environment = {**os.environ, "DS_ACCELERATOR": "cuda", "TORCH_CUDA_ARCH_LIST": "8.0;9.0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=clean_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cuobjdump(Path(done.stdout.strip().splitlines()[-1])) == {"sm_80", "sm_90"}


@pytest.mark.slow
def test_ninja_compiles_too_and_shows_the_first_error(cold, tmp_path, clean):
    program("ninja")
    clean.setenv("DS_ENABLE_NINJA", "1")
    assert built(OPS["cpu_adam"]).exists()
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    (sources / "cpu_optim" / "adam_kernel.cpp").write_text("int broken = nonsense;\n")
    clean.setattr(jit, "csrc", lambda: sources)
    with pytest.raises(OpBuildError, match="nonsense"):
        built(OPS["cpu_adam"])


@pytest.mark.slow
def test_a_newer_clang_compiles_every_kernel_for_newer_gpus_of_amds(tmp_path):
    """To assembly: the HIP that Debian has knows no gfx942 to link for. (gfx90a, and nvcc: see test_wheel.py.)"""
    clang = program("clang++-19")
    if not Path("/usr/include/hip/hip_runtime.h").exists():
        pytest.skip("needs HIP's headers (Debian's package libamdhip64-dev)")
    flags = ["-std=c++17", "-O3", "-Werror", "-x", "hip", "--rocm-path=/usr", "-nogpulib", "--cuda-device-only", "-S"]
    for source in sorted({source for spec in HERE for source in spec.gpu}):
        target = tmp_path / "kernel.s"
        command = [clang, *flags, "--offload-arch=gfx942", f"-I{ROOT / 'csrc'}", str(ROOT / "csrc" / source)]
        done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        text = target.read_text()
        assert "amdgcn-amd-amdhsa--gfx942" in text and ".wavefront_size: 64" in text
        if source == "gpu_optim/adam.cu":
            assert "global_load_dwordx4" in text, "16 bytes at a time"


# --- compilers as people name them ------------------------------------------------------------------------------------


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another file system
        shutil.copy2(source, target)


@pytest.fixture
def conda(tmp_path, clean) -> Path:
    """This machine's CUDA in conda's layout: bin in the prefix, headers and libraries below targets/ alone."""
    real = Path(gpu._home_by_asking(program("nvcc")) or "")
    prefix = tmp_path / "conda"
    for name in ("nvvm", "bin"):  # not links: nvcc looks for its parts beside where it really is
        shutil.copytree(real / name, prefix / name, copy_function=_link_or_copy)
    target = prefix / "targets" / f"{os.uname().machine}-linux"
    target.mkdir(parents=True)
    for name in ("include", "lib"):
        (target / name).symlink_to(real / name)
    clean.setenv("DS_ACCELERATOR", "cuda")
    return prefix


CUDA_TORCH = TorchBuild(Path("/somewhere/torch"), "2.14.0+cpu", None, None)


@pytest.mark.slow
def test_condas_layout_compiles_and_links(conda, tmp_path, clean):
    clean.setenv("PATH", f"{conda / 'bin'}:{os.environ['PATH']}")
    clean.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    found = gpu.find_gpu_compiler(CUDA_TORCH)
    assert found.home == conda and found.program == conda / "bin" / "nvcc"
    source, output = tmp_path / "a.cu", tmp_path / "a.o"
    code = "#include <cuda_runtime.h>\n__global__ void k(int* x) { *x = 1; }\n"
    source.write_text(f'{code}extern "C" int f() {{ k<<<1, 1>>>(nullptr); return cudaGetLastError(); }}\n')
    subprocess.run(found.command(source, tmp_path, ["c++"], output), check=True)
    library = ["c++", "-shared", str(output), *found.link_flags(), "-o", str(tmp_path / "a.so")]
    subprocess.run([*library, "-Wl,--no-undefined"], check=True)


@pytest.mark.parametrize(
    "form", ["{}", "{}/", "{}/bin", "{}/bin/nvcc", "{}/targets/{machine}-linux", ":{}", "{}:", "/no/such:{}", " {} "]
)
def test_cuda_home_in_each_of_its_usual_forms(form, conda, clean):
    clean.setenv("CUDA_HOME", form.format(conda, machine=os.uname().machine))
    assert gpu.find_gpu_compiler(CUDA_TORCH).home == conda
    clean.setenv("CUDA_HOME", str(conda / "lib"))
    with pytest.raises(OpBuildError, match=r"CUDA_HOME=.*lib has no bin/nvcc; install the CUDA toolkit"):
        gpu.find_gpu_compiler(CUDA_TORCH)


@needs("g++")
@pytest.mark.parametrize("cxx", ["ccache g++", "g++ -m64", "env LC_ALL=C g++ -DMINE='a b'", "{folder}/a compiler"])
def test_cxx_with_arguments_compiles(cxx, cold, tmp_path, clean):
    called = tmp_path / "called"
    for name, run in (("ccache", 'exec "$@"'), ("a compiler", 'exec g++ "$@"')):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$@" >> {called}\n{run}\n')
        (tmp_path / name).chmod(0o755)
    clean.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    clean.setenv("CXX", cxx.format(folder=tmp_path))
    (tmp_path / "small.cpp").write_text('extern "C" int small() { return 1; }\n')
    for module in (jit, prebuilt):
        clean.setattr(module, "csrc", lambda: tmp_path)
    spec = OpSpec("small", "SmallBuilder", "DS_BUILD_SMALL", plain=("small.cpp",))
    assert built(spec).parent == cold
    assert called.exists() is ("ccache" in cxx or "a compiler" in cxx)
    host = Toolchain.find(spec)
    assert find("g++") == str(host.compiler) or host.compiler.name == "a compiler"
    plain = Toolchain(host.compiler, host.torch, options=host.options)
    assert jit._key(spec, host) == jit._key(spec, plain), "what calls a compiler changes nothing"
    assert (jit._key(spec, host) != jit._key(spec, Toolchain(host.compiler, host.torch))) is bool(host.options)


@needs("g++")
def test_links_to_ccache_are_the_compilers_that_it_calls(tmp_path, clean):
    """As in /usr/lib/ccache, which people put first on PATH."""
    real = Toolchain.find(OPS["cpu_adam"])
    (tmp_path / "ccache").touch(mode=0o755)
    for name in ("g++", "other++"):
        (tmp_path / name).symlink_to("ccache")
    clean.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    linked = Toolchain(tmp_path / "g++", real.torch)
    assert linked.identity() == Toolchain(Path("/usr/bin/g++"), real.torch).identity()
    assert linked.identity() != Toolchain(tmp_path / "other++", real.torch).identity()


@pytest.mark.parametrize(
    ("cxx", "reason"),
    [
        pytest.param(
            "ccache g++",
            "CXX=ccache g\\+\\+: ccache is not a program; install it or correct CXX",
            marks=needs("g++"),
        ),
        ("no-such -m64", "CXX=no-such -m64 is not a program; install a C\\+\\+17 compiler"),
        ("g++ 'x", "CXX=g\\+\\+ 'x is not a program"),
        pytest.param(
            "g++ -std=c++98 -nonsense",
            "does not compile what ops are made of: .*-nonsense.*; install a newer",
            marks=needs("g++"),
        ),
    ],
)
def test_a_cxx_that_cannot_be_used_says_why(cxx, reason, cold, clean, tmp_path):
    if cxx.startswith("ccache"):
        (tmp_path / "g++").symlink_to(find("g++"))
        clean.setenv("PATH", str(tmp_path))
    clean.setenv("CXX", cxx)
    with pytest.raises(OpBuildError, match=reason):
        built(OPS["cpu_adam"])
    assert re.search(reason, str(op_builder.why_not(OPS["cpu_adam"])))


@pytest.mark.parametrize(
    ("archs", "reason"),
    [
        (
            "5.2;9.0",
            r"does not know 5\.2; it compiles for \d+\.\d to \d+\.\d; leave out 5\.2, or set CUDA_HOME to an old",
        ),
        ("99.0", r"does not know 99\.0; .*; name \d+\.\d\+PTX in TORCH_CUDA_ARCH_LIST, or set CUDA_HOME to a newer"),
    ],
)
def test_an_arch_that_this_nvcc_does_not_know_is_said_at_once(archs, reason, cold, clean):
    program("nvcc")
    clean.setenv("DS_ACCELERATOR", "cuda")
    clean.setenv("TORCH_CUDA_ARCH_LIST", archs)
    known = gpu._known_archs(gpu.find_gpu_compiler(CUDA_TORCH).program)
    if archs.startswith("5") and (5, 2) in known:
        pytest.skip("this nvcc knows 5.2")
    with pytest.raises(OpBuildError, match=rf"TORCH_CUDA_ARCH_LIST={archs}: nvcc \d+\.\d {reason}"):
        built(OPS["fused_adam"])
    assert not list(cold.glob("*.tmp")) and op_builder.why_not(OPS["cpu_adam"]) is None


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("", "0.1.0"),
        ("+mine", "0.1.0+mine"),
        ("+cu130.torch2.10", "0.1.0+cu130.torch2.10"),
        (".dev20260101", "0.1.0.dev20260101"),
        (".post1+x", "0.1.0.post1+x"),
        ("rc1", "0.1.0rc1"),
    ],
)
def test_what_may_follow_the_version(text, whole):
    assert wheel.version("0.1.0", {"DS_BUILD_STRING": text}) == whole
    assert str(Version(whole)), "which packaging takes"


@pytest.mark.parametrize("text", ["1", "mine", "+", "+a b", "+a_", "-x", ".", "+a..b", "+ü", ".dev", "+a/b"])
def test_what_may_not_follow_it_is_refused(text):
    with pytest.raises(OpBuildError, match=r"DS_BUILD_STRING=.* is no version; write \+ and letters"):
        wheel.version("0.1.0", {"DS_BUILD_STRING": text})


def test_words_that_variables_do_not_take_are_refused_by_name(clean):
    code = "import deepspeedlite.runtime.log"
    for level, fails in (("loud", True), ("DEBUG", False), ("", False)):
        env = {**os.environ, "DSL_LOG_LEVEL": level}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
        assert ("ConfigError: DSL_LOG_LEVEL=loud is no level; use debug, info" in done.stderr) is fails
    for command in ("launcher", "env_report"):
        env = {**os.environ, "DSL_LOG_LEVEL": "loud"}
        arguments = ["x.py"] if command == "launcher" else ["--only", "mpi"]
        done = subprocess.run(
            [sys.executable, "-m", f"deepspeedlite.{command}", *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=env,
        )
        assert done.returncode == 2 and "DSL_LOG_LEVEL=loud is no level" in done.stderr
        assert "Traceback" not in done.stderr
    clean.setenv("DEEPSPEEDLITE_ISA", "foo")
    (row,) = [row for row in variables() if row.name == "DEEPSPEEDLITE_ISA"]
    assert row.status == BAD and "DEEPSPEEDLITE_ISA=foo is none of baseline, avx2, avx512" in row.remedy
    deepspeedlite.ops.load.cache_clear()  # what an earlier test has loaded is not looked at again
    for ask in (deepspeedlite.ops.load, deepspeedlite.ops.is_available):
        with pytest.raises(ConfigError, match="DEEPSPEEDLITE_ISA=foo is none of baseline, avx2, avx512; use one"):
            ask.__wrapped__("cpu_adam")
