"""One gloo connection of a channel: staging buffers, and the two loops that its threads run.

A message is 64 bytes of header and one chunk, in a buffer that the connection owns: gloo reads and writes it, and a
chunk is copied between it and the payload. The copy costs under 0.1 s of processor time per GB (the socket 0.3,
measured), and buys that a chunk takes whichever connection is free: the receiver need not know what will come where.

Gloo's ways, and what follows from them:
- a send moves no byte before its receive is posted, and a receive posted is announced to the sender. So `num_posted`
  chunks are the window of a connection: no more is under way on it, and it must be above rate × round trip;
- a message may be shorter than the buffer posted for it, never longer: all buffers have the greatest size;
- messages with different tags match in any order: the tag is the number of the message;
- a handle dropped loses its message, and `is_completed` stays false until somebody waits: threads own handles and wait;
- a wait that times out closes the pair: these threads wait (nearly) for ever, time-outs are on our own conditions;
- nothing but a message ends a posted receive: each side ends by sending `num_posted` closing messages, which use up
  what the other has posted.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import Work

from wantrain.comm.gloo import FOR_EVER, Pair
from wantrain.comm.sender import Chunk
from wantrain.wire import Transport

_HEADER = struct.Struct("<QQQQ")  # payload index + 1 (0 closes), offset, size of the chunk, size of the payload
MESSAGE_HEADER_BYTES = 64  # keeps the chunk behind it aligned
_NUM_STAGED = 2  # one chunk leaves while the next is copied; measured on localhost: 3 and 4 gain nothing


class _Message:
    """A staging buffer for the greatest message of a connection."""

    def __init__(self, chunk_bytes: int) -> None:
        self.tensor = torch.empty(MESSAGE_HEADER_BYTES + chunk_bytes, dtype=torch.uint8)
        self._bytes = self.tensor.numpy().data

    def fill(self, chunk: Chunk) -> Tensor:
        """Copy a chunk in and return the part of the buffer that must be sent."""
        sending, start, size = chunk
        end = MESSAGE_HEADER_BYTES + size
        _HEADER.pack_into(self._bytes, 0, sending.index + 1, start, size, sending.num_bytes)
        self.tensor[MESSAGE_HEADER_BYTES:end].numpy()[:] = sending.payload[start : start + size].numpy()
        return self.tensor[:end]

    def fill_closing(self) -> Tensor:
        """Write a closing message and return it."""
        _HEADER.pack_into(self._bytes, 0, 0, 0, 0, 0)
        return self.tensor[:MESSAGE_HEADER_BYTES]

    def header(self) -> tuple[int, int, int, int]:
        return _HEADER.unpack_from(self._bytes)

    def chunk(self, size: int) -> Tensor:
        return self.tensor[MESSAGE_HEADER_BYTES : MESSAGE_HEADER_BYTES + size]


class Connection:
    """A pair over gloo, its staging buffers, and the two loops that its threads run."""

    def __init__(self, pair: Pair, transport: Transport) -> None:
        self._pair = pair
        self._num_posted = transport.num_posted
        self._staged = [_Message(transport.chunk_bytes) for _ in range(_NUM_STAGED)]
        self._incoming = [_Message(transport.chunk_bytes) for _ in range(transport.num_posted)]
        self._num_sent = 0

    def _send(self, message: Tensor) -> Work:
        self._num_sent += 1
        return self._pair.send(message, self._num_sent - 1)

    def send_loop(self, take: Callable[[bool], Chunk | None], left: Callable[[Chunk, int], None]) -> None:
        """Send what `take(block)` gives until it gives nothing for good; report each chunk that has `left`."""
        under_way: deque[tuple[Work, Chunk]] = deque()
        while True:
            chunk = take(not under_way) if len(under_way) < _NUM_STAGED else None
            if chunk is not None:
                message = self._staged[self._num_sent % _NUM_STAGED].fill(chunk)
                under_way.append((self._send(message), chunk))
            elif under_way:
                work, chunk = under_way.popleft()
                work.wait(FOR_EVER)
                left(chunk, MESSAGE_HEADER_BYTES + chunk.num_bytes)
            else:
                break
        closing = self._staged[0].fill_closing()
        for work in [self._send(closing) for _ in range(self._num_posted)]:
            work.wait(FOR_EVER)

    def recv_loop(self, arrived: Callable[[int, int, int, Tensor], None], closed: Callable[[], None]) -> None:
        """Report every chunk that has `arrived` (in a buffer that is reused), until the peer closes."""
        posted = deque((self._post(message, i), message) for i, message in enumerate(self._incoming))
        num_posted = len(posted)
        while posted:
            work, message = posted.popleft()
            work.wait(FOR_EVER)
            number, offset, size, total = message.header()
            if number > 0:
                arrived(number - 1, offset, total, message.chunk(size))
                posted.append((self._post(message, num_posted), message))
                num_posted += 1
        closed()

    def _post(self, message: _Message, tag: int) -> Work:
        return self._pair.recv(message.tensor, tag)
