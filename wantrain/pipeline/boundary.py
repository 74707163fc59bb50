"""The two ends of a stage boundary: an outbox that encodes and sends, an inbox that receives and decodes.

Each has a thread of its own, so that encoding, the wire and decoding of other microbatches go on while the rank
computes. The executor only puts tensors in and takes tensors out:

    compute thread    F0 ──put──┐        F1 ──put──┐               take(B0) ── B0
    outbox thread               └ encode, send     └ encode, send
    inbox thread                                          receive, decode ─┘
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wantrain.codecs.codec import Codec
from wantrain.comm.channel import Channel
from wantrain.errors import CodecError, RunError, WantrainError
from wantrain.pipeline.agreement import Agreement
from wantrain.pipeline.guard import Guard
from wantrain.pipeline.recorder import Recorder
from wantrain.pipeline.side_stream import SideStream


class Item(NamedTuple):
    """A microbatch on its way: the samples in it (none: they are to be remembered by nobody), and the step."""

    microbatch: int
    sample_ids: Sequence[int] = ()
    step: int = 0


class _Worker(threading.Thread):
    """A thread that handles queued work in order; the error that ends it is kept, and told to `on_error`."""

    def __init__(self, name: str, handle: Callable[..., None], on_error: OnError) -> None:
        super().__init__(name=name, daemon=True)
        self._handle = handle
        self._on_error = on_error
        self._work: queue.SimpleQueue[tuple[object, ...] | None] = queue.SimpleQueue()
        self.error: WantrainError | None = None
        self.start()

    def submit(self, *work: object) -> None:
        if self.error is not None:
            raise self.error
        self._work.put(work)

    def run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                self._handle(*work)
            except Exception as error:  # noqa: BLE001  the thread's edge: whoever waits must hear of it
                self.error = error if isinstance(error, WantrainError) else RunError(f"{self.name} failed: {error}")
                self._on_error(self.error)
                return

    def finish(self) -> None:
        """Let the queued work end, then the thread."""
        self._work.put(None)
        self.join()


OnError = Callable[[WantrainError], None]
"""Told of the error that ended a box's thread, in that thread."""


class SendLog:
    """Notes what a channel has sent; `microbatches` names the channel's payloads in order, where they have a name."""

    def __init__(self, recorder: Recorder, peer: str) -> None:
        self.microbatches: list[int] = []
        self._recorder, self._peer = recorder, peer

    def __call__(self, index: int, start_s: float, end_s: float, num_bytes: int) -> None:
        microbatch = self.microbatches[index] if index < len(self.microbatches) else -1
        self._recorder.add("send", start_s, end_s, microbatch, self._peer, num_bytes)


class Outbox:
    """Encodes tensors and sends them to a neighbour, in the order in which they are put."""

    def __init__(
        self,
        channel: Channel,
        codec: Codec,
        recorder: Recorder,
        log: SendLog,
        on_error: OnError = lambda _: None,
        agreement: Agreement | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.channel, self._codec, self._recorder, self._log = channel, codec, recorder, log
        self._agreement, self.guard = agreement, guard
        self._side: SideStream | None = None
        self._worker = _Worker(f"outbox to {channel.peer}", self._do, on_error)
        self.raw_bytes = 0

    def put(self, tensor: Tensor, item: Item) -> None:
        """Send a tensor some time soon; it must not be written to from now on."""
        self.raw_bytes += tensor.numel() * tensor.element_size()
        self._side = self._side or SideStream(tensor.device)
        self._worker.submit(tensor, item, self._side, self._side.mark())

    def offer(self, sample_ids: Sequence[int]) -> None:
        """Tell the other end, once all that was put is encoded, what this one holds of the samples that come next."""
        if self._agreement is not None:
            self._worker.submit(sample_ids)

    def _do(self, *work: Any) -> None:
        if len(work) > 1:
            self._encode_and_send(*work)
        elif self._agreement is not None:
            self._agreement.offer(*work)

    def _encode_and_send(self, tensor: Tensor, item: Item, side: SideStream, mark: torch.cuda.Event | None) -> None:
        if self._agreement is not None and item.sample_ids:
            self._agreement.settle()
        self._codec.moment = item.step
        with self._recorder.span("encode", item.microbatch, self.channel.peer), side.after(mark, tensor):
            payload = self._encode(tensor, item)
        self._log.microbatches.append(item.microbatch)
        self.channel.send(payload)

    def _encode(self, tensor: Tensor, item: Item) -> Tensor:
        try:
            if self.guard is not None and item.sample_ids:
                return self.guard.encode(tensor, item.sample_ids, item.step)
            return self._codec.encode(tensor, item.sample_ids)
        except CodecError as caught:
            where = f"microbatch {item.microbatch} of step {item.step}, on its way to '{self.channel.peer}'"
            raise CodecError(f"{caught} (in {where})") from None

    def close(self) -> None:
        self._worker.finish()


class Inbox:
    """Receives and decodes what a neighbour sends; every receive is posted ahead of need."""

    def __init__(
        self,
        channel: Channel,
        codec: Codec,
        recorder: Recorder,
        timeout_s: float,
        device: torch.device | str = "cpu",
        agreement: Agreement | None = None,
    ) -> None:
        self._channel, self._codec, self._recorder = channel, codec, recorder
        self._timeout_s, self._device, self._agreement = timeout_s, device, agreement
        self._side = SideStream(device)
        self._arrived: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}
        self._changed = threading.Condition()
        self._failure: WantrainError | None = None
        self._worker = _Worker(f"inbox from {channel.peer}", self._do, self.fail)

    def expect(self, items: Sequence[Item], awaited: str) -> None:
        """Say which microbatches come next, in order; `awaited` names them in a time-out ("2F{}" of step 17)."""
        for item in items:
            self._worker.submit(item, awaited)

    def offer(self, sample_ids: Sequence[int]) -> None:
        """Tell the other end, once all that is expected is decoded, what this one holds of the samples to come."""
        if self._agreement is not None:
            self._worker.submit(sample_ids)

    def _do(self, *work: Any) -> None:
        if len(work) == 2:
            self._receive_and_decode(*work)
        elif self._agreement is not None:
            self._agreement.offer(*work)

    def _receive_and_decode(self, item: Item, awaited: str) -> None:
        if self._agreement is not None and item.sample_ids:
            self._agreement.settle()
        payload = self._channel.recv(self._timeout_s, awaited.format(item.microbatch))
        self._codec.moment = item.step
        with self._recorder.span("decode", item.microbatch, self._channel.peer), self._side.after(None):
            tensor = self._codec.decode(payload, item.sample_ids, self._device)
            mark = self._side.mark()
        with self._changed:
            self._arrived[item.microbatch] = tensor, mark
            self._changed.notify_all()

    def take(self, microbatch: int) -> Tensor:
        """Return a microbatch's tensor, waiting for it if need be; the wait is noted with the neighbour's name."""
        start_s = time.monotonic()
        with self._changed:
            if microbatch not in self._arrived:
                self._changed.wait_for(lambda: microbatch in self._arrived or self._failure is not None)
                self._recorder.add("wait", start_s, time.monotonic(), microbatch, self._channel.peer)
            if microbatch in self._arrived:
                return self._side.hand_over(*self._arrived.pop(microbatch))
            assert self._failure is not None
            raise self._failure

    def fail(self, error: WantrainError) -> None:
        """End every wait with an error, this rank's own: here, or in another of its boxes."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def raise_if_failed(self) -> None:
        """Raise the error that a thread of this rank ended with, if one has."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        self._worker.finish()
