"""An accelerator for tests: torch's device "threads", whose streams run late, in an order that a seed decides.

`use()` compiles it into the folder THREADS_DEVICE_DIR, where it is not there yet, and registers the device and its
process group.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent
SOURCES = ("device.cpp", "group.cpp")


def use() -> ModuleType:
    """The extension, with the device registered: torch.threads, torch.device("threads")."""
    native = _load(Path(os.environ["THREADS_DEVICE_DIR"]))
    torch.utils.rename_privateuse1_backend("threads")
    module = _device_module(native)
    torch._register_device_module("threads", module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)

    def make(store: Any, rank: int, size: int, timeout: Any) -> Any:
        gloo = dist.ProcessGroupGloo(dist.PrefixStore("threads", store), rank, size, timeout)
        return native.make_group(gloo, rank, size)

    dist.Backend.register_backend("threads", make, devices=["threads"])
    return native


def _load(folder: Path) -> Any:
    """Compile what is not in the folder yet, and import it."""
    library = folder / "dsl_threads.so"
    if not library.exists():
        libraries = Path(torch.__file__).parent / "lib"
        includes = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
        flags = ["-O0", "-fPIC", "-std=c++20", "-DTORCH_EXTENSION_NAME=dsl_threads", *includes]
        objects = [folder / f"{name}.o" for name in SOURCES]
        compilers = [
            subprocess.Popen([os.environ.get("CXX", "c++"), *flags, "-c", str(HERE / name), "-o", str(made)])
            for name, made in zip(SOURCES, objects)
        ]
        assert [compiler.wait() for compiler in compilers] == [0] * len(SOURCES), "the device does not compile"
        needed = [f"-L{libraries}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", f"-Wl,-rpath,{libraries}"]
        subprocess.run(["c++", "-shared", "-o", str(library), *map(str, objects), *needed], check=True)
    spec = importlib.util.spec_from_file_location("dsl_threads", library)
    assert spec is not None and spec.loader is not None, library
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _device_module(native: Any) -> ModuleType:
    module = ModuleType("torch.threads")

    def index_of(device: Any) -> int:
        if device is None:
            return native.current_device()
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return native.current_device() if index is None else index

    class Stream(torch.Stream):
        def __new__(cls, device: Any = None, priority: int = 0, **given: Any) -> Any:
            if given:
                return super().__new__(cls, **given)
            return super().__new__(cls, torch.device("threads", index_of(device)), priority=priority)

    class Event(torch.Event):
        def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Any:
            return super().__new__(cls, "threads", enable_timing=enable_timing)

    def current_stream(device: Any = None) -> torch.Stream:
        return torch.accelerator.current_stream(torch.device("threads", index_of(device)))

    def memory_stats(device: Any = None) -> dict[str, int]:
        live, peak, reserved = native.memory()
        return {
            "allocated_bytes.all.current": live,
            "allocated_bytes.all.peak": peak,
            "reserved_bytes.all.current": reserved,
            "reserved_bytes.all.peak": reserved,
        }

    def manual_seed(seed: int) -> None:
        native.default_generator(native.current_device()).manual_seed(seed)

    def manual_seed_all(seed: int) -> None:
        for device in range(native.device_count()):
            native.default_generator(device).manual_seed(seed)

    members = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": native.device_count,
        "current_device": native.current_device,
        "set_device": lambda device: native.set_device(index_of(device)),
        "synchronize": lambda device=None: native.synchronize(index_of(device)),
        "current_stream": current_stream,
        "set_stream": torch.accelerator.set_stream,
        "stream": lambda stream: stream,
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed_all,
        "get_rng_state": lambda device=None: native.default_generator(index_of(device)).get_state(),
        "set_rng_state": lambda state, device=None: native.default_generator(index_of(device)).set_state(state),
        "get_device_name": lambda device=None: "threads of the host",
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "memory_stats": memory_stats,
        "mem_get_info": lambda device=None: (1 << 30, 1 << 30),
        "memory_allocated": lambda device=None: native.memory()[0],
        "max_memory_allocated": lambda device=None: native.memory()[1],
        "reset_peak_memory_stats": lambda device=None: native.reset_peak(),
        "empty_cache": lambda: None,
        "Stream": Stream,
        "Event": Event,
        "native": native,
    }
    for name, member in members.items():
        setattr(module, name, member)
    sys.modules["torch.threads"] = module
    return module
