"""The sum of gradients over the replicas of a stage, in two latencies, with the same bits everywhere.

A ring needs 2 (n−1) latencies; on a long link the latency is what costs. Here every piece goes straight to its owner,
which adds and sends the sum straight to everybody, for the same bytes per member:

    member 0 │ a0 b0 c0 │ ─scatter─►  member 0 owns a: a0 + a1 + a2 ─gather─► │ a b c │
    member 1 │ a1 b1 c1 │             member 1 owns b: b0 + b1 + b2           │ a b c │
    member 2 │ a2 b2 c2 │             member 2 owns c: c0 + c1 + c2           │ a b c │

The owner adds in member order, whatever arrives first, and takes its own sum through the codec as the others do; so
the bits depend on nothing but the values, and are the same on all members. Buckets are handled in the order of
`submit`, which must be the same on all members. Three threads of stages keep several buckets under way: one is
scattered while the one before is summed and the one before that gathered; so compressing one overlaps the wire of the
others.

With an `error_feedback:…` codec a bucket has a residual of its own layout. Both ways lose something, and every value
has one residual: at another member's pieces what this member's part lost on the way to the owner, at its own piece what
the sum lost on the way to all (its own part goes into the sum unharmed). So residuals cost the bytes of the gradients
once:

    residual of member 1   │ a: lost of a1 │ b: lost of b0 + b1 + b2 │ c: lost of c1 │
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
from wantrain.codec_spec import parse_codec
from wantrain.codecs.codec import Payload, make_codec
from wantrain.codecs.error_feedback import ErrorFeedback
from wantrain.comm.channel import Channel
from wantrain.errors import ChannelError, CodecError, RunError, WantrainError

SCATTER, GATHER = 0, 1
"""Streams: what a payload on a channel belongs to, told by its header, since they mix."""

_PLAIN = 2
"""Added to the stream of buckets that go uncompressed."""

_PIECE_VALUES = 256
"""Pieces begin at multiples of the largest group that shares a scale, and so of 64 bytes: kernels give the same bits
only for the same alignment."""

BUCKETS_PER_STEP = 1 << 20
"""Buckets are numbered step · this + place in the step: a number that any process finds again, also after a restart."""

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


def piece_bounds(num_values: int, num_members: int) -> list[int]:
    """Return where the members' pieces begin, and the end: equal to a rounding, aligned, some empty if need be."""
    share = -(-num_values // num_members)
    aligned = -(-share // _PIECE_VALUES) * _PIECE_VALUES
    return [min(aligned * member, num_values) for member in range(num_members + 1)]


class Handle:
    """A bucket on its way."""

    def __init__(self, bucket: Tensor, residual: Tensor | None, number: int, num_members: int, is_plain: bool) -> None:
        self.bucket = bucket
        self.number = number
        self.is_plain = is_plain
        self._residual = residual
        self._bounds = piece_bounds(bucket.numel(), num_members)
        self._error: WantrainError | None = None
        self._ended = threading.Event()

    def __str__(self) -> str:
        step, place = divmod(self.number, BUCKETS_PER_STEP)
        return f"bucket {place} of step {step}"

    def piece(self, member: int) -> Tensor:
        """Return the part of the bucket that a member owns."""
        return self.bucket[self._bounds[member] : self._bounds[member + 1]]

    def residual(self, member: int) -> Tensor | None:
        """Return what is still owed of the part that a member owns; None: nothing is kept."""
        if self._residual is None or self.is_plain:
            return None
        return self._residual[self._bounds[member] : self._bounds[member + 1]]

    def wait(self, timeout_s: float) -> Tensor:
        """Return the bucket, now the sum over all members; raise ChannelError where a member is late or gone."""
        if not self._ended.wait(timeout_s):
            raise ChannelError(f"{self} not reduced within {timeout_s:g} s; is every replica running?")
        if self._error is not None:
            raise self._error
        return self.bucket

    def end(self, error: WantrainError | None = None) -> None:
        """Mark as reduced, or as failed; only the reducer calls this."""
        self._error = error
        self._ended.set()


class _Encoders:
    """The sending ends of one stream: for compressed buckets, and for those that go plain."""

    def __init__(self, codec_name: str, stream: int) -> None:
        self._coded, self._plain = ErrorFeedback(codec_name, stream), ErrorFeedback("raw:fp32", stream + _PLAIN)

    def encode(self, handle: Handle, member: int) -> Payload:
        """Return the payload of one piece of a bucket."""
        encoder = self._plain if handle.is_plain else self._coded
        try:
            return encoder.encode(handle.piece(member), handle.residual(member), handle.number)
        except CodecError as caught:
            raise CodecError(f"{handle}: {caught}") from None

    def encode_sum(self, total: Tensor, handle: Handle, member: int) -> tuple[Payload, Tensor]:
        """Return the payload of a piece's sum, and the sum as all members will see it."""
        encoder = self._plain if handle.is_plain else self._coded
        try:
            return encoder.encode_and_decode(total, handle.residual(member), handle.number)
        except CodecError as caught:
            raise CodecError(f"the sum of {handle}: {caught}") from None


class _Decoders:
    """The receiving ends of one stream of one peer."""

    def __init__(self, codec_name: str, stream: int) -> None:
        self._coded, self._plain = make_codec(codec_name, stream), make_codec("raw:fp32", stream + _PLAIN)

    def decode(self, payload: Payload, handle: Handle) -> Tensor:
        """Return the piece of a bucket that a payload holds."""
        decoder = self._plain if handle.is_plain else self._coded
        decoder.moment = handle.number
        return decoder.decode(payload)


class _Peer:
    """One other member: the channel to it, what encodes for it, and what has arrived from it."""

    def __init__(self, channel: Channel, codec_name: str) -> None:
        self.channel = channel
        self.encoders = _Encoders(codec_name, SCATTER)
        self.expected: _Queue[Handle] = _Queue()
        self._arrived: tuple[_Queue[Payload], _Queue[Payload]] = (_Queue(), _Queue())
        self._decoders = (_Decoders(codec_name, SCATTER), _Decoders(codec_name, GATHER))

    def recv_loop(self, timeout_s: float) -> None:
        """Receive what the submitted buckets make this member expect: two pieces each, in any order."""
        while (handle := self.expected.get()) is not None:
            payload = self.channel.recv(timeout_s, f"a piece of {handle}")
            stream = wire.unpack_header(payload.numpy().data).stream
            if stream >= 2 * _PLAIN:
                raise ChannelError(f"'{self.channel.peer}' sent stream {stream} (expected 0 to {2 * _PLAIN - 1})")
            self._arrived[stream % _PLAIN].put(payload)

    def take(self, stream: int, handle: Handle) -> Tensor:
        """Wait for this peer's piece of a bucket and return it, decoded."""
        return self._decoders[stream].decode(self._arrived[stream].take(), handle)

    def stop(self) -> None:
        """End every wait for this peer."""
        for waited in (self.expected, *self._arrived):
            waited.put(None)


class Reducer:
    """Sums buckets over the members of a data group. `channels` leads from each other member's number to it.

    The channels stay the caller's; nothing else may use them. `timeout_s` is how long a member may be late. `codec`
    names how pieces travel, both ways; all members use the same.
    """

    def __init__(self, member: int, channels: Mapping[int, Channel], timeout_s: float, codec: str = "raw:fp32") -> None:
        self.member = member
        self.num_members = len(channels) + 1
        self.needs_residuals = parse_codec(codec).has_feedback and self.num_members > 1
        self._peers = {other: _Peer(channels[other], codec) for other in sorted(channels)}
        self._sum_encoders = _Encoders(codec, GATHER)
        self._stages: tuple[_Queue[Handle], ...] = (_Queue(), _Queue(), _Queue())
        self._lock = threading.Lock()
        self._open: set[Handle] = set()
        self._next_number = 0
        self._error: WantrainError | None = None
        loops = [partial(peer.recv_loop, timeout_s) for peer in self._peers.values()]
        loops += [partial(self._run_stage, i, do) for i, do in enumerate((self._scatter, self._sum, self._gather))]
        self._threads = [
            threading.Thread(target=self._guarded, args=(loop,), name="wantrain-reduce", daemon=True) for loop in loops
        ]
        for thread in self._threads if self._peers else ():
            thread.start()

    def begin_step(self, step: int) -> None:
        """Number the buckets submitted from here on by their step; all members say the same."""
        self._next_number = step * BUCKETS_PER_STEP

    def submit(self, bucket: Tensor, residual: Tensor | None = None, is_plain: bool = False) -> Handle:
        """Start to sum a flat fp32 CPU tensor in place and return at once; it is the reducer's until it ends.

        `residual`, of the same shape, is this bucket's own from step to step; it too is the reducer's until then.
        `is_plain`: in full precision, whatever the codec, the residual left alone; all members say the same.
        """
        for what, tensor in (("bucket", bucket), ("residual", residual)):
            if tensor is not None and not _is_flat(tensor, bucket.numel()):
                raise ValueError(
                    f"a {what} is flat contiguous fp32 on the CPU (got {tensor.dtype}, {tensor.dim()} dimensions)"
                )
        with self._lock:
            if self._error is not None:
                raise self._error
            handle = Handle(bucket, residual, self._next_number, self.num_members, is_plain)
            self._next_number += 1
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
            peer.channel.send(peer.encoders.encode(handle, other))

    def _sum(self, handle: Handle) -> None:
        """Add the pieces that this member owns, in member order, and send the sum to all."""
        pieces = [
            handle.piece(member) if member == self.member else self._peers[member].take(SCATTER, handle)
            for member in range(self.num_members)
        ]
        total = pieces[0].clone()
        for piece in pieces[1:]:
            total += piece
        payload, seen = self._sum_encoders.encode_sum(total, handle, self.member)
        for peer in self._peers.values():
            peer.channel.send(payload)
        handle.piece(self.member).copy_(seen)

    def _gather(self, handle: Handle) -> None:
        for other, peer in self._peers.items():
            handle.piece(other).copy_(peer.take(GATHER, handle))
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
        except Exception as caught:  # noqa: BLE001  the thread's edge: whoever waits must hear of it
            error = caught if isinstance(caught, WantrainError) else RunError(f"reducing gradients failed: {caught}")
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
            peer.stop()


def _is_flat(tensor: Tensor, num_values: int) -> bool:
    is_own_shape = tensor.dim() == 1 and tensor.numel() == num_values and tensor.is_contiguous()
    return is_own_shape and tensor.dtype == torch.float32 and not tensor.is_cuda
