"""`save_checkpoint` in DeepSpeed's own layout: `"checkpoint": {"format": "deepspeed"}`.

Every rank writes the files that it would write under DeepSpeed, of what it and the others hold in memory; a tag
appears by one rename, and one of the same name is exchanged for it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepspeedlite.checkpoint.coordination import Ranks
from deepspeedlite.checkpoint.files import check_folder, kind_of
from deepspeedlite.checkpoint.foreign import Formats
from deepspeedlite.checkpoint.formats.deepspeed.exchange import exchange
from deepspeedlite.checkpoint.formats.deepspeed.layout import model_file, optimizer_file
from deepspeedlite.checkpoint.formats.deepspeed.live import Described, Holding, LiveReader, Told, describe
from deepspeedlite.checkpoint.formats.deepspeed.pickles import save_for_deepspeed
from deepspeedlite.checkpoint.formats.deepspeed.reader import RESERVED
from deepspeedlite.checkpoint.formats.deepspeed.writer import Files
from deepspeedlite.checkpoint.manifest import Manifest
from deepspeedlite.checkpoint.save import Saver
from deepspeedlite.checkpoint.tag import check_new_tag, in_words, is_ours, read_latest
from deepspeedlite.checkpoint.tensors import TensorInfo
from deepspeedlite.checkpoint.train_state import TrainState
from deepspeedlite.checkpoint.writer import TagWriter, survey
from deepspeedlite.config.sections.storage import Checkpoint
from deepspeedlite.ops.whole_tensors import WholeTensors
from deepspeedlite.runtime.errors import CheckpointError, ConfigError, UnsupportedError
from deepspeedlite.runtime.log import logger

_KEY = "checkpoint.format: deepspeed"
_OF_DEEPSPEED = re.compile(r"(bf16_|fp16_)?(zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt")
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2
_HERE = -100  # AT_FDCWD


class DeepSpeedSaver(Saver):
    """Saves the states of one engine as DeepSpeed does.

    Raises:
        ConfigError: the section has keys that do not go with this layout.
    """

    records = (*Saver.records, Told, TensorInfo, Described, Manifest)

    def __init__(self, settings: Checkpoint, ranks: Ranks, formats: Formats) -> None:
        if settings.async_save or settings.keep_last is not None:
            key = "async_save" if settings.async_save else "keep_last"
            why = "the ranks exchange what they write" if key == "async_save" else "no manifest says what may go"
            raise ConfigError(f"checkpoint.{key} does not go with {_KEY}, where {why}; leave one of the two out")
        # DeepSpeed's checkpoints are this job's own here, and give way to newer ones of the same name.
        super().__init__(settings, ranks, replace(formats, readers=()))

    def check(self, state: TrainState) -> None:
        """Refuse what DeepSpeed's layout cannot hold, or is not written here, before hours of training.

        Raises:
            UnsupportedError: saying what.
        """
        why = ""
        if state.replica.parts > 1 or state.replica.group.size > 1:
            why = "with a model that is spread over ranks (tensor or pipeline parallelism)"
        elif state.optimizer is None:
            why = "without an optimizer"
        elif isinstance(state.optimizer.optimizer, WholeTensors):
            why = f"with {type(state.optimizer.optimizer).__name__}, whose states are not one value per element"
        elif len(dtypes := {unit.flat.dtype for unit in state.reducer.units}) > 1:
            why = f"with weights of several dtypes ({', '.join(sorted(map(str, dtypes)))})"
        if why:
            raise UnsupportedError(f"{_KEY} is not in this release {why}: leave the key out, for our own layout")

    def save(
        self,
        state: TrainState,
        save_dir: str | Path,
        tag: Any = None,
        save_latest: bool = True,
        exclude_frozen: bool = False,
    ) -> None:
        """See `Saver.save`."""
        ranks = self._ranks
        ranks.meet("save_checkpoint", self.records)

        def tell() -> str:
            self.check(state)
            if taken := sorted(RESERVED & state.client_state.keys()):
                raise CheckpointError(f"client_state has {', '.join(taken)}, which DeepSpeed keeps for itself")
            check_folder(save_dir, "save_checkpoint")
            return check_new_tag(f"global_step{state.counters['global_steps']}" if tag is None else tag, self._formats)

        def decide() -> tuple[str, str]:
            name = self._one_of(tags)
            survey(Path(save_dir), name, self._formats)
            _check_replaceable(Path(save_dir) / name)
            return name, secrets.token_hex(8)

        tags = ranks.each("save_checkpoint", tell)
        name, number = ranks.first("save_checkpoint", decide)
        writer = _FolderWriter(save_dir, name, self._settings.fsync, number, self._formats)
        what = f"saving checkpoint {name} to {save_dir}"
        try:
            ranks.first(what, lambda: self._prepare(writer, state, save_latest))
            self._write(writer, state, exclude_frozen, what)
            ranks.first(what, writer.commit_folder)
        except BaseException:
            if ranks.rank == 0:  # every rank has stopped writing, or was interrupted
                writer.discard()
            raise

    def _prepare(self, writer: _FolderWriter, state: TrainState, save_latest: bool) -> None:
        ranks = range(self._ranks.size)
        names = {name for rank in ranks for bf16 in (True, False) for name in _files_of(rank, state.stage, bf16)}
        leftovers = writer.prepare(sorted(names), save_latest)
        if leftovers:
            logger.warning("removed what interrupted saves had left in %s: %s", writer.save_dir, ", ".join(leftovers))

    def _write(self, writer: _FolderWriter, state: TrainState, exclude_frozen: bool, what: str) -> None:
        """This rank's files: laid out, filled with what the others hold of them, written."""
        ranks, held = self._ranks, []

        def hold() -> Any:
            held.append(Holding(state, ranks.rank, exclude_frozen, writer.tag))
            return held[0].tell()

        told = ranks.each(what, hold)
        described: Described = ranks.first(what, lambda: describe(told, held[0].entries))
        holding: Holding = held[0]
        reader = LiveReader(writer.path, described, holding)
        dtypes = {name: info.dtype for name, info in described.tensors[holding.own.file].items()}

        def lay_out() -> None:
            mine = {name for bf16 in (True, False) for name in _files_of(ranks.rank, state.stage, bf16)}
            files = Files(reader, state.stage, ranks.size).files()
            contents.update({name: content() for name, content in files if name in mine})

        def fetch() -> None:
            if ranks.process_group is not None:
                exchange(ranks.process_group, reader.wanted, holding.read_own, dtypes)

        def write() -> None:
            for name, content in contents.items():
                save_for_deepspeed(content, writer.place(name), self._settings.fsync)

        contents: dict[str, Any] = {}
        for step in (lay_out, fetch, write):
            ranks.each(what, step)


def _files_of(rank: int, stage: int, bf16: bool) -> list[str]:
    """What a rank writes."""
    names = [model_file(rank, stage)] if stage == 3 or rank == 0 else []
    return [*names, optimizer_file(rank, bf16)] if stage > 0 else names


def _check_replaceable(path: Path) -> list[str]:
    """The files of a tag that is to be replaced, which are DeepSpeed's and no others.

    Raises:
        CheckpointError: there are others.
    """
    if kind_of(path) != "a folder":
        return []
    if is_ours(path):
        raise CheckpointError(f"{path} is a checkpoint in our own layout, and {_KEY}; save under another tag")
    names = os.listdir(path)
    others = [name for name in names if not _OF_DEEPSPEED.fullmatch(name) or kind_of(path / name) != "a file"]
    if others:
        raise CheckpointError(
            f"{path} holds what is not of a checkpoint of DeepSpeed's: {in_words(others)}; save under another tag, or "
            "move it"
        )
    return names


class _FolderWriter(TagWriter):
    """A tag that is a folder of files with fixed names, so that it can only be exchanged as a whole."""

    def place(self, name: str) -> Path:
        """Where to write a file."""
        return self._new / name

    def commit_folder(self) -> None:
        """Make the checkpoint appear under its tag; then name it."""
        self._sync(self._new)
        take_back = self._replace()
        try:
            self._name()
        except OSError:
            with suppress(OSError, CheckpointError):
                if not self._record.is_latest or read_latest(self.save_dir) != self.tag:
                    take_back()
            raise
        self.discard()

    def _replace(self) -> Callable[[], None]:
        try:
            os.rename(self._new, self.path)  # where nothing is, or an empty folder
            return lambda: os.rename(self.path, self._new)
        except OSError:
            if not self.path.is_dir() or not os.listdir(self.path):
                raise
        before = _check_replaceable(self.path)
        self._note(files=sorted({*self._record.files, *before}))
        _exchange_folders(self._new, self.path)
        return lambda: _exchange_folders(self._new, self.path)


def _exchange_folders(one: Path, other: Path) -> None:
    """Give each the other's name, both at once.

    Raises:
        CheckpointError: this system or file system cannot.
        OSError: what the system says.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    done = -1 if rename is None else rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)
    if done == 0:
        return
    number = errno.ENOSYS if rename is None else ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL):
        raise CheckpointError(f"{other} is there, and the file system cannot exchange folders; save under another tag")
    raise OSError(number, os.strerror(number), str(other))
