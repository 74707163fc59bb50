"""The sum of gradients over the replicas of a stage, in two latencies, with the same bits everywhere.

A ring needs 2 (n−1) latencies; on a long link the latency is what costs. Here every piece goes straight to its owner,
which adds and sends the sum straight to everybody, for the same bytes per member:

    member 0 │ a0 b0 c0 │ ─scatter─►  member 0 owns a: a0 + a1 + a2 ─gather─► │ a b c │
    member 1 │ a1 b1 c1 │             member 1 owns b: b0 + b1 + b2           │ a b c │
    member 2 │ a2 b2 c2 │             member 2 owns c: c0 + c1 + c2           │ a b c │

The owner adds in member order, whatever arrives first, and takes its own sum through the codec as the others do; so
the bits depend on nothing but the values, and are the same on all members. Buckets are handled in the order of
`submit`, which must be the same on all members. Three threads of stages keep several buckets under way: one is
scattered while the one before is summed and the one before that gathered.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from wantrain import wire
from wantrain.codecs.codec import Codec, make_codec
from wantrain.comm.channel import Channel
from wantrain.errors import ChannelError, WantrainError

SCATTER, GATHER = 0, 1
"""Streams: what a payload on a channel belongs to, told by its header, since the two mix."""

_PIECE_VALUES = 16
"""Pieces begin at multiples of 64 bytes: kernels give the same bits only for the same alignment."""

_T = TypeVar("_T")


class _StoppedError(Exception):
    """The reducer was stopped while a thread waited for a piece."""


class _Queue(queue.SimpleQueue[_T | None]):
    """A queue that None ends."""

    def take(self) -> _T:
        """Return the next item; raise where the queue has ended."""
        item = self.get()
        if item is None:
            raise _StoppedError
        return item


MakeCodec = Callable[[int], Codec]
"""Makes a codec for a stream."""

raw_fp32: MakeCodec = partial(make_codec, "raw:fp32")


def piece_bounds(num_values: int, num_members: int) -> list[int]:
    """Return where the members' pieces begin, and the end: equal to a rounding, aligned, some empty if need be."""
    share = -(-num_values // num_members)
    aligned = -(-share // _PIECE_VALUES) * _PIECE_VALUES
    return [min(aligned * member, num_values) for member in range(num_members + 1)]


class Handle:
    """A bucket on its way."""

    def __init__(self, bucket: Tensor, number: int, num_members: int) -> None:
        self.bucket = bucket
        self.number = number
        self._bounds = piece_bounds(bucket.numel(), num_members)
        self._error: WantrainError | None = None
        self._ended = threading.Event()

    def piece(self, member: int) -> Tensor:
        """Return the part of the bucket that a member owns."""
        return self.bucket[self._bounds[member] : self._bounds[member + 1]]

    def wait(self, timeout_s: float) -> Tensor:
        """Return the bucket, now the sum over all members; raise ChannelError where a member is late or gone."""
        if not self._ended.wait(timeout_s):
            raise ChannelError(f"bucket {self.number} not reduced within {timeout_s:g} s; is every replica running?")
        if self._error is not None:
            raise self._error
        return self.bucket

    def end(self, error: WantrainError | None = None) -> None:
        """Mark as reduced, or as failed; only the reducer calls this."""
        self._error = error
        self._ended.set()


class _Peer:
    """One other member: the channel to it, a codec for each way and stream, and what has arrived from it."""

    def __init__(self, channel: Channel, scatter_codec: MakeCodec, gather_codec: MakeCodec) -> None:
        self.channel = channel
        self.scatter_codec = scatter_codec(SCATTER)
        self.arrived: tuple[_Queue[Tensor], _Queue[Tensor]] = (_Queue(), _Queue())
        self.expected: _Queue[Handle] = _Queue()
        self._decoders = (scatter_codec(SCATTER), gather_codec(GATHER))

    def recv_loop(self, timeout_s: float) -> None:
        """Receive and decode what the submitted buckets make this member expect: two pieces each, in any order."""
        while (handle := self.expected.get()) is not None:
            payload = self.channel.recv(timeout_s, f"a piece of bucket {handle.number}")
            stream = wire.unpack_header(payload.numpy().data).stream
            if stream not in (SCATTER, GATHER):
                raise ChannelError(f"'{self.channel.peer}' sent stream {stream} (expected {SCATTER} or {GATHER})")
            self.arrived[stream].put(self._decoders[stream].decode(payload))


class Reducer:
    """Sums buckets over the members of a data group. `channels` leads from each other member's number to it.

    The channels stay the caller's; nothing else may use them. `timeout_s` is how long a member may be late. Codecs with
    a state keep it per peer and stream.
    """

    def __init__(
        self,
        member: int,
        channels: Mapping[int, Channel],
        timeout_s: float,
        scatter_codec: MakeCodec = raw_fp32,
        gather_codec: MakeCodec = raw_fp32,
    ) -> None:
        self._member = member
        self._num_members = len(channels) + 1
        self._peers = {other: _Peer(channels[other], scatter_codec, gather_codec) for other in sorted(channels)}
        self._gather_codec, self._own_decoder = gather_codec(GATHER), gather_codec(GATHER)
        self._stages: tuple[_Queue[Handle], ...] = (_Queue(), _Queue(), _Queue())
        self._lock = threading.Lock()
        self._open: set[Handle] = set()
        self._num_submitted = 0
        self._error: WantrainError | None = None
        loops = [partial(peer.recv_loop, timeout_s) for peer in self._peers.values()]
        loops += [partial(self._run_stage, i, do) for i, do in enumerate((self._scatter, self._sum, self._gather))]
        self._threads = [
            threading.Thread(target=self._guarded, args=(loop,), name="wantrain-reduce", daemon=True) for loop in loops
        ]
        for thread in self._threads if self._peers else ():
            thread.start()

    def submit(self, bucket: Tensor) -> Handle:
        """Start to sum a flat fp32 CPU tensor in place and return at once; it is the reducer's until it ends."""
        if bucket.dtype != torch.float32 or bucket.dim() != 1 or not bucket.is_contiguous() or bucket.is_cuda:
            raise ValueError(
                f"a bucket is flat contiguous fp32 on the CPU (got {bucket.dtype}, {bucket.dim()} dimensions)"
            )
        with self._lock:
            if self._error is not None:
                raise self._error
            handle = Handle(bucket, self._num_submitted, self._num_members)
            self._num_submitted += 1
            if not self._peers:
                handle.end()
                return handle
            self._open.add(handle)
            for peer in self._peers.values():
                peer.expected.put(handle)
                peer.expected.put(handle)
            self._stages[0].put(handle)
        return handle

    def close(self, timeout_s: float) -> None:
        """End the threads; every bucket must have been waited for."""
        self._stop()
        for thread in self._threads if self._peers else ():
            thread.join(timeout_s)
            if thread.is_alive():
                raise ChannelError(f"reducing did not end within {timeout_s:g} s; a bucket was not waited for")

    def _scatter(self, handle: Handle) -> None:
        for other, peer in self._peers.items():
            peer.channel.send(peer.scatter_codec.encode(handle.piece(other)))

    def _sum(self, handle: Handle) -> None:
        """Add the pieces that this member owns, in member order, and send the sum to all."""
        pieces = [
            handle.piece(member) if member == self._member else self._peers[member].arrived[SCATTER].take()
            for member in range(self._num_members)
        ]
        total = pieces[0].clone()
        for piece in pieces[1:]:
            total += piece
        payload = self._gather_codec.encode(total)
        for peer in self._peers.values():
            peer.channel.send(payload)
        handle.piece(self._member).copy_(self._own_decoder.decode(payload))

    def _gather(self, handle: Handle) -> None:
        for other, peer in self._peers.items():
            handle.piece(other).copy_(peer.arrived[GATHER].take())
        with self._lock:
            self._open.discard(handle)
        handle.end()

    def _run_stage(self, number: int, do: Callable[[Handle], None]) -> None:
        while (handle := self._stages[number].get()) is not None:
            do(handle)
            if number + 1 < len(self._stages):
                self._stages[number + 1].put(handle)

    def _guarded(self, loop: Callable[[], None]) -> None:
        """Run a thread's loop; the first error ends all of them and fails every open bucket."""
        try:
            loop()
        except _StoppedError:
            return
        except WantrainError as error:
            with self._lock:
                self._error = self._error or error
                failed, self._open = self._open, set()
            self._stop()
            for handle in failed:
                handle.end(error)

    def _stop(self) -> None:
        for end in self._stages:
            end.put(None)
        for peer in self._peers.values():
            for waited in (peer.expected, *peer.arrived):
                waited.put(None)
