"""Which rank is blamed when one was killed: not the one whose peer has gone, whatever it says and however late."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from paths import HELPERS

from deepspeedlite.launcher.report import CONSEQUENCES, Quiet, RankEnd, first_failure, last_words

# What a rank says in each call when the other was killed: [[shared memory, victim, call, traceback], ...]
EACH_CALL = """
import json, os, signal, sys, tempfile, traceback
from datetime import timedelta
import torch, torch.distributed as dist
import deepspeedlite.transports.gloo
from deepspeedlite.checkpoint.coordination import Ranks
from deepspeedlite.comm import Group, desync
desync._OTHERS_SPEAK_S = 0.05

def calls(group, ranks):
    two, four = torch.ones(2), torch.ones(4)
    return {
        "all_reduce": lambda: group.all_reduce(four),
        "broadcast": lambda: group.broadcast(four, src=1 - group.rank),
        "all_gather_into": lambda: group.all_gather_into(four, two),
        "reduce_scatter_into": lambda: group.reduce_scatter_into(two, four),
        "barrier": group.barrier,
        "all_gather_objects": lambda: group.all_gather_objects("text"),
        "broadcast_object": lambda: group.broadcast_object("text", src=1 - group.rank),
        "gather_objects": lambda: group.gather_objects("text", dst=group.rank),
        "a step of a save": lambda: ranks.each("saving checkpoint t to f", lambda: None),
        "a step of a load": lambda: ranks.first("loading checkpoint f", lambda: "found"),
    }

def rank(number, victim, call, store, shared):
    os.environ["DEEPSPEEDLITE_SHARED_MEMORY"] = shared
    file = dist.FileStore(store, 2)
    dist.init_process_group("gloo", store=file, rank=number, world_size=2, timeout=timedelta(seconds=20))
    group, ranks = Group(), Ranks()
    ranks.meet("save_checkpoint")
    group.all_reduce(torch.ones(1))
    if number == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(100):
        calls(group, ranks)[call]()

said = []
names = list(calls(Group.alone(), None))
for shared, tried in (("1", names[:5]), ("0", names)):
    for index, call in enumerate(tried):
        store, children, victim = tempfile.mktemp(dir=sys.argv[1]), [], index % 2
        read, write = os.pipe()
        for number in range(2):
            children.append(os.fork())
            if not children[-1]:
                try:
                    rank(number, victim, call, store, shared)
                    os.write(write, b"it noticed nothing")
                except BaseException:
                    os.write(write, traceback.format_exc().encode())
                finally:
                    os._exit(1)
        os.close(write)
        text = b"".join(iter(lambda: os.read(read, 1 << 16), b"")).decode()
        os.close(read)
        for child in children:
            os.waitpid(child, 0)
        said.append([shared, victim, call, text])
print(json.dumps(said))
"""


def test_what_a_rank_says_in_each_call_is_a_consequence(tmp_path: Path) -> None:
    done = forked.run(EACH_CALL, tmp_path, folder=tmp_path, timeout_s=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert len(said) == 15
    for shared, victim, call, text in said:
        killed = RankEnd(victim, -9, exited_s=9.0, stderr="the last line of a log\n")
        other = RankEnd(1 - victim, 1, exited_s=1.0, traceback_s=0.5, stderr=text)
        assert first_failure([other, killed]) is killed, (shared, call, text)


@pytest.mark.parametrize(
    ("whose", "text"),
    [
        ("torch's store", "torch.distributed.DistNetworkError: failed to recv, got 0 bytes"),
        (
            "gloo",
            "RuntimeError: [gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:3: Connection reset by peer",
        ),
        ("gloo", "RuntimeError: Timed out waiting 1800000ms for recv operation to complete"),
        ("NCCL", "torch.distributed.DistBackendError: NCCL error: ncclRemoteError: a peer has gone"),
        ("transports", "ConnectionError: rank 0 has ended"),
        ("saves and loads", "CheckpointError: ranks [0] did not call it (of these, [0] have ended); take the call out"),
        (
            "saves and loads",
            "CheckpointError: saving failed: rank 0: ended before it was done, or did not answer",
        ),
        ("the start", "DistributedError: rank 1 of 2 lost the connection to rank 0's store while waiting"),
    ],
)
def test_the_table_of_consequences(whose: str, text: str) -> None:
    assert re.search(CONSEQUENCES[whose], text, re.IGNORECASE)
    trace = f'Traceback (most recent call last):\n  File "train.py", line 1, in <module>\n{text}\n'
    early, late = RankEnd(1, 1, 1.0, 0.5, trace), RankEnd(0, 1, 3.0, 2.9, trace.replace(text, "KeyError: 'true'"))
    assert early.lost_peer and first_failure([early, late]) is late
    assert first_failure([early, RankEnd(2, -6, 0.1, None, f"terminate called\n{text}\n"), late]) is late
    assert not RankEnd(0, -9, 1.0, None, f"{text}\n").lost_peer, "who was killed needs no other reason"


def test_socket_warnings_of_torch_are_left_out_and_no_line_else() -> None:
    warning = (
        b"[rank1]:[W1130 15:00:33.864908844 TCPStore.cpp:106] [c10d] sendBytes failed on SocketImpl(): Broken pipe\n"
        b"Exception raised from sendBytes at /__w/torch/csrc/distributed/c10d/Utils.hpp:758 (most recent call first):\n"
        b"frame #0: c10::Error::Error() + 0x9d (0x7f1e7bd95b8d in libc10.so)\n<omitting python frames>\n"
        b"frame #15: <unknown function> + 0x64b425 (0x7f1e7aa4b425 in libtorch_python.so)\n\n"
    )
    lines = b"a line\n[W1130 15:00:33.1 Module.cpp:1] Warning: another\nframe #0 of a film\n"
    quiet = Quiet()
    assert quiet(lines + warning) + quiet(b"frame #16: more\n") + quiet(lines) == lines + lines
    assert last_words((lines + warning).decode()) == lines.decode().rstrip()


@pytest.mark.slow
def test_a_rank_killed_while_it_saves_is_blamed(tmp_path: Path) -> None:
    """At random moments of saves and loads; `killed_runs.py FOLDER 50 0` for more of them."""
    command = [sys.executable, HELPERS / "killed_runs.py", tmp_path, "4", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    runs = [line.split() for line in done.stdout.splitlines()]
    assert runs == [["0", "137", "0", "0"], ["1", "137", "1", "0"]] * 2, done.stdout + done.stderr
