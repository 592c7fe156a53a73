"""async_io against plain files, by every engine that this kernel has: sizes around a page, requests at random, and what
goes wrong.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import forked
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import needs, program
from torch import Tensor

from deepspeedlite.ops.aio import ALIGNMENT, ENGINES, aio_handle
from deepspeedlite.runtime.errors import OpError

pytestmark = needs("c++")
SIZES = (0, 1, 511, 4095, 4096, 4097, 8192, 65_536, 65_537, 1_000_003)


def content(nbytes: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def aligned(handle: aio_handle, nbytes: int) -> Tensor:
    return handle.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8))


@cache
def refusal(engine: str) -> str:
    """Why this kernel does not have the engine; "" where it does."""
    try:
        aio_handle(engine=engine)
    except OpError as error:
        return str(error)
    return ""


def engines() -> list[str]:
    """Those that this kernel has."""
    return [name for name in ENGINES if not refusal(name)]


@pytest.fixture(params=ENGINES)
def engine(request) -> str:
    if reason := refusal(request.param):
        pytest.skip(f"the engine {request.param} is not to be had: {reason}")
    return request.param


@pytest.fixture
def handle(engine) -> aio_handle:
    return aio_handle(block_size=1 << 16, queue_depth=4, engine=engine)


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
    assert handle.write(values, str(tmp_path / "file"), True) == 0
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    found = torch.empty_like(values)
    assert handle.read(found, str(tmp_path / "file"), True) == 0
    assert torch.equal(found, values)


def test_requests_run_at_once_and_are_counted(handle, tmp_path):
    pieces = [content(100_000, seed=i) for i in range(10)]
    for i, piece in enumerate(pieces):
        assert handle.async_pwrite(piece, str(tmp_path / "file"), i * 100_000) == 0
    assert handle.wait() == 10 and handle.wait() == 0
    assert (tmp_path / "file").read_bytes() == b"".join(bytes(piece.numpy()) for piece in pieces)


# --- the queue --------------------------------------------------------------------------------------------------------


def test_as_many_blocks_as_the_queue_is_deep_are_under_way_and_no_more(engine, tmp_path):
    for depth in (1, 3, 32):
        handle = aio_handle(block_size=4096, queue_depth=depth, engine=engine)
        for i in range(20):  # many times what the queue holds
            handle.async_pwrite(content(100_000, seed=i), str(tmp_path / str(i % 3)), i * 100_000)
        handle.wait()
        for i in range(20):
            with open(tmp_path / str(i % 3), "rb") as file:
                file.seek(i * 100_000)
                assert file.read(100_000) == bytes(content(100_000, seed=i).numpy())
        counts = handle.get_counts()
        assert counts["peak_depth"] <= depth and counts["blocks"] > 20 * 24
        handle.sync_pwrite(content(64 * 4096), str(tmp_path / "0"))  # alone more than the queue holds
        assert handle.get_counts()["peak_depth"] == depth


@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_reach_the_kernel_as_the_settings_say(engine, threads, tmp_path):
    file, blocks, depth = str(tmp_path / "file"), 96, 8
    Path(file).write_bytes(bytes(content(blocks * 4096).numpy()))

    def submissions(single_submit: bool, overlap_events: bool) -> int:
        handle = aio_handle(4096, depth, single_submit, overlap_events, threads, engine)
        memory = aligned(handle, blocks * 4096)
        handle.sync_pread(memory, file)
        assert torch.equal(memory, content(blocks * 4096))
        counts = handle.get_counts()
        assert (counts["blocks"], counts["bounced"]) == (blocks, 0)
        return counts["submissions"]

    assert submissions(True, True) == submissions(True, False) == blocks
    assert (
        submissions(False, False) <= blocks // depth + threads
    )  # one for each filled queue, and the last of each thread
    assert submissions(False, True) <= blocks


def test_whole_pages_of_the_file_go_past_the_page_cache(engine, tmp_path):
    handle = aio_handle(block_size=1 << 16, engine=engine)
    memory = aligned(handle, 10 * ALIGNMENT + 1)
    for offset, skip, nbytes, expected in (
        (0, 0, 10 * ALIGNMENT, (1, 1, 0)),  # blocks, direct, bounced
        (0, 1, 10 * ALIGNMENT, (1, 1, 1)),  # the memory is not aligned
        (100, 100, 9 * ALIGNMENT, (3, 1, 0)),  # both begin in the middle of a page, at the same place
        (100, 0, 9 * ALIGNMENT, (3, 1, 1)),
        (ALIGNMENT, 0, 100, (1, 0, 0)),
    ):
        before = handle.get_counts()
        handle.sync_pwrite(memory[skip : skip + nbytes], str(tmp_path / "file"), offset)
        after = handle.get_counts()
        if after["direct"] == before["direct"] == 0 and expected[1]:
            pytest.skip(f"the file system of {tmp_path} has no O_DIRECT")
        assert tuple(after[name] - before[name] for name in ("blocks", "direct", "bounced")) == expected


def test_the_engine_can_be_chosen_and_is_told(engine, monkeypatch):
    assert aio_handle(engine=engine).get_engine() == engine
    monkeypatch.setenv("DSL_AIO_ENGINE", engine)
    assert aio_handle().get_engine() == engine
    monkeypatch.delenv("DSL_AIO_ENGINE")
    assert aio_handle().get_engine() == engines()[0]


def test_an_engine_that_does_not_exist_is_refused(monkeypatch):
    with pytest.raises(OpError, match=r"engine must be one of io_uring, aio, threads, got 'libaio'"):
        aio_handle(engine="libaio")
    monkeypatch.setenv("DSL_AIO_ENGINE", "uring")
    with pytest.raises(OpError, match=r"DSL_AIO_ENGINE must be one of io_uring, aio, threads, got 'uring'"):
        aio_handle()


# Children of one process, each of which has some system calls answered with EPERM, as in containers: it prints which
# engine was taken, and the reasons for which the others were not.
FILTERED = """
import ctypes, os, sys
import torch
from deepspeedlite.runtime.errors import OpError
from deepspeedlite.ops.aio import aio_handle

class Filter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]

class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("filters", ctypes.POINTER(Filter))]

libc = ctypes.CDLL(None)

def refuse(number):
    load, equal, answer, eperm, allow = 0x20, 0x15, 0x06, 0x50001, 0x7FFF0000
    filters = (load, 0, 0, 0), (equal, 0, 1, number), (answer, 0, 0, eperm), (answer, 0, 0, allow)
    program = Program(4, (Filter * 4)(*(Filter(*words) for words in filters)))
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0

aio_handle().close()  # compiles and loads the op
for numbers in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        for number in numbers.split(","):
            refuse(int(number))
        handle = aio_handle()
        handle.write(torch.arange(50_000), sys.argv[1], True)
        print(numbers, handle.get_engine(), flush=True)
        for name in ("io_uring", "aio"):
            try:
                aio_handle(engine=name)
            except OpError as error:
                print(numbers, error, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, numbers
"""
REFUSED = {  # numbers of system calls on x86-64, the engine that is taken, and what is told of another one
    "425": ("aio", "io_uring: io_uring_setup"),
    "426": ("aio", "io_uring: io_uring_enter"),
    "427": ("aio", "io_uring: io_uring_register"),
    "425,206": ("threads", "aio: io_setup"),
    "425,209": ("threads", "aio: io_submit"),
    "425,208": ("threads", "aio: io_getevents"),
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="knows the numbers of x86-64's system calls")
def test_where_a_filter_refuses_an_engine_the_next_one_is_taken_and_the_reason_told(tmp_path):
    if reason := refusal("io_uring") or refusal("aio"):
        pytest.skip(f"an engine is not to be had even without a filter: {reason}")
    script = f"import os; os.environ.pop('DSL_AIO_ENGINE', None)\n{FILTERED}"
    done = forked.run(script, tmp_path / "file", *REFUSED, folder=tmp_path, timeout_s=100)
    assert done.returncode == 0, done.stderr
    for numbers, (taken, call) in REFUSED.items():
        assert f"{numbers} {taken}\n" in done.stdout
        told = f"{call}: Operation not permitted"
        assert f"{numbers} async_io cannot be had here: {told}; without DSL_AIO_ENGINE and engine, one" in done.stdout
        assert any(f"async_io uses {taken}, since" in line and told in line for line in done.stderr.splitlines())


# --- sequences of requests --------------------------------------------------------------------------------------------


Request = tuple[bool, int, int, bool]  # write, offset, bytes, whether to wait afterwards


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 30_000), st.integers(0, 40_000), st.booleans()), max_size=12),
    st.integers(1, 4),
    st.integers(1, 2),
    st.booleans(),
)
def test_any_sequence_of_requests_does_what_a_plain_file_does(
    engine, tmp_path, requests: list[Request], depth: int, threads: int, overlap_events: bool
):
    file = tmp_path / "file"
    model = bytearray(100_000)
    file.write_bytes(model)
    handle = aio_handle(8192, depth, False, overlap_events, threads, engine)
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


def test_several_threads_of_the_program_may_each_have_a_handle(engine, tmp_path):
    def work(number: int) -> None:
        handle, data = aio_handle(block_size=4096, engine=engine), content(300_000, seed=number)
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
import resource, torch
from deepspeedlite.runtime.errors import OpError
from deepspeedlite.ops.aio import aio_handle
handles = [aio_handle(block_size=65536, queue_depth=4, engine=engine) for engine in {engines()}]
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # as a disk that ends there
for handle in handles:
    try:
        handle.sync_pwrite(torch.zeros(1_000_000, dtype=torch.uint8), {str(tmp_path / "file")!r})
    except OpError as error:
        print(error)
"""
    done = forked.run(script, folder=tmp_path, timeout_s=100)
    lines = done.stdout.splitlines()
    assert len(lines) == len(engines()) and done.returncode == 0, done.stderr
    assert all("writing" in line and "at byte 200000 failed: File too large" in line for line in lines), lines


@contextlib.contextmanager
def small_tmpfs(folder: Path) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small tmpfs")
    program("mount")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_tmpfs_is_an_error(handle, tmp_path):
    with small_tmpfs(tmp_path):
        with pytest.raises(OpError, match=r"writing .*/file at byte \d+ failed: No space left on device"):
            handle.sync_pwrite(content(2_000_000), str(tmp_path / "file"))
        assert handle.get_counts()["blocks"] < 2_000_000 / 65_536, "what came after the failure was not tried"
        (tmp_path / "file").unlink()
        assert handle.write(content(100_000), str(tmp_path / "file"), True) == 0


@contextlib.contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """A disk of its own, mounted at `folder`; yields the file that is its medium."""
    program("mkfs.ext4"), program("mount")
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    medium = folder.with_name("medium")
    medium.touch()
    os.truncate(medium, nbytes)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", str(medium)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(medium), str(folder)], check=False).returncode:
        pytest.skip("needs the right to mount a file as a disk")
    try:
        yield medium
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_or_breaks_is_an_error_and_the_handle_goes_on(handle, tmp_path):
    (folder := tmp_path / "disk").mkdir()
    data, found = content(6_000_000), torch.empty(6_000_000, dtype=torch.uint8)
    with small_disk(folder, 10 << 20) as medium:
        handle.write(data, str(folder / "first"), True)
        with pytest.raises(OpError, match=r"writing .*/second at byte \d+ failed: No space left on device"):
            handle.sync_pwrite(data, str(folder / "second"))
        (folder / "second").unlink()
        assert handle.write(data[:2_000_000], str(folder / "second"), True) == 0, "there is room again"
        os.sync()
        os.truncate(medium, 4 << 20)  # the rest of the medium is lost; what is read is not in the cache
        with pytest.raises(OpError, match=r"reading .*/first at byte \d+ failed: Input/output error"):
            handle.sync_pread(found, str(folder / "first"))
        assert handle.get_counts()["direct"] > 0
        os.truncate(medium, 10 << 20)
    assert handle.write(data, str(tmp_path / "file"), True) == 0


def test_what_cannot_be_read_in_the_middle_is_an_error_and_the_rest_is_done(handle, tmp_path):
    good = tmp_path / "good"
    good.write_bytes(bytes(content(500_000).numpy()))
    for _ in range(20):  # the first page of an address space belongs to nobody: reading it is EIO
        handle.async_pread(torch.empty(5000, dtype=torch.uint8), "/proc/self/mem", 4096)
        handle.async_pread(found := torch.empty(500_000, dtype=torch.uint8), str(good))
    with pytest.raises(OpError, match=r"reading /proc/self/mem at byte 4096 failed: Input/output error"):
        handle.wait()
    assert torch.equal(found, content(500_000)) and handle.sync_pread(found, str(good)) == 1


def test_a_file_that_vanishes_while_it_is_read_is_read_and_then_gone(handle, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(content(3_000_000).numpy()))
    handle.async_pread(found := torch.empty(3_000_000, dtype=torch.uint8), str(file))
    file.unlink()
    handle.wait()
    assert torch.equal(found, content(3_000_000))
    with pytest.raises(OpError, match="No such file"):
        handle.sync_pread(found, str(file))


def test_a_file_that_shrinks_ends_where_it_now_ends(handle, tmp_path):
    file, data = tmp_path / "file", content(1_000_000)
    found = torch.empty_like(data)
    for length in (700_001, 4096, 0):
        file.write_bytes(bytes(data.numpy()))
        handle.sync_pread(found.zero_(), str(file))
        os.truncate(file, length)
        expected = rf"end of the file was reached in .*/file at byte {length}, {1_000_000 - length} bytes early"
        with pytest.raises(OpError, match=expected):
            handle.sync_pread(found.zero_(), str(file))
        assert not found[length:].any(), "nothing is made up"


def test_a_file_that_shrinks_while_it_is_read_is_whole_or_an_error(handle, tmp_path):
    file, data = tmp_path / "file", content(2_000_000)
    for _ in range(10):
        file.write_bytes(bytes(data.numpy()))
        handle.async_pread(found := torch.zeros_like(data), str(file))
        os.truncate(file, 300_001)
        try:
            handle.wait()
        except OpError as error:
            assert "/file at byte " in str(error) and " bytes early" in str(error)
            assert torch.equal(found[:300_001], data[:300_001])
        else:
            assert torch.equal(found, data)


@pytest.mark.parametrize("how", ["close", "drop"])
def test_ending_a_handle_waits_for_what_is_under_way(engine, how, tmp_path):
    handle = aio_handle(block_size=4096, queue_depth=2, engine=engine)
    for i in range(10):
        handle.async_pwrite(content(300_001, seed=i), str(tmp_path / str(i)))
    if how == "close":
        handle.close()
        with pytest.raises(OpError, match="this aio_handle is closed"):
            handle.wait()
        handle.close()
    del handle
    for i in range(10):
        assert (tmp_path / str(i)).read_bytes() == bytes(content(300_001, seed=i).numpy())


def test_threads_of_the_program_may_share_a_handle(handle, tmp_path):
    def work(number: int) -> None:
        for i in range(10):
            handle.async_pwrite(content(50_001, seed=i), str(tmp_path / f"{number}-{i}"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert handle.wait() == 40
    for number in range(4):
        for i in range(10):
            assert (tmp_path / f"{number}-{i}").read_bytes() == bytes(content(50_001, seed=i).numpy())


# One request after another while the kernel answers as it seldom does, at every n-th call or transfer. A line for each:
# where, n, how, whether there was a fault in it, and whether the data came back or else what was told.
FAULTY = """
import ctypes, sys, torch
from deepspeedlite.runtime.errors import OpError
from deepspeedlite.ops.aio import aio_handle

engine, folder = sys.argv[1:3]
faults = ctypes.CDLL(None)
handle = aio_handle(block_size=8192, queue_depth=4, engine=engine)
for case in sys.argv[3:]:
    where, every, how = map(int, case.split(","))
    faults.faults_every(every, how, where)
    before = 0
    for i in range(10):
        data = torch.arange(30_000 + i) * (7 + how)
        found = torch.zeros_like(data)
        try:
            handle.sync_pwrite(data, f"{folder}/{i}", 4096 * (i % 3) + i // 8)
            handle.sync_pread(found, f"{folder}/{i}", 4096 * (i % 3) + i // 8)
            told = torch.equal(found, data)
        except OpError as error:
            told = error
        print(case, faults.faults_hit() > before, told)
        before = faults.faults_hit()
    assert before >= 2, (case, before)
faults.faults_every(0, 0, 0)
handle.write(data, f"{folder}/last", True)
"""
CALLS, TRANSFERS = 0, 1
SHORT = -1  # half of the bytes are moved, or one of the blocks that are handed over is taken


@pytest.mark.slow
def test_what_the_kernel_leaves_undone_is_done_and_what_it_refuses_is_told(engine, aio_faults, tmp_path):
    cases = [f"{CALLS},3,{how}" for how in (SHORT, errno.EINTR, errno.EAGAIN, errno.EIO)]
    cases += [f"{TRANSFERS},{every},{how}" for every in (1, 2, 7, 40) for how in (SHORT, errno.EIO)]
    command = [sys.executable, "-c", FAULTY, engine, str(tmp_path), *cases]
    environ = {**os.environ, "LD_PRELOAD": str(aio_faults)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert [case for case, _, _ in lines] == [case for case in cases for _ in range(10)]
    failure = rf"async_io: (reading|writing) {tmp_path}/\d at byte \d+ failed: Input/output error"
    for case, was_hit, told in lines:
        is_failure = was_hit == "True" and case.endswith(f",{errno.EIO}")
        assert re.fullmatch(failure if is_failure else "True", told), (case, was_hit, told)


@pytest.mark.parametrize(
    ("buffer", "offset"),
    [(torch.zeros(10), -1), (torch.zeros(10, device="meta"), 0)],
)
def test_what_it_cannot_move_is_refused(handle, buffer, offset, tmp_path):
    with pytest.raises(OpError, match="must have memory and the offset not be negative"):
        handle.async_pread(buffer, str(tmp_path / "file"), offset)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(OpError, match="queue_depth must be at least 1 and at most 4096, got 0"):
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


def test_large_locked_memory_asks_for_huge_pages(handle):
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    tensor = handle.new_cpu_locked_tensor((5 << 20) // 4, torch.empty(0))
    assert tensor.data_ptr() % (2 << 20) == 0
    flags = ""
    with open("/proc/self/smaps") as areas:
        for line in areas:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                begin, end = (int(number, 16) for number in line.split()[0].split("-"))
                is_inside = begin <= tensor.data_ptr() < end
            elif line.startswith("VmFlags:") and is_inside:
                flags = line
    assert " hg" in flags, "not advised"


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
