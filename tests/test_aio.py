"""async_io against plain files: every size around a page, requests at random, and what goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepspeedlite.errors import OpError
from deepspeedlite.ops.aio import ALIGNMENT, aio_handle

SIZES = (0, 1, 511, 4095, 4096, 4097, 8192, 65_536, 65_537, 1_000_003)


def content(nbytes: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def aligned(handle: aio_handle, nbytes: int) -> Tensor:
    return handle.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8))


@pytest.fixture
def handle() -> aio_handle:
    return aio_handle(block_size=1 << 16, queue_depth=4)


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("offset", [0, 1, ALIGNMENT, 3 * ALIGNMENT + 7])
def test_what_is_written_is_in_the_file_and_comes_back(handle, nbytes, offset, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x" * (offset + nbytes + 5))
    for memory in (aligned(handle, nbytes), torch.empty(nbytes + 1, dtype=torch.uint8)[1:]):
        memory.copy_(content(nbytes, seed=nbytes))
        assert handle.sync_pwrite(memory, str(file), offset) == 1
        expected = b"x" * offset + bytes(content(nbytes, seed=nbytes).numpy()) + b"x" * 5
        assert file.read_bytes() == expected
        memory.zero_()
        assert handle.sync_pread(memory, str(file), offset) == 1
        assert torch.equal(memory, content(nbytes, seed=nbytes))


def test_tensors_of_any_dtype_and_a_new_file_for_its_owner_alone(handle, tmp_path):
    values = torch.randn(1000).bfloat16().view(10, 100)
    assert handle.write(values, str(tmp_path / "file"), True) == 1
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    found = torch.empty_like(values)
    assert handle.read(found, str(tmp_path / "file"), True) == 1
    assert torch.equal(found, values)


def test_requests_run_at_once_and_are_counted(handle, tmp_path):
    pieces = [content(100_000, seed=i) for i in range(10)]
    for i, piece in enumerate(pieces):
        assert handle.async_pwrite(piece, str(tmp_path / "file"), i * 100_000) == 0
    assert handle.wait() == 10 and handle.wait() == 0
    assert (tmp_path / "file").read_bytes() == b"".join(bytes(piece.numpy()) for piece in pieces)


Request = tuple[bool, int, int, bool]  # write, offset, bytes, whether to wait afterwards


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30_000), st.integers(0, 40_000), st.booleans()), max_size=12))
def test_any_sequence_of_requests_does_what_a_plain_file_does(tmp_path_factory, requests: list[Request]):
    file = tmp_path_factory.mktemp("fuzz") / "file"
    model = bytearray(100_000)
    file.write_bytes(model)
    handle = aio_handle(block_size=8192, queue_depth=3)
    reads: list[tuple[Tensor, bytes]] = []
    under_way: list[tuple[int, int]] = []
    for number, (write, offset, nbytes, wait) in enumerate(requests):
        if any(offset < end and begin < offset + nbytes for begin, end in under_way):
            handle.wait()  # requests that overlap have no order among themselves
            under_way.clear()
        under_way.append((offset, offset + nbytes))
        if write:
            data = content(nbytes, seed=number)
            model[offset : offset + nbytes] = bytes(data.numpy())
            handle.async_pwrite(data, str(file), offset)
        else:
            reads.append((torch.empty(nbytes, dtype=torch.uint8), bytes(model[offset : offset + nbytes])))
            handle.async_pread(reads[-1][0], str(file), offset)
        if wait:
            handle.wait()
            under_way.clear()
    handle.wait()
    assert file.read_bytes() == bytes(model)
    assert all(bytes(found.numpy()) == expected for found, expected in reads)


def test_several_threads_of_the_program_may_each_have_a_handle(tmp_path):
    def work(number: int) -> None:
        handle, data = aio_handle(block_size=4096), content(300_000, seed=number)
        for _ in range(5):
            handle.sync_pwrite(data, str(tmp_path / str(number)))
            found = torch.empty_like(data)
            handle.sync_pread(found, str(tmp_path / str(number)))
            good.append(torch.equal(found, data))

    good: list[bool] = []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good == [True] * 20


def test_a_dropped_buffer_is_kept_until_the_request_is_done(handle, tmp_path):
    for i in range(20):
        handle.async_pwrite(content(200_000, seed=i), str(tmp_path / str(i)))  # nobody else holds the tensor
    assert handle.wait() == 20
    for i in range(20):
        assert (tmp_path / str(i)).read_bytes() == bytes(content(200_000, seed=i).numpy())


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_failures_say_which_file_where_and_why_and_the_handle_goes_on(handle, tmp_path):
    short = tmp_path / "short"
    short.write_bytes(b"x" * 10_000)
    with pytest.raises(OpError, match=r"opening .*/missing failed: No such file"):
        handle.async_pread(torch.empty(5), str(tmp_path / "missing"))
    handle.async_pread(torch.empty(20_000, dtype=torch.uint8), str(short))
    handle.async_pread(good := torch.empty(5, dtype=torch.uint8), str(short))
    with pytest.raises(OpError, match=r"the end of the file was reached in .*/short at byte 10000, 10000 bytes early"):
        handle.wait()
    assert bytes(good.numpy()) == b"xxxxx", "the other requests were done"
    with pytest.raises(OpError, match="Is a directory"):
        handle.sync_pwrite(torch.empty(5), str(tmp_path))
    assert handle.sync_pread(good, str(short)) == 1


def test_a_full_disk_is_an_error_that_names_the_byte(tmp_path):
    script = f"""
import resource, signal, torch
from deepspeedlite.errors import OpError
from deepspeedlite.ops.aio import aio_handle
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
handle = aio_handle(block_size=65536, queue_depth=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # as a disk that ends there
try:
    handle.sync_pwrite(torch.zeros(1_000_000, dtype=torch.uint8), {str(tmp_path / "file")!r})
except OpError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert "writing" in done.stdout and "at byte 200000 failed: File too large" in done.stdout, (
        done.stderr + done.stdout
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small tmpfs")
def test_a_full_tmpfs_is_an_error(handle, tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with pytest.raises(OpError, match="No space left on device"):
            handle.sync_pwrite(content(2_000_000), str(tmp_path / "file"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_validation_sees_a_file_that_changed(handle, tmp_path):
    file = str(tmp_path / "file")
    handle.sync_pwrite(content(1000), file)
    handle.async_pread(found := torch.empty(1000, dtype=torch.uint8), file)
    handle.wait()
    Path(file).write_bytes(b"y" * 1000)
    with pytest.raises(OpError, match="is not what the buffer holds"):
        handle._finish(found, file, True, 0)


@pytest.mark.parametrize(
    ("buffer", "offset"),
    [(torch.zeros(10, 10)[:, :5], 0), (torch.zeros(10), -1), (torch.zeros(10, device="meta"), 0)],
)
def test_what_it_cannot_move_is_refused(handle, buffer, offset, tmp_path):
    with pytest.raises(OpError, match="must be a contiguous tensor on the CPU and the offset not negative"):
        handle.async_pread(buffer, str(tmp_path / "file"), offset)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(OpError, match="queue_depth must be at least 1, got 0"):
        aio_handle(queue_depth=0)


def test_a_forked_child_is_told_to_make_its_own(handle):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            handle.wait()
        except OpError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert b"forked child" in os.read(reader, 1000)
    for end in (reader, writer):
        os.close(end)


def test_locked_memory_is_aligned_and_given_back(handle):
    tensor = handle.new_cpu_locked_tensor(3000, torch.empty(0, dtype=torch.float16))
    assert tensor.dtype is torch.float16 and tensor.shape == (3000,) and tensor.data_ptr() % ALIGNMENT == 0
    if handle.is_pinned(tensor):  # the limit on locked memory may be 0
        assert handle.free_cpu_locked_tensor(tensor)
    assert not handle.is_pinned(tensor) and not handle.free_cpu_locked_tensor(tensor)


def test_locked_memory_that_is_dropped_is_unlocked(handle):
    tensor = handle.new_cpu_locked_tensor(3000, torch.empty(0))
    assert bool(handle._locked) == handle.is_pinned(tensor)  # the limit on locked memory may be 0
    del tensor
    assert not handle._locked


def test_it_answers_as_deepspeeds_does():
    handle = aio_handle(1 << 18, 16, True, False, 4)
    answers = (handle.get_block_size(), handle.get_queue_depth(), handle.get_single_submit())
    assert answers == (1 << 18, 16, True)
    assert (handle.get_overlap_events(), handle.get_intra_op_parallelism()) == (False, 4)
