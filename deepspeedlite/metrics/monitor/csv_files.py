r"""CSV files: one per tag under `output_path/job_name`, with the header `step,<last part of the tag>`.

`Train/Samples/lr` goes to `Train_Samples_lr.csv`. A file that exists is continued without a second header, and a row
that a crash cut short is removed first. Rows reach the operating system before `write` returns, so a killed run loses
nothing. Values are Python's shortest exact floats, NaN and infinities as `nan`, `inf`.
"""

from __future__ import annotations

import csv
import os
import re
import zlib
from typing import TextIO

from deepspeedlite.config.sections.monitors import CsvMonitor
from deepspeedlite.metrics.monitor.writer import Point, make_folder

SECTION = "csv_monitor"
MAX_OPEN_FILES = 64
MAX_NAME_CHARS = 100


def file_stem(tag: str) -> str:
    """A name for the tag's file: letters, digits and `._+-` are kept, all else becomes `_`."""
    stem = re.sub(r"[^\w.+-]", "_", tag) or "_"
    return stem if len(stem) <= MAX_NAME_CHARS else f"{stem[:MAX_NAME_CHARS]}_{zlib.crc32(tag.encode()):08x}"


class CsvWriter:
    """Appends to cached files; the longest-open one is closed when there are too many tags."""

    def __init__(self, config: CsvMonitor) -> None:
        self._folder = make_folder(SECTION, config)
        self._paths: dict[str, str] = {}
        self._files: dict[str, TextIO] = {}

    def write(self, points: list[Point]) -> None:
        """Append one row per point and flush the files touched."""
        touched = set()
        for tag, value, step in points:
            file = self._files.get(tag) or self._open(tag)
            csv.writer(file, lineterminator="\n").writerow([step, value])
            touched.add(tag)
        for tag in touched & self._files.keys():
            self._files[tag].flush()

    def flush(self) -> None:
        """Nothing is held back: `write` flushes."""
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        """Close every file."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open(self, tag: str) -> TextIO:
        if len(self._files) >= MAX_OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        path = self._path(tag)
        _drop_torn_row(path)
        file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 (kept open on purpose; see close)
        if file.tell() == 0:
            csv.writer(file, lineterminator="\n").writerow(["step", tag.rsplit("/", 1)[-1]])
        self._files[tag] = file
        return file

    def _path(self, tag: str) -> str:
        path = self._paths.get(tag)
        if path is None:
            path = os.path.join(self._folder, f"{file_stem(tag)}.csv")
            if path in self._paths.values():  # `a/b` and `a_b` are two tags
                path = os.path.join(self._folder, f"{file_stem(tag)}_{zlib.crc32(tag.encode()):08x}.csv")
            self._paths[tag] = path
        return path


def _drop_torn_row(path: str) -> None:
    """Cut a file that does not end in a newline back to its last whole row."""
    if not os.path.exists(path):
        return
    with open(path, "rb+") as file:
        size_bytes = file.seek(0, os.SEEK_END)
        tail_bytes = min(size_bytes, 4096)  # far longer than any row
        file.seek(size_bytes - tail_bytes)
        tail = file.read(tail_bytes)
        if tail and not tail.endswith(b"\n"):
            file.truncate(size_bytes - tail_bytes + tail.rfind(b"\n") + 1)
