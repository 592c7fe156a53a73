"""A rank whose script is over ends well, whatever its threads are in the middle of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deepspeedlite.metrics import stall_watch

STOPPED_S = 2.0
# Rank 1 asks rank 0's store where others are, again and again. Rank 0 is stopped, so that one such question is on its
# way when rank 1's script ends, and goes on while its interpreter is finalised, for which an object takes its time.
SCRIPT = f"""
import os, signal, subprocess, sys, time
import torch.distributed as dist
import deepspeedlite
from deepspeedlite import comm

deepspeedlite.init_distributed(verbose=False)
from deepspeedlite.metrics.stall_watch import watch_for_stalls
watch_for_stalls()
comm.barrier()
host = [os.getpid()]
dist.broadcast_object_list(host, src=0)
if os.environ["RANK"] == "0":
    time.sleep(30)
time.sleep(0.5)
os.kill(host[0], signal.SIGSTOP)
subprocess.Popen(["sh", "-c", "sleep {STOPPED_S}; kill -CONT " + str(host[0])])
time.sleep(0.5)
if {{destroys}}:
    dist.destroy_process_group()

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep({2 * STOPPED_S})

sys.modules["ends late"] = last = type(sys)("ends late")
last.held = Slow()
del last
"""


@pytest.mark.slow
@pytest.mark.parametrize("destroys", [False, True])
def test_a_question_to_the_store_that_is_answered_at_the_interpreter_s_end(destroys, free_port, tmp_path):
    script = Path(tmp_path, "script.py")
    script.write_text(SCRIPT.format(destroys=destroys))
    around = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    base = os.environ | around | {stall_watch.VARIABLE: "0.3"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, said = ranks[1].communicate(timeout=90)
        assert ranks[1].returncode == 0, said
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGCONT)
            rank.kill()
            rank.communicate()
