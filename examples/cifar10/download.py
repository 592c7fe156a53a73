"""Fetches one file over HTTP so that a cut connection or a broken file can do no harm.

`fetch` writes to `NAME.part`, asks for the rest of a part left by an earlier try (HTTP Range, RFC 9110 section 14),
and gives the file its final name only once its SHA-256 is the expected one: whoever finds the file finds it whole.
Opening the connection, name look-up included, has a deadline of its own, so that a machine without network learns
that within seconds.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20
TRIES = 8  # a connection may be cut this often before we give up; each try keeps what the one before it got

OnProgress = Callable[[int, int], None]  # (bytes so far, bytes in all; 0 where the server does not say)


class DownloadError(RuntimeError):
    """The file cannot be had: no connection, a refusal by the server, or a checksum that does not match."""


def fetch(
    url: str, path: Path, sha256: str, *, connect_timeout_s: float = 4.0, progress: OnProgress | None = None
) -> Path:
    """Make sure that `path` holds the file of `url` with this SHA-256, downloading what is missing of it.

    Raises:
        DownloadError: with the cause. What was received so far stays in `path`.part, unless it was whole and wrong.
    """
    if path.exists():
        if _sha256(path) == sha256:
            return path
        path.unlink()
    part = path.with_name(path.name + ".part")
    for _ in range(TRIES):
        if _receive(url, part, connect_timeout_s, progress):
            break
    else:
        raise DownloadError(f"{url}: the connection was cut {TRIES} times; run again to go on from {part}")
    found = _sha256(part)
    if found != sha256:
        part.unlink()
        raise DownloadError(f"{url}: the SHA-256 is {found}, not {sha256}; the file was thrown away, run again")
    os.replace(part, path)
    return path


def _receive(url: str, part: Path, connect_timeout_s: float, progress: OnProgress | None) -> bool:
    """Append to `part` what the server still has. True when nothing is missing any more."""
    have_bytes = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "deepspeedlite-example"})
    if have_bytes:
        request.add_header("Range", f"bytes={have_bytes}-")
    try:
        response = _open_within(connect_timeout_s, request)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have_bytes:  # the part is as long as the file, or longer
            return _is_whole(error.headers.get("Content-Range", ""), part)
        raise DownloadError(f"{url}: the server says {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{url}: {getattr(error, 'reason', error)}") from None
    with response:
        resumed = response.status == 206
        if not resumed:
            have_bytes = 0  # the server sends the whole file, whatever was asked
        part.parent.mkdir(parents=True, exist_ok=True)
        total_bytes = have_bytes + int(response.headers.get("Content-Length") or 0)
        with part.open("ab" if resumed else "wb") as out:
            while chunk := _read(response):
                out.write(chunk)
                have_bytes += len(chunk)
                if progress:
                    progress(have_bytes, total_bytes)
    return have_bytes >= total_bytes


def _is_whole(content_range: str, part: Path) -> bool:
    """Whether `part` has the size that a 416 answer states (`bytes */SIZE`); a part of any other size is dropped."""
    if content_range.rpartition("/")[2] == str(part.stat().st_size):
        return True
    part.unlink()
    return False


def _read(response: Any) -> bytes:
    """The next chunk; b"" at the end, and also where the connection was cut, which the caller sees by the size."""
    try:
        return response.read(CHUNK_BYTES)
    except http.client.IncompleteRead as error:
        return error.partial
    except OSError:
        return b""


def _open_within(timeout_s: float, request: urllib.request.Request) -> Any:
    """`urlopen` with a deadline that also covers the name look-up, which no socket time-out does."""
    answer: list[Any] = []

    def opening() -> None:
        try:
            answer.append(urllib.request.urlopen(request, timeout=timeout_s))
        except Exception as error:  # handed to the caller below, whatever it is
            answer.append(error)

    thread = threading.Thread(target=opening, daemon=True)
    thread.start()
    thread.join(2 * timeout_s)
    if not answer:
        raise OSError(f"no answer within {2 * timeout_s:g} s")
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
