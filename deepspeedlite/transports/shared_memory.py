"""A link between the CPU ranks of one host: tensors go through memory that they share, not through gloo's TCP.

A rank copies what others are to have into a block of its own memory and tells each of them where it lies, in a message
over a Unix socket; they read it there when they wait for it. So a message never waits for its receiver, whatever the
order in which the ranks wait for theirs, and two passes over memory replace the four and the threads of a TCP socket.

What is sent more often than it changes, such as a shard, or is to be sent and not kept, such as gradients to be summed,
can lie in a block from the start: `alloc_shared`. It goes without that first copy; `wait_for_readers` says when it may
be written again.

A block is a memfd: it has no name that could be left behind or taken, no limit but memory (Docker gives /dev/shm
64 MiB), and goes with the last process that maps it. Its descriptor travels in the first message about it, so what a
rank sent stays readable after that rank has ended.

[Note: when a block is used again]
When all others have said that they have read it, and no tensor is left of it. So that few blocks are
needed, whatever has come is read whenever something is started or waited for, also for exchanges that nobody waits for
yet, and a rank of whose blocks `_MOST_IN_USE` are filled, not shared and unread lets the others catch up before it
takes another. It waits for them only so long: ranks that start exchanges in different orders might wait for each other
there. Idle blocks keep their memory up to `KEPT_NBYTES`, because the kernel takes longer to hand out a page than a copy
takes to fill it.

[Note: ranks that are out of step]
Pieces meet by tag and count, and say what they are for. A rank that has waited a moment tells those that it waits for,
and in what. One of them that waits for this rank too, in something else, knows then that neither will ever go on. Both
raise, long before any time limit, and the link is of no use from then on: what was sent in the one call must not be
taken for an answer in the next.

[Note: the order of memory]
A write to a block comes before the message about it, and the kernel's locks around a socket's queue order the two for
the reader. No flag in shared memory is polled but those of `slots`, where a processor keeps its stores in order.

[Note: small sums]
Two messages and a sleep cost a small sum most of its time, so from a link's second on they go by `slots`. Only how they
arrive is another: what they are for is compared, and who is out of step or has ended is found as for all.
"""

from __future__ import annotations

import bisect
import functools
import os
import secrets
import select
import socket
import struct
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from deepspeedlite.comm.guard import objects
from deepspeedlite.comm.transport import Work
from deepspeedlite.runtime.errors import DistributedError
from deepspeedlite.transports.block import Block, map_memory
from deepspeedlite.transports.slots import ARE_ORDERED, BOARD_NBYTES, SLOT_NBYTES, Board, have_shown

SWITCH = "DEEPSPEEDLITE_SHARED_MEMORY"
"""Environment variable; 0 on any rank keeps all ranks on gloo's TCP."""

_ALIGNMENT = 64
_SMALLEST_BLOCK = 1 << 16
# Ticket (tag, occurrence), the sender's sequence number, block, offset, bytes, purpose. "Read" needs the first three.
_MESSAGE = struct.Struct("<7q")
_READ = -1  # as the block of a message: what the receiver of this message sent was read
_WAITS = -2  # the sender waits for what has this ticket; what that is follows the message
_BOARD = -3  # with the descriptor of the sender's board
_SHOWN = -4  # the sender has put something on its board
_TEXT_NBYTES = 200
_TELLS_AFTER_S = 0.25  # how long a rank waits before it says so
_MOST_IN_USE = 3
KEPT_NBYTES = 1 << 28
"""Memory that a rank's idle blocks may keep."""

_PATIENCE_S = 1.0
_LOOKS_AGAIN_S = 0.02  # at boards, if no message comes
_IN_SLOT = 0  # as the number of a message: there was none, and nobody waits for an answer
_CONNECT_TIMEOUT_S = 30.0

Ticket = tuple[int, int]
"""A tag and how often it has been used before: what ranks must agree on for their pieces to meet."""


@dataclass(kw_only=True, eq=False)
class Pieces:
    """What a rank sends to every other rank of its group in an exchange, and what it gets of them. Lists by rank."""

    outbox: Sequence[torch.Tensor]
    """What each is sent: contiguous, and all of them empty, or none. This rank's own is only given to `then`."""
    expect: Sequence[torch.Tensor]
    """Tensors with the shapes and dtypes of what each sends."""
    tag: int
    then: Callable[[list[torch.Tensor]], None]
    """Called with what every rank sent when it is waited for; the others' pieces are gone when it returns."""
    in_place: bool = False
    """What rank r sends may be received in `expect[r]` itself."""
    final: bool = False
    """`outbox` is not written again before every rank has read it, so need not be copied."""
    what: str = ""
    """What the exchange is for, as errors call it; the same on all ranks."""


class SharedMemoryLink:
    """Sends pieces to and reads pieces from every other rank of a group.

    Args:
        rank: this rank in the group.
        peers: a connected SOCK_SEQPACKET socket to every other rank.
        timeout_s: how long to wait for a message.
    """

    def __init__(self, rank: int, peers: dict[int, socket.socket], timeout_s: float) -> None:
        self.rank, self._peers, self._timeout_s = rank, peers, timeout_s
        self._blocks: list[Block] = []  # by address
        self._in_use: dict[int, Block] = {}
        self._sequence = 0
        self._ended: set[int] = set()
        self._incoming = select.poll()
        self._arrived: dict[tuple[int, Ticket], tuple[int, torch.Tensor, int]] = {}
        self._waiting: dict[int, tuple[Ticket, str]] = {}  # in what other ranks have said that they wait for this one
        self._out_of_step = ""  # how the ranks have missed each other; nothing is exchanged any more
        self._pending: list[_Exchange] = []
        self._tickets: Counter[int] = Counter()
        self._maps: dict[tuple[int, int], torch.Tensor] = {}
        for peer in peers.values():
            peer.setblocking(False)
            self._incoming.register(peer, select.POLLIN)
        self._end = weakref.finalize(self, _close, list(peers.values()), self._blocks, self._maps)
        own = Block(-1, BOARD_NBYTES)
        self._board, self._boards = Board(own.memory), dict[int, Board]()  # this rank's, and the others'
        for rank in peers:
            self._post(rank, _MESSAGE.pack(0, 0, 0, _BOARD, 0, 0, 0), [own.fd])
        os.close(own.fd)

    @property
    def held_nbytes(self) -> int:
        """Bytes of memory that this rank's blocks take, shared ones included."""
        return sum(block.touched_nbytes for block in self._blocks)

    def alloc_shared(self, nbytes: int) -> torch.Tensor:
        """uint8 memory that others can read, of arbitrary content. It is used again when no tensor of it is left."""
        self._catch_up()
        return self._idle_block(nbytes).alloc_shared(nbytes)

    def exchange(self, pieces: Pieces) -> Work:
        """Start sending every other rank its piece, which may be overwritten when this returns, unless it is final.

        What of final pieces lies in shared memory is not copied, so must not change until all have read it (see
        `wait_for_readers`). Exchanges of one tag meet in the order of their starts, and it is an error if they are not
        for the same. Nothing depends on `in_place`: what comes is read where it lies.
        """
        if self._out_of_step:
            raise DistributedError(self._out_of_step)
        self._catch_up()
        tag, own, what = pieces.tag, pieces.outbox[self.rank], pieces.what
        self._tickets[tag] += 1
        ticket = (tag, self._tickets[tag])
        exchange = _Exchange(self, own, pieces.expect, ticket, pieces.then, what, _purpose(what))
        if own.numel():
            self._send({rank: pieces.outbox[rank] for rank in self._peers}, exchange, pieces.final)
            self._pending.append(exchange)
        return exchange

    def exchange_small(self, pieces: Pieces) -> Work:
        """As `exchange`, for the same few bytes to every rank, which are waited for before another such is started."""
        own, what, tag = pieces.outbox[self.rank], pieces.what, pieces.tag
        # By the first exchange all boards have come.
        if not ARE_ORDERED or not self._tickets[tag] or self._out_of_step or not 0 < own.nbytes <= SLOT_NBYTES:
            return self.exchange(pieces)
        number = self._board.count + 1  # which writes over what was shown two before
        if any(board.count < number - 1 for board in self._boards.values()):
            self._end_step("what another rank has not taken yet would be written over")
        self._tickets[tag] += 1
        ticket = (tag, self._tickets[tag])
        exchange = _InSlots(self, own, pieces.expect, ticket, pieces.then, what, _purpose(what), number)
        self._board.show(number, own, exchange.purpose)
        for rank in [rank for rank, board in self._boards.items() if board.sleeps]:
            self._post(rank, _MESSAGE.pack(*ticket, 0, _SHOWN, 0, 0, 0))
        self._pending.append(exchange)
        return exchange

    def wait_for_slots(self, exchange: _InSlots) -> None:
        """Look until all have shown theirs; sleep when that takes long."""
        self._board.sleeps = not have_shown(list(self._boards.values()), exchange.number)
        self._look_at_boards()
        try:
            if all(self._fits(rank, exchange) for rank in self._peers):
                self._end_exchange(exchange)
            self.wait_for(exchange)
        finally:
            self._board.sleeps = False

    def _look_at_boards(self) -> None:
        for exchange in [exchange for exchange in self._pending if isinstance(exchange, _InSlots)]:
            for rank, board in self._boards.items():
                if board.count >= exchange.number and (rank, exchange.ticket) not in self._arrived:
                    self._waiting.pop(rank, None)
                    self._arrived[rank, exchange.ticket] = (_IN_SLOT, *board.shown(exchange.number))

    def _send(self, pieces: dict[int, torch.Tensor], exchange: _Exchange, final: bool) -> None:
        shared = self._shared_block(pieces.values()) if final else None
        block, offsets = shared or self._copied(pieces.values())
        self._sequence += 1
        self._in_use[self._sequence] = block
        block.unread.update((self._sequence, rank) for rank in pieces)
        for (rank, piece), offset in zip(pieces.items(), offsets):
            descriptors = [] if rank in block.known_to else [block.fd]
            block.known_to.add(rank)
            place = (self._sequence, block.number, offset, piece.nbytes)
            self._post(rank, _MESSAGE.pack(*exchange.ticket, *place, exchange.purpose), descriptors)

    def _shared_block(self, pieces: Collection[torch.Tensor]) -> tuple[Block, list[int]] | None:
        """The block in whose shared memory all the pieces lie, and where."""
        addresses = [piece.data_ptr() for piece in pieces]
        block = self._block_at(addresses[0])
        if block is None or not block.is_shared or any(self._block_at(address) is not block for address in addresses):
            return None
        return block, [address - block.address for address in addresses]

    def _block_at(self, address: int) -> Block | None:
        index = bisect.bisect_right(self._blocks, address, key=lambda block: block.address) - 1
        block = self._blocks[index] if index >= 0 else None
        return block if block is not None and address < block.address + block.memory.numel() else None

    def wait_for_readers(self, tensor: torch.Tensor) -> None:
        """Return when every rank that lives has read what was sent of the shared memory in which `tensor` lies.

        Raises:
            TimeoutError: a rank has not started to receive it in time.
        """
        block = self._block_at(tensor.data_ptr())
        late_at = time.monotonic() + self._timeout_s
        while block is not None and (waiting := {rank for _, rank in block.unread} - self._ended):
            self._catch_up()
            if {rank for _, rank in block.unread} - self._ended and not self._incoming.poll(
                max(0.0, late_at - time.monotonic()) * 1e3
            ):
                raise TimeoutError(f"waited {self._timeout_s:.0f} s for ranks {sorted(waiting)} to read what they get")

    def _copied(self, pieces: Collection[torch.Tensor]) -> tuple[Block, list[int]]:
        """A block that the pieces have been copied into, equal ones once, and where they are."""
        distinct = {piece.data_ptr(): piece for piece in pieces}
        offsets, end = {}, 0
        for address, piece in distinct.items():
            offsets[address] = end
            end += -(-piece.nbytes // _ALIGNMENT) * _ALIGNMENT
        block = self._idle_block(end)
        for address, piece in distinct.items():
            memory = block.memory[offsets[address] : offsets[address] + piece.nbytes]
            memory.view(piece.dtype).copy_(piece.reshape(-1))
        block.touched_nbytes = max(block.touched_nbytes, end)
        return block, [offsets[piece.data_ptr()] for piece in pieces]

    def _idle_block(self, nbytes: int) -> Block:
        capacity = max(_SMALLEST_BLOCK, 1 << (nbytes - 1).bit_length())
        patient_until = time.monotonic() + _PATIENCE_S
        while sum(not block.is_shared for block in self._in_use.values()) >= _MOST_IN_USE and not self._ended:
            if not self._incoming.poll(max(0.0, patient_until - time.monotonic()) * 1e3):
                break
            self._catch_up()
        fitting = [block for block in self._blocks if block.is_idle and block.memory.numel() >= capacity]
        if not fitting:
            fitting = [Block(len(self._blocks), capacity)]
            bisect.insort(self._blocks, fitting[0], key=lambda block: block.address)
        return min(fitting, key=lambda block: (block.memory.numel(), block.number))  # the oldest, to keep few in use

    def _trim(self) -> None:
        """Give memory of idle blocks back, the largest first, until they keep `KEPT_NBYTES` at most."""
        idle = sorted((block for block in self._blocks if block.is_idle), key=lambda block: block.touched_nbytes)
        while sum(block.touched_nbytes for block in idle) > KEPT_NBYTES:
            idle.pop().give_back()

    def _post(self, rank: int, message: bytes, descriptors: Sequence[int] = ()) -> None:
        while rank not in self._ended:
            try:
                socket.send_fds(self._peers[rank], [message], list(descriptors))
                return
            except BlockingIOError:  # its queue is full: read on, since it may be waiting in the same place
                either = select.poll()
                either.register(self._peers[rank], select.POLLIN | select.POLLOUT)
                if not either.poll(self._timeout_s * 1e3):
                    raise TimeoutError(f"rank {rank} has read nothing for {self._timeout_s:.0f} s") from None
                self._read_messages(rank)
            except ConnectionError:
                return  # it has ended, which is no fault here: whoever needs something of it finds out when waiting

    def _catch_up(self) -> None:
        """Read what has come, and end the exchanges that are complete."""
        for rank in self._peers:
            self._read_messages(rank)
        self._look_at_boards()  # after the messages: who has ended may have shown something before
        for exchange in self._pending[:]:
            if all(self._fits(rank, exchange) for rank in self._peers):
                self._end_exchange(exchange)
        self._trim()

    def wait_for(self, exchange: _Exchange) -> None:
        """Read until an exchange has ended."""
        start, told = time.monotonic(), False
        while exchange in self._pending:
            self._catch_up()
            if exchange not in self._pending:
                return
            missing = self._missing_of(exchange)
            left_s = start + (self._timeout_s if told else _TELLS_AFTER_S) - time.monotonic()
            look_s = min(left_s, _LOOKS_AGAIN_S) if isinstance(exchange, _InSlots) else left_s
            if self._incoming.poll(max(0.0, look_s) * 1e3) or look_s < left_s:
                continue
            if told:
                raise TimeoutError(
                    f"waited {self._timeout_s:.0f} s for {', '.join(f'rank {rank}' for rank in missing)}"
                )
            told = True
            self._tell(missing, exchange)

    def is_settled(self, exchange: _Exchange) -> bool:
        """Whether an exchange has ended, or waiting for it would raise at once."""
        self._catch_up()
        try:
            return exchange not in self._pending or not self._missing_of(exchange)
        except (ConnectionError, DistributedError):
            return True

    def _tell(self, ranks: Sequence[int], exchange: _Exchange) -> None:
        """Let ranks know that this one waits for them."""
        for rank in ranks:
            text = exchange.what.encode()[:_TEXT_NBYTES]
            self._post(rank, _MESSAGE.pack(*exchange.ticket, 0, _WAITS, 0, 0, 0) + text)

    def _missing_of(self, exchange: _Exchange) -> list[int]:
        """The ranks that have not sent their pieces yet.

        Raises:
            ConnectionError: one of them has ended.
            DistributedError: one of them never will, or has sent what is for something else.
        """
        if self._out_of_step:
            raise DistributedError(self._out_of_step)
        missing = [rank for rank in self._peers if (rank, exchange.ticket) not in self._arrived]
        mine = exchange.what or "a collective"
        for rank in self._peers:
            if rank not in missing:
                _, memory, purpose = self._arrived[rank, exchange.ticket]
                if purpose != exchange.purpose:
                    self._end_step(f"rank {rank} sent what is for something else than {mine}")
                if memory.numel() != exchange.expect[rank].nbytes:
                    self._end_step(f"rank {rank} sent {memory.numel()} bytes, not {exchange.expect[rank].nbytes}")
            elif rank in self._ended:
                raise ConnectionError(f"rank {rank} has ended")
            elif rank in self._waiting:
                (tag, occurrence), theirs = self._waiting[rank]
                if self._tickets[tag] < occurrence:
                    self._tell(missing, exchange)  # else they would not find out
                    self._end_step(f"rank {self.rank} of the group waits in {mine}, rank {rank} in {theirs}")
        return missing

    def _end_step(self, how: str) -> None:
        self._out_of_step = f"the ranks are out of step: {how}"
        raise DistributedError(self._out_of_step)

    def _fits(self, rank: int, exchange: _Exchange) -> bool:
        """Whether a rank has sent its piece of an exchange, and that is what is expected."""
        arrived = self._arrived.get((rank, exchange.ticket))
        return (
            arrived is not None
            and arrived[1].numel() == exchange.expect[rank].nbytes
            and arrived[2] == exchange.purpose
        )

    def _end_exchange(self, exchange: _Exchange) -> None:
        self._pending.remove(exchange)
        pieces, numbers = [], {}
        for rank, like in enumerate(exchange.expect):
            if rank == self.rank:
                pieces.append(exchange.own)
                continue
            numbers[rank], memory, _ = self._arrived.pop((rank, exchange.ticket))
            pieces.append(memory.view(like.dtype).view(like.shape))
        exchange.then(pieces)
        for rank in [rank for rank, number in numbers.items() if number != _IN_SLOT]:
            self._post(rank, _MESSAGE.pack(*exchange.ticket, numbers[rank], _READ, 0, 0, 0))

    def _read_messages(self, rank: int) -> None:
        """Take in all messages of a rank that are there."""
        while rank not in self._ended:
            try:
                data, descriptors, *_ = socket.recv_fds(self._peers[rank], _MESSAGE.size + _TEXT_NBYTES, 1)
            except BlockingIOError:
                return
            except ConnectionError:
                data, descriptors = b"", []
            if not data:
                self._ended.add(rank)
                self._incoming.unregister(self._peers[rank])
                return
            tag, occurrence, number, block, offset, nbytes, purpose = _MESSAGE.unpack_from(data)
            for descriptor in descriptors:
                mapping = map_memory(descriptor, os.fstat(descriptor).st_size)
                self._maps[rank, block] = torch.frombuffer(mapping, dtype=torch.uint8)
                os.close(descriptor)
            if block == _READ:
                sent = self._in_use[number]
                sent.unread.discard((number, rank))
                if not any(message == number for message, _ in sent.unread):
                    del self._in_use[number]
            elif block == _WAITS:
                text = data[_MESSAGE.size :].decode(errors="replace")
                self._waiting[rank] = ((tag, occurrence), text or "a collective")
            elif block == _BOARD:
                self._boards[rank] = Board(self._maps[rank, block])
            elif block != _SHOWN:  # which needs no more than to be woken
                self._waiting.pop(rank, None)
                piece = self._maps[rank, block][offset : offset + nbytes]
                self._arrived[rank, (tag, occurrence)] = (number, piece, purpose)

    def close(self) -> None:
        """End the link; what was sent can still be read by the others."""
        self._end()


@dataclass(eq=False)
class _Exchange:
    """Pieces on their way, but for those that were sent: their memory is free as soon as it was read or copied."""

    link: SharedMemoryLink
    own: torch.Tensor
    expect: Sequence[torch.Tensor]
    ticket: Ticket
    then: Callable[[list[torch.Tensor]], None]
    what: str
    purpose: int  # a number for `what`

    def wait(self) -> None:
        """Return when it is complete; the second time there is nothing to do.

        Raises:
            OSError: a rank has ended, or did not send in time.
            DistributedError: a rank sent another number of bytes, or takes part in something else.
        """
        self.link.wait_for(self)

    def is_completed(self) -> bool:
        """Whether `wait` ends at once, be it with an error."""
        return self.link.is_settled(self)


@dataclass(eq=False)
class _InSlots(_Exchange):
    """One by boards."""

    number: int  # under which all show theirs

    def wait(self) -> None:
        """See `_Exchange`."""
        if self in self.link._pending:
            self.link.wait_for_slots(self)


@functools.lru_cache(maxsize=4096)
def _purpose(what: str) -> int:
    """A number for what an exchange is for, the same in every process."""
    return zlib.crc32(what.encode())


def connect(process_group: dist.ProcessGroup | None, rank: int, size: int) -> SharedMemoryLink | None:
    """The link of a gloo process group; None, on all ranks alike, where they cannot share memory. Collective."""
    listener, card = _listen(size)
    cards = objects.all_gather(card, process_group, torch.device("cpu"))
    peers: dict[int, socket.socket] = {}
    reached = listener is not None and all(other is not None and other[0] == cards[0][0] for other in cards)
    if reached:
        try:
            for other in range(rank):
                _, address, password = cards[other]
                peers[other] = _call(address, password, rank)
        except OSError:  # the same kernel, but not the same network namespace
            reached = False
    if not all(objects.all_gather(reached, process_group, torch.device("cpu"))):
        for peer in (*peers.values(), *([listener] if listener else [])):
            peer.close()
        return None
    assert listener is not None and card is not None, "reached says so"
    with listener:
        _answer(listener, card[2], peers, size)
    known = process_group or dist.distributed_c10d._get_default_group()
    timeout = known._get_backend(torch.device("cpu")).options._timeout
    return SharedMemoryLink(rank, peers, timeout.total_seconds() if isinstance(timeout, timedelta) else 1800.0)


def _listen(size: int) -> tuple[socket.socket | None, tuple[str, bytes, bytes] | None]:
    """A socket that the others can call, and what they must know: the kernel, its address and a password."""
    if os.environ.get(SWITCH, "").strip() == "0" or not hasattr(os, "memfd_create"):
        return None, None
    try:
        os.close(os.memfd_create("probe"))  # a sandbox may forbid it
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind("")  # the kernel chooses an abstract name
        listener.listen(size)
        listener.settimeout(_CONNECT_TIMEOUT_S)
    except OSError:
        return None, None
    return listener, (kernel, listener.getsockname(), secrets.token_bytes(16))


def _call(address: bytes, password: bytes, rank: int) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.settimeout(_CONNECT_TIMEOUT_S)
    try:
        peer.connect(address)
        peer.send(password + rank.to_bytes(4, "little"))
    except OSError:
        peer.close()
        raise
    return peer


def _answer(listener: socket.socket, password: bytes, peers: dict[int, socket.socket], size: int) -> None:
    """Accept the ranks above this one, which have called by now, and nobody else."""
    while len(peers) < size - 1:
        peer, _ = listener.accept()
        peer.settimeout(_CONNECT_TIMEOUT_S)
        if _uid_of(peer) != os.getuid():  # who need not say anything, to hold up a start
            peer.close()
            continue
        said = peer.recv(64)
        if secrets.compare_digest(said[:16], password):
            peers[int.from_bytes(said[16:20], "little")] = peer
        else:
            peer.close()


def _uid_of(peer: socket.socket) -> int:
    """Whose process is at the other end: the kernel's word."""
    _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(uid)


def _close(sockets: list[socket.socket], blocks: list[Block], maps: dict[tuple[int, int], torch.Tensor]) -> None:
    for each in sockets:
        each.close()
    for block in blocks:
        os.close(block.fd)
    blocks.clear()
    maps.clear()
