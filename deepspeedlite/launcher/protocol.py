"""The line between the launcher and a node's agent: frames both ways, over ssh's pipes or a TCP connection.

    MAGIC                once, from each side; what a login shell prints before it is skipped
    4 bytes, big-endian  the length of what follows
    1 byte               the kind
    JSON                 the value; for OUTPUT: 1 byte stream, 1 byte whether it is live, then the bytes as they are

A link never blocks: what the other side does not take now is written at a later turn of the loop. Who writes much sends
no more than a window that has not been acknowledged (`Surface.is_full`).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable
from typing import Any

from deepspeedlite.launcher.loop import Loop

KEY = "DSL_LAUNCHER_KEY"  # the variable of the key by which agents and launcher know each other
MAGIC = b"\0deepspeedlite-launcher-1\n"
# From the launcher: CHALLENGE nonce, WELCOME proof, ASK {options | port | reach}, JOB, ACK bytes, BEAT time, SIGNAL,
# END [signal, grace] of the ranks, CLOSE status of all.
# From the agent: HELLO {names, nonce, proof}, TELL, ERROR text, OUTPUT, BEAT [its time, ours], SIGNAL that it got
# itself, and what the ranks do: RAISED, ENDED, CLOSED (report.py).
CHALLENGE, HELLO, WELCOME, ASK, TELL, JOB, ERROR = b"C", b"H", b"W", b"A", b"T", b"J", b"E"
OUTPUT, ACK, BEAT, SIGNAL, END, CLOSE = b"O", b"K", b"B", b"S", b"X", b"L"
BEAT_S = 1.0
SILENCE_S = 5.0  # after so long without a word the other side is taken for lost
_MOST_BYTES = 64 << 20  # of a frame: what claims more is not one of ours
_PIECE_BYTES = 1 << 16


class Link:
    """One end, over two descriptors or a socket's one.

    Args:
        hear: called with this link when something has come, or nothing will any more; it calls `receive`.
    """

    def __init__(self, loop: Loop, hear: Callable[[Link], None], read_fd: int, write_fd: int = -1) -> None:
        # A socket's descriptor is doubled, for a selector to know reading and writing apart.
        self._read_fd, self._write_fd = read_fd, os.dup(read_fd) if write_fd < 0 else write_fd
        for fd in (self._read_fd, self._write_fd):
            os.set_blocking(fd, False)
        self.closed = False
        self.heard_s = time.monotonic()  # when the other side last said anything
        self._loop = loop
        self._outgoing = bytearray(MAGIC)
        self._incoming = b""
        self._has_magic = False  # until then what comes is a login shell's
        loop.serve(self)
        loop.watch(read_fd, lambda: hear(self))
        self.flush()

    @property
    def waits_for(self) -> int | None:
        """The descriptor that must take something first."""
        return self._write_fd if self._outgoing and not self.closed else None

    def send(self, kind: bytes, value: Any = None, raw: bytes | None = None) -> None:
        """Queue a frame and write what the other side takes at once."""
        body = kind + (json.dumps(value).encode() if raw is None else raw)
        self._outgoing += len(body).to_bytes(4, "big") + body
        self.flush()

    def flush(self) -> None:
        """Write what can be written now."""
        try:
            while self._outgoing and not self.closed:
                del self._outgoing[: os.write(self._write_fd, self._outgoing[:_PIECE_BYTES])]
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True

    def receive(self) -> list[tuple[bytes, Any]]:
        """The frames that have come; sets `closed` when there will be no more."""
        try:
            while not self.closed:
                data = os.read(self._read_fd, 1 << 18)
                self.closed = not data
                self._incoming += data
                self.heard_s = time.monotonic()
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        frames: list[tuple[bytes, Any]] = []
        try:
            while (frame := self._next_frame()) is not None:
                kind, body = frame[:1], frame[1:]
                frames.append((kind, body if kind == OUTPUT else json.loads(body)))
        except ValueError:  # it is none of ours
            self.closed = True
        if self.closed:
            self._loop.forget(self._read_fd)
        return frames

    def _next_frame(self) -> bytes | None:
        if not self._has_magic:
            noise, found, rest = self._incoming.partition(MAGIC)
            self._has_magic = bool(found)
            if not self._has_magic and len(noise) > 1 << 20:
                raise ValueError
            self._incoming = rest if self._has_magic else noise
        nbytes = int.from_bytes(self._incoming[:4], "big")
        if not self._has_magic or len(self._incoming) < 4:
            return None
        if not 0 < nbytes <= _MOST_BYTES:
            raise ValueError
        if len(self._incoming) < 4 + nbytes:
            return None
        frame, self._incoming = self._incoming[4 : 4 + nbytes], self._incoming[4 + nbytes :]
        return frame

    def close(self) -> None:
        """Close both descriptors."""
        self.closed = True
        self._loop.forget(self._read_fd)
        self._loop.dismiss(self)
        for fd in (self._read_fd, self._write_fd):
            with contextlib.suppress(OSError):
                os.close(fd)


def new_secret() -> str:
    """A key or a nonce."""
    return secrets.token_hex(16)


def proof(key: str, nonce: str, who: str) -> str:
    """What shows that the sender knows the key, which itself never travels."""
    import hmac  # hashlib costs milliseconds that a start on one machine need not pay

    return hmac.new(key.encode(), f"{who}:{nonce}".encode(), "sha256").hexdigest()
