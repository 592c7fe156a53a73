"""DeepSpeed's commands `ds_report`, `ds_io` and `ds_nvme_tune`: ours, which take the options of DeepSpeed's too.

`python -m deepspeedlite.drop_in install` gives them to an environment. The other commands are ours as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from deepspeedlite import env_report
from deepspeedlite.env_report.report import SECTIONS
from deepspeedlite.tools import io_tune


def report(argv: Sequence[str] | None = None) -> int:
    """`ds_report [--hide_operator_status] [--hide_errors_and_warnings] [options of dslite_report]`."""
    parser = argparse.ArgumentParser(prog="ds_report", add_help=False, allow_abbrev=False)
    parser.add_argument("--hide_operator_status", action="store_true")
    parser.add_argument("--hide_errors_and_warnings", action="store_true")  # of compilers, which are rows of the report
    given, ours = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if given.hide_operator_status:
        ours += [word for section in SECTIONS if section != "ops" for word in ("--only", section)]
    return env_report.main(ours)


def io(argv: Sequence[str] | None = None) -> int:
    """`ds_io --folder DIR --io_size BYTES ...` measures reading and writing; `ds_io tune` and `bench` are ours."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or not given[0].startswith("--"):
        return io_tune.main(given)
    parser = argparse.ArgumentParser(prog="ds_io", description=io.__doc__)
    parser.add_argument("--folder", default=".", help="a folder on the disk")
    parser.add_argument("--io_size", required=True, help="bytes of the file")
    parser.add_argument("--block_size", default="1M", help="bytes of a request")
    parser.add_argument("--queue_depth", default="32", help="requests under way")
    parser.add_argument("--loops", default="3", help="turns")
    said = "taken, and changes nothing: reading and writing are both measured, by every engine that there is"
    for flag in ("read", "single_submit", "sequential_requests", "validate", "include_warmup_time"):
        parser.add_argument(f"--{flag}", action="store_true", help=said)
    for option in ("multi_process", "io_parallel", "warmup_loops", "engine"):
        parser.add_argument(f"--{option}", help=said)
    args = parser.parse_args(given)
    where = ["--path", args.folder, "--size", args.io_size, "--block-size", args.block_size]
    return io_tune.main(["bench", *where, "--depth", args.queue_depth, "--repeats", args.loops])


def nvme_tune(argv: Sequence[str] | None = None) -> int:
    """`ds_nvme_tune --nvme_dir DIR [--io_size BYTES] [--loops N]` prints the best `aio` section."""
    parser = argparse.ArgumentParser(prog="ds_nvme_tune", description=nvme_tune.__doc__)
    parser.add_argument("--nvme_dir", required=True, nargs="+", help="folders on the disks, tuned one by one")
    parser.add_argument("--io_size", default="256M", help="bytes of the file")
    parser.add_argument("--loops", default="3", help="turns of each setting")
    args = parser.parse_args(argv)
    for folder in args.nvme_dir:
        if status := io_tune.main(["tune", "--path", folder, "--size", args.io_size, "--repeats", args.loops]):
            return status
    return 0
