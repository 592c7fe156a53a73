"""Each rank's samples: exact partitions, fresh orders, and resuming anywhere with what was not yet seen."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, get_worker_info

import deepspeedlite
from deepspeedlite.data.loader import (
    DeepSpeedDataLoader,
    RepeatingLoader,
    ResumableDistributedSampler,
    build_dataloader,
)
from deepspeedlite.runtime.errors import DataError

sizes = st.integers(1, 60)
worlds = st.integers(1, 5)
micros = st.integers(1, 7)


def make_loaders(count: int, micro: int, world: int, **options) -> list[DeepSpeedDataLoader]:
    return [build_dataloader(range(count), micro, rank=r, world_size=world, **options) for r in range(world)]


def epoch_of(loader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def flat(batches) -> list[int]:
    return [sample for batch in batches for sample in batch]


@settings(max_examples=150, deadline=None)
@given(count=sizes, world=worlds, micro=micros, drop=st.booleans(), shuffle=st.booleans(), seed=st.integers(0, 5))
def test_an_epoch_is_a_partition(count, world, micro, drop, shuffle, seed):
    if drop and count // world < micro:
        with pytest.raises(DataError, match="drop_last"):
            make_loaders(count, micro, world, drop_last=True)
        return
    loaders = make_loaders(count, micro, world, drop_last=drop, shuffle=shuffle, seed=seed)
    for _ in range(2):
        ranks = [epoch_of(loader) for loader in loaders]
        assert {tuple(map(len, batches)) for batches in ranks} == {tuple(map(len, ranks[0]))}
        assert all(len(loader) == len(ranks[0]) for loader in loaders)
        seen = Counter(flat(flat(ranks)))
        if drop:
            assert set(map(len, ranks[0])) == {micro} and max(seen.values()) == 1
            assert count - len(seen) < micro * world
        else:
            assert set(seen) == set(range(count))
            assert sum(seen.values()) - count < world


@settings(max_examples=100, deadline=None)
@given(count=sizes, world=worlds, seed=st.integers(0, 9), epoch=st.integers(0, 3), shuffle=st.booleans())
def test_the_order_is_torchs(count, world, seed, epoch, shuffle):
    for rank in range(world):
        theirs = DistributedSampler(range(count), world, rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        ours = ResumableDistributedSampler(count, rank, world, seed, shuffle)
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        assert list(ours) == list(theirs)
        assert len(ours) == len(theirs)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), count=sizes, world=worlds, micro=micros, drop=st.booleans())
def test_resumed_at_any_batch_it_goes_on_the_same(data, count, world, micro, drop):
    if drop and count // world < micro:
        return
    straight = make_loaders(count, micro, world, drop_last=drop)
    stop = data.draw(st.integers(0, 2 * len(straight[0])), label="stop")
    for rank, loader in enumerate(straight):
        stream = iter(RepeatingLoader(loader))
        for _ in range(stop):
            next(stream)
        saved = json.loads(json.dumps(loader.state_dict()))
        expected = [next(stream).tolist() for _ in range(2 * len(loader))]
        resumed = make_loaders(count, micro, world, drop_last=drop)[rank]
        resumed.load_state_dict(saved)
        stream = iter(RepeatingLoader(resumed))
        assert [next(stream).tolist() for _ in range(2 * len(loader))] == expected


@settings(max_examples=150, deadline=None)
@given(data=st.data(), count=sizes, worlds=st.tuples(worlds, worlds), micros=st.tuples(micros, micros))
def test_resumed_at_another_world_and_micro_batch_it_sees_the_rest(data, count, worlds, micros):
    before = make_loaders(count, micros[0], worlds[0])
    stop = data.draw(st.integers(1, len(before[0])), label="stop")
    seen: list[int] = []
    for loader in before:
        stream = iter(loader)
        seen += flat(next(stream).tolist() for _ in range(stop))
    states = [loader.state_dict() for loader in before]
    assert all(state == states[0] for state in states)
    after = make_loaders(count, micros[1], worlds[1], seed=99)
    for loader in after:
        loader.load_state_dict(states[0])
    rest = [epoch_of(loader) for loader in after]
    assert {tuple(map(len, batches)) for batches in rest} == {tuple(map(len, rest[0]))} and rest[0]
    if stop == len(before[0]):
        assert states[0]["epoch"] == 1 and set(flat(flat(rest))) == set(range(count))
    else:
        assert len(set(seen)) == len(seen)
        assert set(flat(flat(rest))) >= set(range(count)) - set(seen)
        assert len(flat(flat(rest))) - (count - len(seen)) < worlds[1]


def test_epochs_differ_and_seeds_differ_and_both_repeat():
    loader, same, other = (build_dataloader(range(50), 4, seed=seed) for seed in (1, 1, 2))
    first, second = epoch_of(loader), epoch_of(loader)
    assert first != second and first != epoch_of(other)
    assert [epoch_of(same), epoch_of(same)] == [first, second]
    unshuffled = build_dataloader(range(6), 4, shuffle=False)
    assert epoch_of(unshuffled) == epoch_of(unshuffled) == [[0, 1, 2, 3], [4, 5]]


def test_a_loop_left_early_ends_its_epoch():
    loader, straight = build_dataloader(range(20), 4), build_dataloader(range(20), 4)
    epochs = [epoch_of(straight) for _ in range(4)]
    assert next(iter(loader)).tolist() == epochs[0][0]
    iter(loader)  # nothing taken: no epoch begun
    assert epoch_of(loader) == epochs[1]
    next(iter(loader))
    loader.data_sampler.set_epoch(3)
    assert epoch_of(loader) == epochs[3]
    loader.set_epoch(1)
    assert epoch_of(loader) == epochs[1]


def test_an_abandoned_loop_does_not_move_the_position():
    loader = build_dataloader(range(20), 4)
    old, new = iter(loader), iter(loader)
    next(old)
    next(new)
    state = loader.state_dict()
    assert (state["epoch"], state["position"]) == (1, 4)
    assert len(list(old)) == 4
    assert loader.state_dict() == state


def test_naming_the_current_epoch_keeps_a_resumed_position():
    loader = build_dataloader(range(20), 4)
    stream = iter(loader)
    next(stream)
    resumed = build_dataloader(range(20), 4)
    resumed.load_state_dict(loader.state_dict())
    resumed.data_sampler.set_epoch(0)
    resumed.set_epoch(0)
    assert [b.tolist() for b in stream] == epoch_of(resumed)


def test_a_remainder_too_small_for_a_batch_is_left_out():
    loader = build_dataloader(range(10), 2, drop_last=True)
    stream = iter(loader)
    for _ in range(4):
        next(stream)
    resumed = build_dataloader(range(10), 4, drop_last=True)
    resumed.load_state_dict(loader.state_dict())
    assert [len(batch) for batch in epoch_of(resumed)] == [4, 4]
    assert resumed.state_dict()["epoch"] == 2


def test_the_sampler_alone_begins_the_next_epoch_where_one_ends():
    sampler = ResumableDistributedSampler(10, 1, 2, drop_last=True)
    sampler.advance(8)
    assert sampler.epoch == 0 and len(list(sampler)) == 1 and len(sampler) == 5
    saved = sampler.state_dict()
    wider = ResumableDistributedSampler(10, 3, 4, drop_last=True)
    wider.load_state_dict(saved)  # the two samples left do not fill four ranks
    assert (wider.epoch, wider.position, len(list(wider))) == (1, 0, 2)
    sampler.advance(2)
    assert (sampler.epoch, sampler.position) == (1, 0)


class Noisy(Dataset):
    """Each sample is (index, the worker's random number, the worker)."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[int, float, int]:
        info = torch.utils.data.get_worker_info()
        return index, torch.rand(()).item(), -1 if info is None else info.id


def test_workers_prefetch_without_moving_the_position_and_draw_their_own_numbers():
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    loaders = [build_dataloader(Noisy(), 2, rank=r, world_size=2, num_workers=2) for r in range(2)]
    taken = []
    for loader in loaders:
        stream = iter(loader)
        taken.append(next(stream))
        assert loader.state_dict()["position"] == 4
        taken += list(stream)
    assert torch.equal(before, torch.random.get_rng_state())
    indices, numbers, workers = (torch.cat([batch[i] for batch in taken]).tolist() for i in range(3))
    assert sorted(indices) == list(range(12))
    assert set(workers) == {0, 1}
    assert len(set(numbers)) == 12
    again = [
        batch for rank in range(2) for batch in build_dataloader(Noisy(), 2, rank=rank, world_size=2, num_workers=2)
    ]
    assert torch.cat([batch[1] for batch in again]).tolist() == numbers


def test_collate_and_pinning_on_a_machine_that_may_have_no_gpu(recwarn):
    loader = build_dataloader(range(5), 2, collate_fn=sum, pin_memory=not torch.cuda.is_available(), shuffle=False)
    assert list(loader) == [1, 5, 4]
    assert not recwarn.list


def test_a_dataset_smaller_than_the_world_gives_every_rank_a_sample():
    assert [flat(epoch_of(loader)) for loader in make_loaders(2, 4, 5, shuffle=False)] == [[0], [1], [0], [1], [0]]


class Stream(IterableDataset):
    """Numbers from 100 times the epoch on."""

    epoch = 0

    def __init__(self, count: int) -> None:
        self.count = count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter(range(100 * self.epoch, 100 * self.epoch + self.count))


class Reversed:
    """A user's sampler."""

    def __len__(self) -> int:
        return 7

    def __iter__(self):
        return iter(range(6, -1, -1))


def own_loaders() -> list[DeepSpeedDataLoader]:
    return [build_dataloader(Stream(7), 2), build_dataloader(range(7), 2, sampler=Reversed())]


@pytest.mark.parametrize("kind", [0, 1], ids=["IterableDataset", "sampler"])
@pytest.mark.parametrize("stop", range(9))
def test_data_with_an_order_of_its_own_resumes_by_batches(kind, stop):
    loader = own_loaders()[kind]
    stream = iter(RepeatingLoader(loader))
    for _ in range(stop):
        next(stream)
    saved = json.loads(json.dumps(loader.state_dict()))
    expected = [next(stream).tolist() for _ in range(9)]
    resumed = own_loaders()[kind]
    resumed.load_state_dict(saved)
    stream = iter(RepeatingLoader(resumed))
    assert [next(stream).tolist() for _ in range(9)] == expected


def test_saved_after_the_last_batch_the_next_loop_is_a_whole_epoch():
    for loader, resumed in zip(own_loaders(), own_loaders()):
        stream = iter(loader)
        for _ in range(4):
            next(stream)
        resumed.load_state_dict(loader.state_dict())
        assert len(epoch_of(resumed)) == 4
        assert resumed.state_dict()["epoch"] == 2


def test_data_with_an_order_of_its_own():
    stream, sampled = own_loaders()
    assert [epoch_of(stream), epoch_of(stream)] == [
        [[0, 1], [2, 3], [4, 5], [6]],
        [[100, 101], [102, 103], [104, 105], [106]],
    ]
    assert epoch_of(sampled) == epoch_of(sampled) == [[6, 5], [4, 3], [2, 1], [0]]
    assert len(sampled) == 4
    with pytest.raises(TypeError):
        len(stream)
    next(iter(sampled))
    with pytest.raises(DataError, match="world_size 1 and this run has 2"):
        build_dataloader(range(7), 2, world_size=2, sampler=Reversed()).load_state_dict(sampled.state_dict())
    with pytest.raises(DataError, match="IterableDataset"):
        build_dataloader(range(7), 2).load_state_dict(stream.state_dict())
    with pytest.raises(DataError, match="had a length"):
        stream.load_state_dict(build_dataloader(range(7), 2).state_dict())


class SharedAmongWorkers(Stream):
    """As torch asks of an IterableDataset that is read by several workers."""

    def __iter__(self):
        info = get_worker_info()
        numbers = super().__iter__()
        return numbers if info is None else itertools.islice(numbers, info.id, None, info.num_workers)


def streams(count: int, world: int, dataset=Stream, **options) -> list[list[list[int]]]:
    return [epoch_of(build_dataloader(dataset(count), 2, rank=r, world_size=world, **options)) for r in range(world)]


@settings(max_examples=60, deadline=None)
@given(count=sizes, world=worlds, drop_last=st.booleans())
def test_an_iterable_dataset_is_shared_out_over_the_ranks(count, world, drop_last):
    got = streams(count, world, drop_last=drop_last)
    assert len({tuple(map(len, batches)) for batches in got}) == 1, "equally many batches of equal sizes"
    if drop_last:
        rounds = count // world // 2 * 2
        assert [flat(one) for one in got] == [list(range(r, rounds * world, world)) for r in range(world)]
    else:
        padded = [*range(count), *itertools.islice(itertools.cycle(range(min(count, world))), -count % world)]
        assert [flat(one) for one in got] == [padded[r::world] for r in range(world)]


@pytest.mark.slow
def test_an_iterable_dataset_is_shared_out_over_workers_and_ranks():
    got = streams(24, 2, SharedAmongWorkers, num_workers=2)
    assert sorted(flat(got[0]) + flat(got[1])) == list(range(24))
    assert len(flat(got[0])) == len(flat(got[1])) == 12


def test_an_iterable_dataset_that_shares_itself_out_is_left_alone():
    class Own(Stream):
        splits_itself = True

    class Sized(Stream):
        def __len__(self) -> int:
            return self.count

    assert streams(4, 2, Own) == streams(4, 2, split_iterable=False) == [[[0, 1], [2, 3]]] * 2
    split = Stream(4)
    split._distributed = object()  # as datasets.distributed.split_dataset_by_node leaves it
    assert epoch_of(build_dataloader(split, 2, rank=1, world_size=2)) == [[0, 1], [2, 3]]
    for drop_last, batches in ((False, 3), (True, 2)):
        loader = build_dataloader(Sized(9), 2, rank=1, world_size=2, drop_last=drop_last)
        assert len(loader) == len(epoch_of(loader)) == batches


def test_an_iterable_datasets_part_resumes():
    whole = epoch_of(build_dataloader(Stream(11), 2, rank=1, world_size=2))
    loader = build_dataloader(Stream(11), 2, rank=1, world_size=2)
    stream = iter(loader)
    seen = [next(stream).tolist() for _ in range(2)]
    resumed = build_dataloader(Stream(11), 2, rank=1, world_size=2)
    resumed.load_state_dict(loader.state_dict())
    assert seen + epoch_of(resumed) == whole


@distributed(world_size=2)
def test_an_engine_shares_an_iterable_dataset_out():
    for split, expected in ((True, [0.0, 2.0, 4.0, 6.0]), (False, [float(n) for n in range(8)])):
        config = {"train_micro_batch_size_per_gpu": 2, "dataloader_split_iterable": split}
        *_, loader, _ = deepspeedlite.initialize(model=torch.nn.Linear(1, 1), training_data=Stream(8), config=config)
        assert flat(epoch_of(loader)) == [n + dist.get_rank() * split for n in expected]


def test_repeating_loader_over_torchs_own():
    sampler = DistributedSampler(range(10), 1, 0, seed=3)  # type: ignore[arg-type]
    repeating = RepeatingLoader(DataLoader(range(10), batch_size=5, sampler=sampler))  # type: ignore[arg-type]
    assert len(repeating) == 2
    passes = [flat(next(repeating).tolist() for _ in range(2)) for _ in range(3)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert [next(RepeatingLoader([1, 2])) for _ in range(2)] == [1, 1]
    with pytest.raises(DataError, match="cannot save its position"):
        repeating.state_dict()
    used_up = RepeatingLoader(iter([1]))
    assert next(used_up) == 1
    with pytest.raises(DataError, match="no batches"):
        next(used_up)


def test_repeating_loader_saves_and_loads_the_position():
    repeating = RepeatingLoader(build_dataloader(range(10), 3))
    for _ in range(6):
        next(repeating)
    resumed = RepeatingLoader(build_dataloader(range(10), 3))
    next(resumed)
    resumed.load_state_dict(repeating.state_dict())
    assert [next(resumed).tolist() for _ in range(9)] == [next(repeating).tolist() for _ in range(9)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: build_dataloader([], 2), "empty"),
        (lambda: build_dataloader(iter([1]), 2), "list_iterator"),
        (lambda: build_dataloader(DataLoader([1, 2]), 2), "loader.dataset"),  # type: ignore[arg-type]
        (lambda: build_dataloader(range(4), 0), "micro-batch size"),
        (lambda: build_dataloader(range(4), 1.5), "micro-batch size"),  # type: ignore[arg-type]
        (lambda: build_dataloader(range(4), 1, rank=2, world_size=2), "rank 2"),
        (lambda: build_dataloader(range(4), 5, drop_last=True), "leaves no batch"),
        (lambda: build_dataloader(range(4), 1, world_size=5, drop_last=True), "fewer ranks"),
        (
            lambda: build_dataloader(range(4), 1).load_state_dict(build_dataloader(range(5), 1).state_dict()),
            "5 samples",
        ),
    ],
)
def test_data_that_cannot_be_used(make, words):
    with pytest.raises(DataError, match=words):
        make()
