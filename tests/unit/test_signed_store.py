"""The store over torch's that believes only what is signed, and objects that travel as JSON."""

from __future__ import annotations

import math
import pickle
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from deepspeedlite.comm.guard import objects
from deepspeedlite.comm.guard.signed_store import SignedStore, for_backend
from deepspeedlite.runtime.errors import DistributedError

SHORT = timedelta(seconds=0.3)
KEPT: list[SignedStore] = []  # a prefix over one holds on to its C++ part alone; the library's registry keeps its own


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=SHORT)


def client(server: dist.TCPStore, secret: str = "secret") -> SignedStore:
    KEPT.append(SignedStore(dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False, timeout=SHORT), secret))
    return KEPT[-1]


def test_it_is_a_store_as_torch_calls_it(server: dist.TCPStore) -> None:
    """From C++, through a prefix, and by Python."""
    one, other = dist.PrefixStore("part", client(server)), dist.PrefixStore("part", client(server))
    one.set("text", "value")
    one.set("bytes", b"\xff\0")
    assert other.get("text") == b"value" and other.get("bytes") == b"\xff\0"
    assert [one.add("count", 2), other.add("count", 3), other.get("count")] == [2, 5, b"5"]
    assert one.compare_set("once", "", "1") == b"1" and other.compare_set("once", "", "2") == b"1"
    assert other.compare_set("once", "1", "2") == b"2" and one.compare_set("once", "1", "3") == b"2"
    one.multi_set(["a", "b"], ["1", "2"])
    one.append("a", "x")
    assert other.multi_get(["a", "b"]) == [b"1x", b"2"]
    assert other.check(["a", "b"]) and not other.check(["a", "c"])
    assert one.delete_key("a") and not one.delete_key("a") and not other.check(["a"])
    assert client(server).num_keys() > 3 and one.has_extended_api()
    copy = one.clone()
    copy.set("by a copy", "1")
    other.wait(["by a copy"], SHORT)
    with pytest.raises(dist.DistStoreError):
        other.wait(["never"], SHORT)


def test_counters_are_right_however_many_add_at_once(server: dist.TCPStore) -> None:
    """Two that write the same value know which of them did."""
    counts: list[int] = []
    wins: list[bool] = []

    def work(name: str) -> None:
        mine = client(server)
        for turn in range(60):
            counts.append(mine.add("count", 1))
            wins.append(mine.compare_set(f"won {turn}", "", name) == name.encode())
            mine.append("text", "x")

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counts) == list(range(1, 181)) and sum(wins) == 60 and client(server).get("text") == b"x" * 180


def test_what_is_not_signed_is_not_there(server: dist.TCPStore, caplog: pytest.LogCaptureFixture) -> None:
    """It is waited past and written over; a value of another key, or of another job, is no better."""
    mine = client(server)
    mine.set("key", "value")
    mine.set("other", "of another key")
    names = {key: mine._name(key) for key in ("key", "other", "count", "once")}
    assert set(server.list_keys()) >= {names["key"]} and not any("key" in name for name in server.list_keys())
    foreign = client(server, "of another job")
    for forged in (b"", b"value", server.get(names["other"]), foreign._signed("key", "value")):
        server.set(names["key"], forged)
        with pytest.raises(dist.DistStoreError, match="not signed"):
            mine.get("key")
    server.set(names["count"], "100")
    server.set(names["once"], "stolen")
    assert mine.add("count", 1) == 1 and mine.compare_set("once", "", "mine") == b"mine"

    def write() -> None:
        client(server).set("key", "again")

    timer = threading.Timer(0.1, write)
    timer.start()
    assert mine.get("key") == b"again"
    timer.join()


def test_nccl_gets_a_part_whose_name_only_ranks_know(server: dist.TCPStore) -> None:
    """Torch's own store there, the same on all ranks; gloo gets the signed one."""
    part = dist.PrefixStore("start", client(server))
    assert for_backend(part, "gloo") is part
    one, other = for_backend(part, "nccl"), for_backend(dist.PrefixStore("start", client(server)), "cuda:nccl")
    one.set("id", "1")
    assert other.get("id") == b"1" and not any("nccl" in name.lower() for name in server.list_keys())


@dataclass(frozen=True)
class Record:
    name: str
    pieces: list[Pair]


class Pair(NamedTuple):
    first: int
    second: torch.Tensor


def test_objects_travel_as_they_were() -> None:
    plain = {"a": (1, -2.5, None, True), 3: [b"\0x", {1, 2}, "ü", torch.bfloat16], (1, "k"): math.inf}
    assert objects.from_bytes(objects.to_bytes(plain)) == plain
    tensors = [torch.arange(5), torch.tensor(1.5, dtype=torch.bfloat16), torch.empty(0, 3), torch.ones(2, 3).t()]
    for sent, got in zip(tensors, objects.from_bytes(objects.to_bytes(tensors))):
        assert got.dtype == sent.dtype and torch.equal(got, sent)
    record = Record("r", [Pair(1, torch.ones(1))])
    got = objects.from_bytes(objects.to_bytes(record), [Record, Pair])
    assert got.name == "r" and got.pieces[0].first == 1 and torch.equal(got.pieces[0].second, torch.ones(1))


def test_nothing_else_is_made_of_what_is_received() -> None:
    with pytest.raises(DistributedError, match="KeyError"):
        objects.from_bytes(objects.to_bytes(Record("r", [])))
    with pytest.raises(DistributedError, match="object is not sent"):
        objects.to_bytes([object()])
    whole = objects.to_bytes([1, torch.ones(3)])
    for wrong in (pickle.dumps(1), b"", whole[:20], whole[:-1], b"\x05" + bytes(7) + b"[[]]]"):
        with pytest.raises(DistributedError, match="no object of ours"):
            objects.from_bytes(wrong)
