"""The line between the launcher and a node's agent: frames both ways, over ssh's pipes or a TCP connection.

    MAGIC                once, from each side; what a login shell prints before it is skipped
    4 bytes, big-endian  the length of what follows
    1 byte               the kind
    JSON                 the value; for OUTPUT: 1 byte stream, 1 byte whether it is live, then the bytes as they are

A link never blocks: what the other side does not take now is kept for the next `flush`, which the loop calls. Who
writes much sends no more than a window that has not been acknowledged (`Screen.is_full`).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import threading
import time
from typing import Any

MAGIC = b"\0deepspeedlite-launcher-1\n"
# From the launcher: CHALLENGE {nonce}, WELCOME {proof}, ASK {port | reach}, JOB, ACK bytes, BEAT time, SIGNAL, END.
# From the agent: HELLO {facts, nonce, proof}, TELL, ERROR text, OUTPUT, BEAT [its time, ours], FAILED, DONE.
CHALLENGE, HELLO, WELCOME, ASK, TELL, JOB, ERROR = b"C", b"H", b"W", b"A", b"T", b"J", b"E"
OUTPUT, ACK, BEAT, SIGNAL, END, FAILED, DONE = b"O", b"K", b"B", b"S", b"X", b"F", b"D"
BEAT_S = 1.0
SILENCE_S = 5.0  # after so long without a word the other side is taken for lost
_MOST_BYTES = 64 << 20  # of a frame: what claims more is not one of ours


class Link:
    """One end, over two descriptors or a socket's one. `receive` belongs to one thread; `send` may be called by any."""

    def __init__(self, read_fd: int, write_fd: int = -1) -> None:
        # A socket's descriptor is doubled, for a selector to know reading and writing apart.
        self.read_fd, self.write_fd = read_fd, os.dup(read_fd) if write_fd < 0 else write_fd
        for fd in (self.read_fd, self.write_fd):
            os.set_blocking(fd, False)
        self.closed = False
        self.heard_s = time.monotonic()  # when the other side last said anything
        self._lock = threading.Lock()  # of `_outgoing`: the launcher's printing thread acknowledges by itself
        self._outgoing = bytearray(MAGIC)
        self._incoming = b""
        self._has_magic = False  # until then what comes is a login shell's
        self._held: list[tuple[bytes, Any]] = []  # frames that `expect` was not asked for
        self.flush()

    @property
    def pending(self) -> bool:
        """Whether something waits to be written, and can be."""
        return bool(self._outgoing) and not self.closed

    def send(self, kind: bytes, value: Any = None, raw: bytes | None = None) -> None:
        """Queue a frame and write what the other side takes at once."""
        body = kind + (json.dumps(value).encode() if raw is None else raw)
        with self._lock:
            self._outgoing += len(body).to_bytes(4, "big") + body
        self.flush()

    def flush(self, patience_s: float = 0.0) -> None:
        """Write what can be written now, or within `patience_s`."""
        deadline_s = time.monotonic() + patience_s
        while self._outgoing and not self.closed:
            with self._lock:
                try:
                    del self._outgoing[: os.write(self.write_fd, self._outgoing[: 1 << 16])]
                    continue
                except BlockingIOError:
                    pass
                except OSError:
                    self.closed = True
                    return
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return
            _await(self.write_fd, select.POLLOUT, left_s)

    def receive(self) -> list[tuple[bytes, Any]]:
        """The frames that have come; sets `closed` when there will be no more."""
        while not self.closed:
            try:
                data = os.read(self.read_fd, 1 << 18)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.closed = True
            else:
                self._incoming += data
                self.heard_s = time.monotonic()
        if not self._has_magic:
            at = self._incoming.find(MAGIC)
            self.closed |= at < 0 and len(self._incoming) > 1 << 20
            self._has_magic = at >= 0
            self._incoming = self._incoming[at + len(MAGIC) :] if at >= 0 else self._incoming
        frames, self._held = self._held, []
        while self._has_magic and len(self._incoming) >= 5:
            nbytes = int.from_bytes(self._incoming[:4], "big")
            if not 0 < nbytes <= _MOST_BYTES:
                self.closed = True
                break
            if len(self._incoming) < 4 + nbytes:
                break
            kind, body = self._incoming[4:5], self._incoming[5 : 4 + nbytes]
            self._incoming = self._incoming[4 + nbytes :]
            try:
                frames.append((kind, body if kind == OUTPUT else json.loads(body)))
            except ValueError:
                self.closed = True
        return frames

    def expect(self, *kinds: bytes, within_s: float = 1e9) -> tuple[bytes, Any]:
        """Wait for the next frame of these kinds, answering beats; `(b"", None)` if silence falls or time runs out."""
        deadline_s = time.monotonic() + within_s
        while not self.closed:
            now_s = time.monotonic()
            if min(deadline_s, self.heard_s + SILENCE_S) < now_s:
                self.closed = True
            if not self._held:
                _await(self.read_fd, select.POLLIN, BEAT_S / 2)
            frames = self.receive()
            while frames:
                kind, value = frames.pop(0)
                if kind == BEAT:
                    self.send(BEAT, [time.monotonic(), value])
                elif kind in kinds:
                    self._held = frames
                    return kind, value
            self.flush()
        return b"", None

    def close(self) -> None:
        """Close both descriptors."""
        self.closed = True
        for fd in (self.read_fd, self.write_fd):
            with contextlib.suppress(OSError):
                os.close(fd)


def _await(fd: int, event: int, timeout_s: float) -> None:
    """Unlike `select`, `poll` knows descriptors beyond 1024: a launcher of many nodes has them."""
    poll = select.poll()
    poll.register(fd, event)
    poll.poll(1000 * timeout_s)


def new_secret() -> str:
    """A key or a nonce."""
    return secrets.token_hex(16)


def proof(key: str, nonce: str, who: str) -> str:
    """What shows that the sender knows the key, which itself never travels."""
    import hmac  # hashlib costs milliseconds that a start on one machine need not pay

    return hmac.new(key.encode(), f"{who}:{nonce}".encode(), "sha256").hexdigest()
