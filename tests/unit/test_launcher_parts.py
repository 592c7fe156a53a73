"""The launcher's parts that need no process: finding devices, parsing, cutting output into lines, blaming a rank."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeedlite.host.gpus import find_devices, parse_visible
from deepspeedlite.launcher.cli import parse
from deepspeedlite.launcher.job import rank_argv
from deepspeedlite.launcher.loop import Loop
from deepspeedlite.launcher.options import LaunchOptions
from deepspeedlite.launcher.output import RankStream, Screen
from deepspeedlite.launcher.report import ErrorTail, RankEnd, extract_traceback, failure_report, first_failure
from deepspeedlite.runtime.errors import LaunchError

# Devices


def fake_machine(root: Path, nvidia: int = 0, amd: int = 0) -> Path:
    (root / "dev").mkdir(parents=True)
    for index in range(nvidia):
        (root / f"dev/nvidia{index + 3}").touch()  # a container's node numbers are the host's
    (root / "dev/nvidiactl").touch()
    if amd:
        (root / "dev/kfd").touch()
        for node in range(amd + 1):
            folder = root / f"sys/class/kfd/kfd/topology/nodes/{node}"
            folder.mkdir(parents=True)
            (folder / "properties").write_text(f"cpu_cores_count 0\nsimd_count {256 * bool(node)}\n")
    return root


def test_gpus_are_counted_from_the_drivers_files(tmp_path: Path) -> None:
    assert find_devices({}, fake_machine(tmp_path / "n", nvidia=2)).ids == ("0", "1")
    assert find_devices({}, fake_machine(tmp_path / "a", amd=4)).ids == ("0", "1", "2", "3")
    assert find_devices({}, fake_machine(tmp_path / "c")).vendor == "cpu"
    assert find_devices({"DS_ACCELERATOR": "cpu"}, tmp_path / "n").vendor == "cpu"
    (tmp_path / "p/proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    assert find_devices({}, tmp_path / "p").ids == ("0",)


def test_visible_devices_are_narrowed_never_widened(tmp_path: Path) -> None:
    machine = fake_machine(tmp_path / "n", nvidia=8)
    devices = find_devices({"CUDA_VISIBLE_DEVICES": "5, 3,GPU-8a"}, machine)
    assert devices.pick(range(3), "") == {"CUDA_VISIBLE_DEVICES": "5,3,GPU-8a"}
    assert devices.pick([1, 2], "") == {"CUDA_VISIBLE_DEVICES": "3,GPU-8a"}
    assert devices.used([0, 1]) == "CUDA_VISIBLE_DEVICES=5, 3,GPU-8a is respected: ranks use 5,3"
    assert devices.used([1, 2]).endswith("ranks use 3,GPU-8a, slots 1,2 of it")
    left = r"asks for slot 3, but CUDA_VISIBLE_DEVICES=5, 3,GPU-8a leaves 3 \(slots 0 to 2 of it\)"
    with pytest.raises(LaunchError, match="hosts " + left):
        devices.pick(range(4), "hosts")
    with pytest.raises(LaunchError, match=r"asks for slot 8, but this machine has 8 \(slots 0 to 7\)"):
        find_devices({}, machine).pick(range(9), "--num_gpus 9")
    assert find_devices({}, machine).used([2, 5]) == "2 of 8 GPUs are used (2,5)"
    assert find_devices({"CUDA_VISIBLE_DEVICES": ""}, machine).vendor == "cpu"
    rocm = find_devices({"HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "0"}, fake_machine(tmp_path / "a", amd=2))
    assert rocm.pick([0], "") == {"HIP_VISIBLE_DEVICES": "1"}
    assert find_devices({}, machine).pick([0, 1], "") == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert find_devices({}, fake_machine(tmp_path / "none")).pick([0, 1], "") == {}


def test_faulty_visible_devices_are_named() -> None:
    assert parse_visible("CUDA_VISIBLE_DEVICES", "0,-1,1", 4) == ("0",)
    assert parse_visible("CUDA_VISIBLE_DEVICES", "NoDevFiles", 4) == parse_visible("x", "none", 4) == ()
    for word in ("all", "0-3", "void", "cuda:0"):
        with pytest.raises(LaunchError, match="is no device, and hides all of them; write numbers"):
            parse_visible("CUDA_VISIBLE_DEVICES", word, 4)
    with pytest.raises(LaunchError, match="names device 1 twice"):
        parse_visible("CUDA_VISIBLE_DEVICES", "1,1", 4)
    with pytest.raises(LaunchError, match=r"names device 4, but this machine has 4 \(devices 0 to 3\)"):
        parse_visible("CUDA_VISIBLE_DEVICES", "0,4", 4)


# The command line


@given(st.lists(st.text()), st.booleans(), st.booleans())
def test_arguments_of_any_text_stay_as_they_are(words: list[str], module: bool, no_local_rank: bool) -> None:
    flags = ["--module"] * module + ["--no_local_rank"] * no_local_rank
    options = parse([*flags, "--num_gpus=2", "train", *words])
    assert options.script_args == tuple(words) and options.num_gpus == 2
    argv = rank_argv(options, 1, "python")
    expected = ("python", *(["-m"] if module else []), "train", *([] if no_local_rank else ["--local_rank=1"]), *words)
    assert argv == expected


# Output


def collect(chunks: list[bytes], prefix: bytes, is_first: bool) -> bytes:
    """What a stream makes of these reads when nobody watches a terminal."""
    read_end, write_end = os.pipe()
    stream = RankStream(Screen(Loop(), write_end, write_end), 1, prefix, is_first)
    shown = b""
    for chunk in chunks:
        stream.feed(chunk)
    stream.finish()
    os.close(write_end)
    while part := os.read(read_end, 1 << 16):
        shown += part
    os.close(read_end)
    return shown


@given(st.lists(st.binary(max_size=50), max_size=20))
def test_taking_the_prefix_off_gives_a_ranks_bytes_back(chunks: list[bytes]) -> None:
    whole = b"".join(chunks).replace(b"\r", b"")
    chunks = [chunk.replace(b"\r", b"") for chunk in chunks]
    lines = whole.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    for is_first in (True, False):
        assert collect(chunks, b"[3] ", is_first) == b"".join(b"[3] " + line + b"\n" for line in lines)
    assert collect(chunks, b"", True) == whole


@given(st.lists(st.sampled_from([b"a", b"\r", b"\n", b"bc"]), max_size=30))
def test_how_output_is_cut_into_reads_does_not_matter(pieces: list[bytes]) -> None:
    whole = b"".join(pieces)
    for is_first in (True, False):
        assert collect(pieces, b"[1] ", is_first) == collect([whole] if whole else [], b"[1] ", is_first)


# The report


def raised(text: str) -> str:
    return f'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n{text}'


def test_the_last_traceback_is_found_with_its_chain() -> None:
    chain = "\n\nThe above exception was the direct cause of the following exception:\n\n"
    wanted = raised("KeyError: 1") + chain + raised("ValueError: two\n\nlines")
    assert extract_traceback("noise\n" + raised("OSError: handled") + "\n\nmore noise\n" + wanted) == wanted
    assert extract_traceback(wanted + "\nException ignored in: <x>\n" + raised("TypeError: late")) == wanted
    tagged = "".join(f"[rank3]: {line}\n" for line in wanted.splitlines())
    assert extract_traceback(tagged).replace(" \n", "\n") == wanted
    assert extract_traceback("no such thing") == ""


def test_a_traceback_split_between_reads_is_dated_once() -> None:
    tail = ErrorTail()
    text = raised("KeyError: 1\n").encode()
    tail.feed(text[:10], 1.0)
    tail.feed(text[10:], 2.0)
    tail.feed(b"\nDuring handling of the above exception, another exception occurred:\n\n" + text, 3.0)
    tail.feed(b"Exception ignored in: <x>\n" + text, 4.0)
    assert tail.traceback_s == 2.0
    tail.feed(b"x" * 1_000_000, 5.0)
    assert len(tail.text) < 100_000


def test_blame_follows_the_traceback_not_the_exit() -> None:
    first = RankEnd(2, 1, exited_s=9.0, traceback_s=5.0, stderr=raised("ValueError: cause"))
    hasty = RankEnd(0, 1, exited_s=6.0, traceback_s=5.5, stderr=raised("IndexError: other"))
    lost = RankEnd(1, -6, exited_s=4.9, stderr="NCCL watchdog thread terminated")
    assert first_failure([hasty, lost, first]) is first
    assert first_failure([lost]) is lost and lost.exit_status == 134
    text = failure_report(first, 1.0, 4, [0, 1])
    assert "4.00 s after the start" in text and "failed after it: rank 0, 1" in text and "other 1 of 4" in text
    assert text.endswith("its last error (the traceback is in its output, after [2]):\n    ValueError: cause")


def test_a_report_repeats_no_traceback() -> None:
    told = raised("KeyError: 1") + "\n\nThe above exception was the direct cause of the following exception:\n\n"
    deep = "\n".join(f"  frame {index}" for index in range(500))
    end = RankEnd(3, 1, 2.0, stderr=told + raised(f"{deep}\nValueError: two\n\n  lines\n"), host="worker-1")
    assert failure_report(end, 1.0, 4, []).endswith(
        "its last error (the traceback is in its output, after [worker-1:3]):\n    ValueError: two\n\n      lines"
    )
    alone = RankEnd(0, 1, 2.0, stderr=raised("KeyError: 1"))
    assert failure_report(alone, 1.0, 1, []).endswith("error (the traceback is in its output):\n    KeyError: 1")
    cut = RankEnd(0, 1, 2.0, stderr='Traceback (most recent call last):\n  File "x.py", line 1')
    assert failure_report(cut, 1.0, 1, []).endswith(':\n      File "x.py", line 1')


def test_options_have_the_documented_defaults() -> None:
    assert parse(["train.py"]) == LaunchOptions("train.py")
    quiet = LaunchOptions("t.py", quiet=True, log_level="error")
    assert parse(["-q", "--num_gpus", "-1", "--enable_each_rank_log=None", "t.py"]) == quiet
