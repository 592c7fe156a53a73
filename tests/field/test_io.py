"""dslite_io on real files: what it prints can be pasted, it picks what it measured, a disk that lies is caught."""

from __future__ import annotations

import json

import pytest
from programs import find, needs

from deepspeedlite.config import load_config
from deepspeedlite.host.text import size_text
from deepspeedlite.ops import load
from deepspeedlite.ops.aio import aio_handle
from deepspeedlite.runtime.errors import OpError
from deepspeedlite.tools import io_tune

SMALL = ["--size", "1M", "--repeats", "1"]


@needs("c++")
def test_tune_tries_every_setting_and_prints_a_section_that_the_configuration_takes(tmp_path, capsys):
    engine = io_tune.engines_here()[0]
    words = ["--block-sizes", "64K", "128k", "--depths", "1", "4", "--engines", engine]
    assert io_tune.main(["tune", "--path", str(tmp_path), *SMALL, *words, "--json"]) == 0
    *rows, section = map(json.loads, capsys.readouterr().out.splitlines())
    tried = {(row["engine"], row["block_bytes"], row["queue_depth"]) for row in rows}
    assert tried == {(engine, block, depth) for block in (65536, 131072) for depth in (1, 4)}
    assert all(row["read_mb_per_s"] > 0 and row["write_mb_per_s"] > 0 for row in rows)
    config = load_config(section).aio
    assert (engine, config.block_size, config.queue_depth) in tried
    assert not list(tmp_path.iterdir()), "its file is gone"


@needs("c++")
def test_tune_shows_a_table_and_says_how_to_have_another_engine(tmp_path, capsys):
    if len(engines := io_tune.engines_here()) == 1:
        pytest.skip("this kernel has only one engine")
    assert io_tune.main(["tune", "--path", str(tmp_path), *SMALL, "--block-sizes", "1M", "--engines", engines[-1]]) == 0
    told = capsys.readouterr()
    assert told.out.count(f"│ {engines[-1]} ") == 4 and '"block_size": 1048576' in told.out
    assert f"export DSL_AIO_ENGINE={engines[-1]}" in told.err


@needs("c++")
def test_bench_runs_in_turns_with_fio(tmp_path, capsys):
    # 3 does not divide the file: it becomes as much longer
    words = ["--block-size", "64K", "--depth", "3", "--engines", "threads"]
    assert io_tune.main(["bench", "--path", str(tmp_path), *SMALL, *words, "--json"]) == 0
    told = capsys.readouterr()
    rows = [json.loads(line) for line in told.out.splitlines()]
    assert [(row["engine"], row["what"]) for row in rows] == [("threads", "read"), ("threads", "write")]
    if find("fio") is None:
        assert all(row["ratio"] is None for row in rows) and "fio is not installed" in told.err
    else:
        assert all(row["ratio"] == row["mb_per_s"] / row["fio_mb_per_s"] for row in rows)


@needs("c++")
def test_bench_without_fio_shows_our_rates_alone(tmp_path, capsys, monkeypatch):
    load("aio_open")  # compiled, if need be, while there is a compiler
    monkeypatch.setenv("PATH", str(tmp_path))
    assert io_tune.main(["bench", "--path", str(tmp_path), *SMALL]) == 0
    told = capsys.readouterr()
    assert "MB/s in blocks of 1 MiB, 8 under way" in told.out and "fio is not installed" in told.err
    assert [told.out.count(f"│ {engine} ") for engine in io_tune.engines_here()] == [2] * len(io_tune.engines_here())


def times(read_s: float, write_s: float) -> io_tune.Times:
    return io_tune.Times(10**6, [read_s, read_s * 9, read_s / 9], [write_s])


def test_the_best_is_the_smallest_queue_among_the_fastest():
    slow, large, small = (
        io_tune.Setting("aio", 4096, 1),
        io_tune.Setting("aio", 1 << 20, 32),
        io_tune.Setting("aio", 1 << 20, 8),
    )
    found = {slow: times(9.0, 1.0), large: times(1.0, 2.0), small: times(1.01, 2.01)}
    assert found[large].rate("read") == 1.0 and found[large].rate("both") == pytest.approx(2 / 3)
    assert io_tune.best_of(found, "both") == io_tune.best_of(found, "read") == small
    assert io_tune.best_of(found, "write") == slow


@needs("c++")
def test_a_disk_that_does_not_keep_what_is_written_is_an_error(tmp_path, monkeypatch, capsys):
    read = aio_handle.sync_pread

    def lie(handle: aio_handle, buffer, filename: str) -> int:
        with open(filename, "r+b") as file:
            file.seek(12_345)
            file.write(b"lie")
        return read(handle, buffer, filename)

    monkeypatch.setattr(aio_handle, "sync_pread", lie)
    assert io_tune.main(["bench", "--path", str(tmp_path), *SMALL]) == 1
    assert "what was read is not what was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs("c++")
def test_what_cannot_be_measured_is_refused_with_the_reason(tmp_path, capsys):
    assert io_tune.main(["tune", "--path", str(tmp_path / "missing")]) == 1
    assert "missing cannot be written: No such file or directory" in capsys.readouterr().err
    assert io_tune.main(["tune", "--path", str(tmp_path), "--size", "9999999G"]) == 1
    assert "give a smaller --size" in capsys.readouterr().err
    for words in (["--size", "3x"], ["--repeats", "0"], ["--engines", "libaio"]):
        with pytest.raises(SystemExit):
            io_tune.main(["tune", *words])
    if find("fio"):
        with pytest.raises(OpError, match="fio failed, called as fio"):
            io_tune.fio_seconds(io_tune.Setting("threads", 4096, 1), "read", str(tmp_path), 4096)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1", 1), ("1024K", 1 << 20), ("3m", 3 << 20), ("2GiB", 2 << 30), ("5MB", 5 << 20)]
)
def test_numbers_of_bytes(text, nbytes):
    assert io_tune.bytes_of(text) == nbytes and io_tune.bytes_of(size_text(nbytes)) == nbytes
