"""Training data: each rank's share of a dataset, in an order that a resumed run can continue exactly.

`build_dataloader` gives a loader that is iterated once per epoch, shuffles anew each epoch without being told, and has
`state_dict` / `load_state_dict`. Its position is counted in samples, over all ranks, of the batches that the training
loop has received; what workers have fetched ahead does not count. So a run may be resumed at another world size or
micro-batch and sees each remaining sample of the epoch once.

The order is that of torch's DistributedSampler: a permutation seeded with seed + epoch, of which rank r of W takes
every W-th sample from the r-th. All ranks get equally many batches of equal sizes: samples from the epoch's
start fill up the last round, or with `drop_last` what does not fill a micro-batch on every rank is left out.
An IterableDataset is shared out in the same way as it runs.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from deepspeedlite.config import DeepSpeedConfig
from deepspeedlite.runtime.device import Device, accelerators
from deepspeedlite.runtime.errors import DataError
from deepspeedlite.runtime.log import log_dist_once


class ResumableDistributedSampler(Sampler[int]):
    """One rank's indices of the current epoch, from the current position on.

    Iterating does not move the position; `advance` does, so that the training loop decides what counts as seen.
    `position` is in samples over all ranks. Raises `DataError` for an empty dataset or impossible ranks.
    """

    def __init__(
        self,
        dataset_len: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        if dataset_len <= 0:
            raise DataError("the dataset is empty: there is nothing to train on")
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} is not one of 0..{world_size - 1} (world size {world_size})")
        if drop_last and dataset_len < world_size:
            raise DataError(
                f"the dataset has {dataset_len} samples for {world_size} ranks and drop_last leaves out what does not "
                "fill every rank, which is all: set dataloader_drop_last to false or use fewer ranks"
            )
        self.dataset_len, self.rank, self.world_size = dataset_len, rank, world_size
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.epoch = 0
        self.position = 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = (
            torch.randperm(self.dataset_len, generator=generator) if self.shuffle else torch.arange(self.dataset_len)
        )
        places = self.position + self.rank + self.world_size * torch.arange(self.samples_left)
        return iter(order[places % self.dataset_len].tolist())

    def __len__(self) -> int:
        """This rank's samples in a whole epoch, wherever the position is."""
        return self._share(self.dataset_len)

    @property
    def samples_left(self) -> int:
        """This rank's samples from the position to the epoch's end."""
        return self._share(self.dataset_len - self.position)

    def advance(self, samples: int) -> None:
        """Count `samples` (over all ranks) as seen; the epoch's last one makes it the next epoch's start."""
        self.position += samples
        if self.samples_left <= 0:
            self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch's start; naming the current epoch changes nothing, so a resumed position is kept."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """The position and what it depends on, JSON-able, the same on all ranks."""
        names = ("epoch", "position", "seed", "shuffle", "dataset_len")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position, at any world size, in the saved order. `DataError` for another dataset."""
        if state["dataset_len"] != self.dataset_len:
            raise DataError(
                f"the saved position is in a dataset of {state['dataset_len']} samples and this one has "
                f"{self.dataset_len}: resume with the same data, or without the data position"
            )
        for name in ("epoch", "position", "seed", "shuffle"):
            setattr(self, name, state[name])
        self.advance(0)

    def _share(self, samples: int) -> int:
        return samples // self.world_size if self.drop_last else math.ceil(samples / self.world_size)


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made: the keyword arguments of `build_dataloader` besides the ranks and the sampler."""

    collate_fn: Callable[[list[Any]], Any] | None = None
    drop_last: bool = False
    num_workers: int = 0
    pin_memory: bool = False  # honoured where there is a GPU to copy to
    shuffle: bool = True
    seed: int = 0
    split_iterable: bool = True  # an IterableDataset, that does not say `splits_itself`, over the ranks

    @classmethod
    def from_config(
        cls, config: DeepSpeedConfig, device: Device, collate_fn: Callable[[list[Any]], Any] | None
    ) -> LoaderOptions:
        """Of the loaders of an engine on `device`."""
        return cls(
            collate_fn=collate_fn,
            drop_last=config.dataloader_drop_last,
            split_iterable=config.dataloader_split_iterable,
            pin_memory=device.is_accelerator,
        )


class _ShareOfStream(IterableDataset[Any]):
    """One rank's part of an iterable dataset that gives all of them the same: of W in a row, the rank-th.

    A worker process has its own copy, whose `__iter__` shares the samples out among the workers as torch's
    `get_worker_info` tells it to; what the worker gets is then shared among the ranks. All ranks get equally many: the
    first samples fill up the last round, or with `drop_last` it is left out.
    """

    def __init__(self, dataset: Iterable[Any], rank: int, world_size: int, drop_last: bool) -> None:
        self.dataset, self.rank, self.world_size, self.drop_last = dataset, rank, world_size, drop_last

    def __iter__(self) -> Iterator[Any]:
        stream = iter(self.dataset)
        first: list[Any] = []
        while True:
            in_a_row = list(itertools.islice(stream, self.world_size))
            first = first or in_a_row
            missing = self.world_size - len(in_a_row)
            if not in_a_row or (missing and self.drop_last):
                return
            yield [*in_a_row, *itertools.islice(itertools.cycle(first), missing)][self.rank]
            if missing:
                return


class DeepSpeedDataLoader:
    """Micro-batches of one rank; one `for` loop over it is one epoch. Made by `build_dataloader`.

    A loop that is left early ends its epoch: the next loop starts the next one. A loop after `load_state_dict` first
    finishes the saved epoch, and never is empty. `len` is the number of batches in a whole epoch.
    """

    def __init__(
        self,
        dataset: Any,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        options: LoaderOptions | None = None,
        sampler: Iterable[int] | None = None,
    ) -> None:
        options = options or LoaderOptions()
        if isinstance(micro_batch_size, bool) or not isinstance(micro_batch_size, int) or micro_batch_size < 1:
            raise DataError(f"the micro-batch size must be a whole number of at least 1, got {micro_batch_size!r}")
        self.dataset, self.batch_size, self.options = dataset, micro_batch_size, options
        self.rank, self.world_size = rank, world_size
        self.data_sampler = _sampler_for(dataset, rank, world_size, options) if sampler is None else sampler
        own = isinstance(self.data_sampler, ResumableDistributedSampler)
        self._splits = self.data_sampler is None and world_size > 1 and _is_to_be_split(dataset, options)
        self._position: _Position = _SamplePosition(self) if own else _BatchPosition(self)
        self._running: object | None = None  # the latest loop over this loader, while it has batches left
        self._running_epoch = 0
        if own and len(self) == 0:
            raise DataError(
                f"dataloader_drop_last leaves no batch: {len(dataset)} samples do not fill a micro-batch of "
                f"{micro_batch_size} on each of {world_size} ranks: lower it, or set dataloader_drop_last to false"
            )

    def __len__(self) -> int:
        """Batches in a whole epoch; `TypeError` where the dataset or the sampler given has no length."""
        if self.data_sampler is not None:
            return self._batches(len(self.data_sampler))  # type: ignore[arg-type]
        samples: int = len(self.dataset)
        if self._splits:
            samples = samples // self.world_size if self.options.drop_last else math.ceil(samples / self.world_size)
        return self._batches(samples)

    def __iter__(self) -> Iterator[Any]:
        this_loop = object()
        if self._running is not None and self._position.epoch == self._running_epoch:
            self._position.next_epoch()
        self._running = None
        first = True
        for batch, is_last, samples in self._position.start():
            if first:
                self._running, self._running_epoch, first = this_loop, self._position.epoch, False
            if self._running is this_loop:
                self._position.count(samples)
                if is_last:
                    self._running = None
                    self._position.next_epoch()
            yield batch
        if self._running is this_loop or first:
            self._running = None
            self._position.next_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The position, counting every batch that a loop has received; JSON-able."""
        return self._position.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position: the next loop gives the batches that were not yet received."""
        self._running = None
        self._position.load_state_dict(state)

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch's start by hand; not needed for shuffling, and no change within that epoch."""
        if epoch != self._position.epoch:
            self._running = None
            self._position.set_epoch(epoch)

    def _batches(self, samples: int) -> int:
        return samples // self.batch_size if self.options.drop_last else math.ceil(samples / self.batch_size)

    def _torch_loader(self, sampler: Iterable[int] | None, epoch: int) -> Iterator[Any]:
        """A pass over torch's DataLoader; its workers' random numbers follow from seed, epoch and rank."""
        options = self.options
        mixed = (options.seed * 1_000_003 + epoch) * 65_537 + self.rank
        generator = torch.Generator().manual_seed(mixed % 2**63)
        dataset = self.dataset
        if self._splits:
            dataset = _ShareOfStream(dataset, self.rank, self.world_size, options.drop_last)
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=options.collate_fn,
            drop_last=options.drop_last,
            num_workers=options.num_workers,
            pin_memory=options.pin_memory and accelerators().is_accelerator,
            generator=generator,
        )
        return iter(loader)


class _Position:
    """How far a loader is, and how it goes on from there. `start` yields (batch, whether it is the last, samples)."""

    epoch: int

    def start(self) -> Iterator[tuple[Any, bool, int]]:
        raise NotImplementedError

    def count(self, samples: int) -> None:
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        raise NotImplementedError

    def next_epoch(self) -> None:
        self.set_epoch(self.epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError


class _SamplePosition(_Position):
    """Counted in samples by our own sampler, which can start anywhere."""

    def __init__(self, loader: DeepSpeedDataLoader) -> None:
        self.loader = loader
        self.sampler: ResumableDistributedSampler = loader.data_sampler  # type: ignore[assignment]

    @property
    def epoch(self) -> int:  # type: ignore[override]
        return self.sampler.epoch

    def start(self) -> Iterator[tuple[Any, bool, int]]:
        if self.loader._batches(self.sampler.samples_left) == 0:
            self.next_epoch()  # the saved epoch's rest does not fill a batch
        left, micro = self.sampler.samples_left, self.loader.batch_size
        count = self.loader._batches(left)
        for index, batch in enumerate(self.loader._torch_loader(self.sampler, self.epoch)):
            yield batch, index == count - 1, min(micro, left - index * micro) * self.sampler.world_size

    def count(self, samples: int) -> None:
        # Not `advance`: an epoch ends with the loader's last batch, and drop_last may leave samples behind it.
        self.sampler.position += samples

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "position" not in state:
            raise DataError("the saved data position is of a run with an IterableDataset or a sampler of its own")
        self.sampler.load_state_dict(state)


class _BatchPosition(_Position):
    """Counted in batches of this rank, for an IterableDataset or a sampler that was given: resuming skips them."""

    def __init__(self, loader: DeepSpeedDataLoader) -> None:
        self.loader = loader
        self.epoch = 0
        self.batches = 0

    def start(self) -> Iterator[tuple[Any, bool, int]]:
        loader, skip = self.loader, self.batches
        for holder in (loader.data_sampler, loader.dataset):
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(self.epoch)  # type: ignore[union-attr]
        if loader.data_sampler is not None:
            rest = _Skipping(loader.data_sampler, skip * loader.batch_size)
            passing: Iterator[Any] = loader._torch_loader(rest, self.epoch)
        else:
            passing = itertools.islice(loader._torch_loader(None, self.epoch), skip, None)
        found = False
        for batch in passing:
            found = True
            yield batch, False, 0
        if skip and not found:  # saved after the epoch's last batch, before its end was known
            self.next_epoch()
            yield from self.start()

    def count(self, samples: int) -> None:
        self.batches += 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.batches = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        shape = {"batch_size": self.loader.batch_size, "world_size": self.loader.world_size}
        return {"epoch": self.epoch, "batches": self.batches, **shape}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "batches" not in state:
            raise DataError("the saved data position is of a run whose dataset had a length and no sampler of its own")
        for name, now in (("batch_size", self.loader.batch_size), ("world_size", self.loader.world_size)):
            if state[name] != now and state["batches"]:
                raise DataError(
                    f"the saved data position was at {name} {state[name]} and this run has {now}: with an "
                    "IterableDataset or a sampler of your own, resume with the same, or without the data position"
                )
        self.epoch, self.batches = state["epoch"], state["batches"]


class _Skipping(Sampler[int]):
    """The indices of another sampler without the first few."""

    def __init__(self, inner: Iterable[int], skip: int) -> None:
        self.inner, self.skip = inner, skip

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(iter(self.inner), self.skip, None)


def build_dataloader(
    dataset: Any,
    micro_batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    sampler: Iterable[int] | None = None,
    **options: Any,
) -> DeepSpeedDataLoader:
    """A loader of this rank's micro-batches of `micro_batch_size` samples.

    `options` are the fields of `LoaderOptions`. A `sampler` gives this rank's indices itself. An IterableDataset gives
    every rank the same samples in the same order and is shared out over them, unless `split_iterable` is false or its
    attribute `splits_itself` is true: then it does that itself, and gives equally many to each.
    Both have `set_epoch(epoch)` called each epoch where they have it, and resume only with the same micro-batch
    and world size. Raises `DataError` for data without samples or that is no dataset, and for sizes that leave none.
    """
    return DeepSpeedDataLoader(dataset, micro_batch_size, rank, world_size, LoaderOptions(**options), sampler)


class RepeatingLoader:
    """A loader without end: when a pass is over the next one begins, in a new order where the loader makes one.

    Wraps any iterable that can be iterated again; a torch DistributedSampler in it is told each new epoch.
    `len` is one pass. With a loader that saves its position (`build_dataloader`) this one does too.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._iterator: Iterator[Any] | None = None
        self._passes = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The next batch. Raises `DataError` if a whole pass gives none."""
        for _ in range(2):
            if self._iterator is None:
                self._iterator = self._next_pass()
            try:
                return next(self._iterator)
            except StopIteration:
                self._iterator = None
        raise DataError("RepeatingLoader: the loader gives no batches (an iterator that is used up cannot be repeated)")

    def __len__(self) -> int:
        return len(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped loader's position."""
        state: dict[str, Any] = self._resumable().state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position."""
        self._resumable().load_state_dict(state)
        self._iterator = None

    def _next_pass(self) -> Iterator[Any]:
        sampler = getattr(self.loader, "sampler", None)
        if self._passes and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(getattr(sampler, "epoch", self._passes - 1) + 1)  # type: ignore[union-attr]
        self._passes += 1
        return iter(self.loader)

    def _resumable(self) -> Any:
        if not hasattr(self.loader, "state_dict"):
            raise DataError(
                f"RepeatingLoader: a {type(self.loader).__name__} cannot save its position: wrap a loader made by "
                "deepspeedlite (training_data=... or build_dataloader)"
            )
        return self.loader


def _is_to_be_split(dataset: Any, options: LoaderOptions) -> bool:
    """Whether all ranks are given the same samples, as far as can be known."""
    # Hugging Face's split_dataset_by_node leaves `_distributed` behind.
    itself = getattr(dataset, "splits_itself", False) or getattr(dataset, "_distributed", None) is not None
    if itself or not options.split_iterable:
        return False
    log_dist_once(
        f"each rank takes its part of the {type(dataset).__name__}, one sample in as many as there are ranks; if the "
        "dataset shares its samples out by rank itself, set dataloader_split_iterable to false",
        level=logging.WARNING,
    )
    return True


def _sampler_for(
    dataset: Any, rank: int, world_size: int, options: LoaderOptions
) -> ResumableDistributedSampler | None:
    """Our sampler for a dataset with a length, None for an IterableDataset, `DataError` for anything else."""
    if isinstance(dataset, IterableDataset):
        return None
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise DataError(
            f"training data must be a dataset with a length and indexing, or a torch IterableDataset; got a "
            f"{type(dataset).__name__}" + (": pass loader.dataset" if isinstance(dataset, DataLoader) else "")
        )
    return ResumableDistributedSampler(len(dataset), rank, world_size, options.seed, options.shuffle, options.drop_last)
