"""The command lines that look into checkpoints: `inspect` what one holds and where, `diff` two of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from math import isfinite
from pathlib import Path
from typing import Any

from deepspeedlite.checkpoint.formats import open_checkpoint
from deepspeedlite.checkpoint.manifest import Parameter
from deepspeedlite.checkpoint.reader import Reader
from deepspeedlite.host.text import print_table
from deepspeedlite.runtime.errors import CheckpointError
from deepspeedlite.tools.checkpoint_diff import Difference, differences

_MOST_LINES = 20  # of a section of differences, for people; --json has them all
_COLUMNS = ("parameter", "shape", "dtype", "elements", "bytes", "stored", "files #", "")


def add_commands(commands: Any) -> None:
    """Add `inspect` and `diff` to an argument parser's commands; `run` of what they parse gives the exit status."""
    shown = commands.add_parser("inspect", help="list parameters, sizes, dtypes, and where they lie")
    shown.add_argument("dir", type=Path, help="a tag's directory, or one of tags")
    shown.add_argument("-t", "--tag", help="the one that `latest` names, if not given")
    shown.add_argument("--json", action="store_true", help="print all as JSON, with every piece's place")
    shown.set_defaults(run=_inspect)
    compared = commands.add_parser("diff", help="compare two checkpoints; exit status 1 if they differ")
    compared.add_argument("a", type=Path, metavar="A", help="a tag's directory, or one of tags whose `latest` is taken")
    compared.add_argument("b", type=Path, metavar="B", help="another")
    compared.add_argument("--json", action="store_true", help="print all differences as JSON")
    compared.set_defaults(run=_diff)


# --- what one holds -----------------------------------------------------------------------------------------------


def describe(reader: Reader) -> dict[str, Any]:
    """A checkpoint's run, files and parameters as JSON-able data; sizes in bytes and elements."""
    manifest = reader.manifest
    parameters = [_describe_parameter(reader, parameter) for parameter in manifest.parameters]
    return {
        **_describe_run(reader),
        "optimizer": manifest.optimizer,
        "param_groups": manifest.param_groups,
        "frozen_excluded": manifest.frozen_excluded,
        "state": sorted(key for key, value in manifest.state.items() if value is not None),
        "files": {name: record.nbytes for name, record in sorted(manifest.files.items())},
        "numel": sum(p.numel for p in manifest.parameters if not p.buffer),
        "parameters": parameters,
    }


def _describe_run(reader: Reader) -> dict[str, Any]:
    manifest = reader.manifest
    run = {"path": str(reader.path), "tag": manifest.tag, "global_steps": manifest.global_steps}
    ranks = {"world_size": manifest.world_size, "model_parallel": manifest.model_parallel}
    return {**run, "stage": manifest.stage, **ranks}


def _describe_parameter(reader: Reader, parameter: Parameter) -> dict[str, Any]:
    stored = {}
    for kind, pieces in parameter.pieces.items():
        dtype = reader.stored_dtype(parameter, kind)
        stored[kind] = {
            "dtype": str(dtype).removeprefix("torch."),
            "nbytes": parameter.numel * dtype.itemsize,
            "pieces": [piece._asdict() for piece in pieces],
        }
    about = {key: value for key, value in vars(parameter).items() if key != "pieces"}
    return {**about, "shape": list(parameter.shape), "numel": parameter.numel, "stored": stored}


def _inspect(args: argparse.Namespace) -> int:
    try:
        with open_checkpoint(args.dir, args.tag) as reader:
            found = describe(reader)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    nbytes = sum(found["files"].values())
    print(f"{found['path']}: {_run_in_words(found)}")
    print(f"{len(found['files'])} files, {nbytes:,} bytes; state: {', '.join(found['state'])}")
    files = list(found["files"])
    rows = [_row_of(parameter, files) for parameter in found["parameters"]]
    optimizer = found["optimizer"] or "no optimizer"
    print_table(_COLUMNS, rows, right=("elements", "bytes"))
    groups = len(found["param_groups"])
    print(f"{found['numel']:,} elements of parameters; {optimizer} with {groups} param groups")
    sizes = [(str(number), name, f"{size:,}") for number, (name, size) in enumerate(found["files"].items())]
    print_table(("#", "file", "bytes"), sizes, right=("#", "bytes"))
    return 0


def _run_in_words(run: dict[str, Any]) -> str:
    split = f", model-parallel size {run['model_parallel']}" if run["model_parallel"] > 1 else ""
    return f"step {run['global_steps']}, ZeRO stage {run['stage']}, world size {run['world_size']}{split}"


def _row_of(parameter: dict[str, Any], files: Sequence[str]) -> tuple[str, ...]:
    """A parameter's line: its kinds, `weight` and `master` first, and the numbers of the files they lie in."""
    stored = parameter["stored"]
    kinds = [f"{kind} {entry['dtype']}" for kind, entry in stored.items()]
    numbers = sorted({files.index(piece["file"]) for entry in stored.values() for piece in entry["pieces"]})
    notes = ["buffer"] * parameter["buffer"] + ["frozen"] * (not parameter["trainable"] and not parameter["buffer"])
    notes += [f"also {name}" for name in parameter["tied"]]
    notes += [f"{key} {v['$scalar'] if isinstance(v, dict) else v}" for key, v in parameter["scalars"].items()]
    return (
        parameter["name"],
        " x ".join(map(str, parameter["shape"])) or "one value",
        parameter["dtype"],
        f"{parameter['numel']:,}",
        f"{sum(entry['nbytes'] for entry in stored.values()):,}",
        ", ".join(kinds),
        _ranges(numbers),
        ", ".join(notes),
    )


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


# --- what differs -------------------------------------------------------------------------------------------------


def _diff(args: argparse.Namespace) -> int:
    try:
        with ExitStack() as stack:
            a, b = (stack.enter_context(open_checkpoint(folder)) for folder in (args.a, args.b))
            found = list(differences(a, b))
            sides = {"A": _describe_run(a), "B": _describe_run(b)}
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({**sides, "differences": [_as_json(one) for one in found]}, indent=1))
        return int(bool(found))
    for side, run in sides.items():
        print(f"{side}: {run['path']}: {_run_in_words(run)}")
    for section in dict.fromkeys(one.section for one in found):
        rows = [tuple(map(_in_words, one[1:])) for one in found if one.section == section]
        print_table((section, "what", "A", "B", "largest |A - B|"), rows[:_MOST_LINES])
        if len(rows) > _MOST_LINES:
            print(f"and {len(rows) - _MOST_LINES} more (--json lists all)")
    print(f"{len(found)} differences" if found else "the same parameters, optimizer states and run")
    return int(bool(found))


def _as_json(one: Difference) -> dict[str, Any]:
    too_far = one.max_abs is not None and not isfinite(one.max_abs)
    return {**one._asdict(), "max_abs": "inf" if too_far else one.max_abs}


def _in_words(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
