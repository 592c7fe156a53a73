"""The file API as DeepSpeed's users write it, under its name: handles, descriptors, any tensor, file writers."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import resource
import subprocess
import sys
import time
from functools import cache

import pytest
import torch
from paths import ROOT
from programs import needs

from deepspeedlite.compat.file_writers import FastFileWriter, FastFileWriterConfig, MockFileWriter, PyFileWriter
from deepspeedlite.compat.op_builders import AsyncIOBuilder, PinMemoryBuilder
from deepspeedlite.launcher.stand_in import with_stand_in
from deepspeedlite.runtime.errors import OpError

pytestmark = needs("c++")
BYTES = torch.empty(0, dtype=torch.uint8)


@pytest.fixture
def module():
    return AsyncIOBuilder().load()


# What DeepSpeed 0.19.8's class has, by its help(): arguments with their defaults.
THEIRS = {
    "__init__": "block_size=1048576 queue_depth=128 single_submit=False overlap_events=False intra_op_parallelism=1",
    "read": "buffer filename validate file_offset=0",
    "write": "buffer filename validate file_offset=0",
    "pread": "buffer filename validate async file_offset=0",
    "pwrite": "buffer filename validate async file_offset=0",
    "sync_pread": "buffer filename file_offset=0",
    "sync_pwrite": "buffer filename file_offset=0",
    "async_pread": "buffer filename file_offset=0",
    "async_pwrite": "buffer filename file_offset=0",
    "wait": "",
    "new_cpu_locked_tensor": "num_elem example_tensor",
    "free_cpu_locked_tensor": "tensor",
    "is_pinned": "buffer",
}


@pytest.mark.parametrize("method", THEIRS)
def test_arguments_are_deepspeeds(module, method):
    parameters = list(inspect.signature(getattr(module.aio_handle, method)).parameters.values())[1:]
    ours = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters if p.name != "engine"]
    assert [name.replace("async_op", "async") for name in ours] == THEIRS[method].split()


def test_what_methods_return(module, tmp_path):
    """As DeepSpeed 0.19.8's do, called in this order."""
    handle, file = module.aio_handle(1 << 20, 16, False, True, 2), str(tmp_path / "file")
    values, found = torch.arange(1 << 16, dtype=torch.float32), torch.zeros(1 << 16)
    assert (handle.get_block_size(), handle.get_queue_depth(), handle.get_intra_op_parallelism()) == (1 << 20, 16, 2)
    assert (handle.get_single_submit(), handle.get_overlap_events(), handle.get_alignment()) == (False, True, 8192)
    assert (handle.sync_pwrite(values, file), handle.async_pwrite(values, file), handle.wait()) == (1, 0, 1)
    assert (handle.pwrite(values, file, True, False), handle.pwrite(values, file, True, True)) == (1, 0)
    assert (handle.wait(), handle.write(values, file, True)) == (1, 0)
    assert (handle.sync_pread(found, file), handle.async_pread(found, file), handle.wait()) == (1, 0, 1)
    assert (handle.pread(found, file, True, False), handle.read(found, file, True)) == (1, 0)
    assert torch.equal(found, values)
    assert handle.async_pread(found[:512], file, 1024) == handle.async_pread(found[1024:], file, file_offset=4096) == 0
    assert handle.wait() == 2
    assert torch.equal(found[:512], values[256:768]) and torch.equal(found[1024:], values[1024:])


def test_one_call_reads_or_writes_without_a_handle(module, tmp_path):
    values, found = torch.arange(100_000), torch.empty(100_000, dtype=torch.int64)
    assert module.aio_write(values, str(tmp_path / "file"), 1 << 16, 8, False, True, True) == 0
    assert module.aio_read(found, str(tmp_path / "file"), 1 << 16, 8, True, False, True) == 0
    assert torch.equal(found, values) and module.deepspeed_memcpy(found, values + 1) == 0
    assert torch.equal(found, values + 1)


def test_buffers_of_any_layout(module, tmp_path):
    handle, file = module.aio_handle(), str(tmp_path / "file")
    values = torch.arange(20_000.0).view(100, 200)
    assert handle.sync_pwrite(values.t(), file) == 1
    assert torch.equal(torch.from_file(file, size=20_000).view(200, 100), values.t())
    found = torch.zeros(100, 400)[:, ::2]
    assert handle.async_pread(found, file) == 0 and handle.wait() == 1
    assert torch.equal(found, values.t().reshape(100, 200))
    weight = torch.nn.Parameter(torch.zeros(20_000))
    assert handle.read(weight, file, True) == 0 and torch.equal(weight.data, values.t().reshape(-1))


@pytest.mark.gpu
def test_buffers_on_a_gpu(module, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    handle, file = module.aio_handle(intra_op_parallelism=4), str(tmp_path / "file")
    values = torch.arange(3_000_001, dtype=torch.int32, device="cuda")
    handle.async_pwrite(values, file)
    values += 1  # what is written was copied before
    assert handle.wait() == 1
    found = torch.zeros_like(values)
    assert handle.sync_pread(found, file) == 1 and torch.equal(found, values - 1)
    memory = torch.empty(values.numel(), dtype=torch.int32).pin_memory()
    assert handle.is_pinned(memory) and handle.sync_pread(memory, file) == 1 and torch.equal(memory, found.cpu())


def test_a_descriptor_of_an_open_file_will_do(module, tmp_path):
    handle = module.aio_handle()
    with open(tmp_path / "file", "wb") as file:
        os.rename(tmp_path / "file", tmp_path / "renamed")
        handle.async_pwrite(torch.full((10_000,), 7, dtype=torch.uint8), file.fileno(), 5)
        assert handle.wait() == 1
    assert (tmp_path / "renamed").read_bytes() == bytes(5) + b"\7" * 10_000 and not (tmp_path / "file").exists()


@pytest.mark.parametrize("method", ["pread", "pwrite"])
def test_an_asynchronous_request_is_validated_when_it_has_ended(module, tmp_path, method):
    handle, file = module.aio_handle(), tmp_path / "file"
    memory = torch.full((10_000,), 7, dtype=torch.uint8)
    assert handle.pwrite(memory, str(file), True, True) == 0
    handle.wait()
    before = handle.get_counts()["blocks"]
    assert getattr(handle, method)(memory, str(file), True, True) == 0
    latest_s = time.monotonic() + 60
    while handle.get_counts()["blocks"] < 2 * before:
        assert time.monotonic() < latest_s
        time.sleep(0.01)
    time.sleep(0.1)  # the last one has begun
    file.write_bytes(b"x" * 10_000)
    with pytest.raises(OpError, match=r"/file from byte 0 on is not what the buffer holds"):
        handle.wait()


def test_locked_memory_without_files():
    pin = PinMemoryBuilder().load().pin_handle()
    memory = pin.new_cpu_locked_tensor(1 << 20, BYTES)
    assert memory.data_ptr() % 4096 == 0 and memory.shape == (1 << 20,)
    assert pin.is_pinned(memory) and pin.free_cpu_locked_tensor(memory) and not pin.is_pinned(memory)
    assert not pin.free_cpu_locked_tensor(memory)


# --- file writers -----------------------------------------------------------------------------------------------------


@cache
def state() -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    tensors = {str(i): torch.randn(size, generator=generator) for i, size in enumerate((0, 1, 1000, 300_000, 7))}
    return {"model": tensors, "half": tensors["3"].bfloat16(), "step": 3, "view": tensors["3"][5:10]}


def saved(**options: bool) -> bytes:
    memory = io.BytesIO()
    torch.save(state(), memory, **options)
    return memory.getvalue()


def fast(module, path, memory_bytes=1 << 16, **settings) -> FastFileWriter:
    handle = module.aio_handle(block_size=4096, queue_depth=4)
    return FastFileWriter(
        path, FastFileWriterConfig(handle, handle.new_cpu_locked_tensor(memory_bytes, BYTES), **settings)
    )


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("double_buffer, memory_bytes", [(True, 8192), (False, 4096), (True, 1 << 20), (True, 4 << 20)])
def test_a_fast_writer_writes_what_torch_saves(module, tmp_path, zipped, double_buffer, memory_bytes):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 5_000_000)  # longer than what comes
    writer = fast(module, path, memory_bytes, double_buffer=double_buffer)
    torch.save(state(), writer, _use_new_zipfile_serialization=zipped)
    writer.close()
    writer.close()
    assert path.read_bytes() == saved(_use_new_zipfile_serialization=zipped)
    assert writer._stats["close"] == 2 and writer._stats["write"] > 0 and writer._stats["aio_write_secs"] > 0
    assert torch.load(path)["step"] == 3
    assert writer._stats["bytes"] == path.stat().st_size == writer._stats["aio_bytes"] and writer.file_path() == str(
        path
    )


def test_the_other_writers(tmp_path):
    with PyFileWriter(tmp_path / "plain") as plain, MockFileWriter(tmp_path / "mock") as mock:
        for writer in (plain, mock):
            torch.save(state(), writer)
            writer.flush()
            assert writer.fileno() == -1 and writer._stats["bytes"] == len(saved())
    assert (tmp_path / "plain").read_bytes() == saved() and (tmp_path / "mock").stat().st_size == 0
    with PyFileWriter(tmp_path / "plain") as plain:
        plain.write(b"at once")
        plain.flush()
        assert (tmp_path / "plain").read_bytes() == b"at once"


def test_what_is_closed_is_on_the_disk(module, tmp_path, monkeypatch):
    """The file with all that was written, and then the folder that has its name."""
    synced: list[tuple[str, int]] = []
    plain = os.fsync

    def fsync(fd: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_size))
        plain(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    for writer in (fast(module, tmp_path / "fast"), PyFileWriter(tmp_path / "plain")):
        assert writer.write(b"x" * 1_000) == 1_000 and synced == []  # fewer than Python collects
        writer.close()
        assert [synced[0], synced.pop(1)[0]] == [(writer.file_path(), 1_000), str(tmp_path)]
        synced.clear()


@pytest.mark.parametrize("save_size", [True, False])
@pytest.mark.parametrize("writers", [1, 2, 3])
def test_parallel_writers_share_storages(module, tmp_path, writers, save_size):
    tensors = [torch.arange(1000), torch.randn(77_777), torch.empty(0), torch.ones(3, dtype=torch.bfloat16)]
    storages = [(tensor.untyped_storage(), tensor.dtype) for tensor in tensors]
    expected = b""
    for tensor in tensors:
        expected += tensor.numel().to_bytes(8, sys.byteorder) if save_size else b""
        expected += bytes(tensor.view(torch.uint8).numpy())
    found, counted = b"", []
    for rank in range(writers):
        with fast(module, tmp_path / str(rank), num_parallel_writers=writers, writer_rank=rank) as writer:
            counted.append(writer.save_torch_storage_object_list(storages, save_size))
        found += (tmp_path / str(rank)).read_bytes()
    assert found == expected and sum(counted) == len(expected) and max(counted) - min(counted) <= 1
    with MockFileWriter(tmp_path / "mock") as mock:
        assert mock.save_torch_storage_object_list(storages, save_size) == len(expected) == mock._stats["bytes"]
        assert (mock._stats["save_storage"], mock._stats["save_storage_bytes"]) == (len(storages), len(expected))


def test_memory_that_no_writer_can_use_is_refused(module, tmp_path):
    with pytest.raises(OpError, match=r"must have a multiple of 8192 bytes, got 12288"):
        fast(module, tmp_path / "file", 12288)
    with pytest.raises(OpError, match=r"writer_rank 2 is none of 2 parallel writers"):
        fast(module, tmp_path / "file", num_parallel_writers=2, writer_rank=2)


@contextlib.contextmanager
def small_files(most_bytes: int):
    """No file may grow larger, as on a disk that is full; the signal is ignored, as Python does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("memory_bytes", [1 << 16, 1 << 23])
def test_a_full_disk_is_an_error(module, tmp_path, memory_bytes):
    """Found by a later write, or by close at the latest."""
    writer = fast(module, tmp_path / "file", memory_bytes)
    plain = PyFileWriter(tmp_path / "plain")
    with small_files(100_000):
        with pytest.raises(OpError, match=r"/file is incomplete: .* at byte 100000 failed: File too large"), writer:
            torch.save(state(), writer)
        with pytest.raises(OSError, match="File too large"), plain:
            plain.write(bytes(200_000))
    with pytest.raises(ValueError, match="/file is closed"):
        writer.write(b"more")
    writer = fast(module, tmp_path / "file", 1 << 16)
    with small_files(100_000), pytest.raises(OpError, match="is incomplete"):
        writer.write(bytes(400_000))
    for _ in range(2):  # there is room again, and what was lost is still lost
        with pytest.raises(OpError, match="is incomplete"):
            writer.write(b"more")
    with pytest.raises(OpError, match="is incomplete"):
        writer.close()


def test_a_writer_that_is_dropped_finishes_its_file_or_says_that_it_could_not(module, tmp_path, caplog):
    writer = fast(module, tmp_path / "good")
    writer.write(b"x" * 100_000)
    del writer
    assert (tmp_path / "good").stat().st_size == 100_000 and not caplog.records
    writer = fast(module, tmp_path / "bad", 1 << 20)
    writer.write(b"x" * 200_000)
    with small_files(100_000):
        del writer
    assert "bad was dropped before it was closed, and is incomplete" in caplog.text


# --- scripts under the name deepspeed ---------------------------------------------------------------------------------

# What the tutorial "DeepNVMe" and its examples do, written anew.
SCRIPT = """
import os, sys, tempfile, torch
from deepspeed.ops.op_builder import AsyncIOBuilder, PinMemoryBuilder
from deepspeed.io import FastFileWriter, FastFileWriterConfig
from deepspeed.io.py_file_writer import PyFileWriter
import deepspeed.ops.aio
assert deepspeed.ops.aio.AsyncIOBuilder is AsyncIOBuilder and AsyncIOBuilder.NAME == "async_io"
assert AsyncIOBuilder().is_compatible()
file = os.path.join(tempfile.mkdtemp(dir=sys.argv[1]), "test.pt")
t = torch.arange(1 << 20, dtype=torch.uint8)
h = AsyncIOBuilder().load().aio_handle()
h.sync_pwrite(t, file)
assert os.path.getsize(file) == 1 << 20
h = AsyncIOBuilder().load().aio_handle(intra_op_parallelism=4)
h.async_pwrite(t, file)
assert h.wait() == 1
h = AsyncIOBuilder().load().aio_handle(1024**2, 128, True, True, 2)
bounce_buffer = h.new_cpu_locked_tensor(1 << 20, t)
h.sync_pread(bounce_buffer, file)
assert torch.equal(bounce_buffer, t)
h.free_cpu_locked_tensor(bounce_buffer)
memory = PinMemoryBuilder().load().pin_handle().new_cpu_locked_tensor(1 << 16, torch.empty(0, dtype=torch.uint8))
writer = FastFileWriter(file_path=file, config=FastFileWriterConfig(dnvme_handle=h, pinned_tensor=memory))
torch.save(f=writer, obj={"t": t})
writer.close()
assert torch.equal(torch.load(file)["t"], t)
"""


@pytest.mark.slow
def test_scripts_run_under_the_name_deepspeed(tmp_path):
    environ = with_stand_in({**os.environ, "PYTHONPATH": str(ROOT)})
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
