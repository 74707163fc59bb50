"""A DeepSpeed stage's end of the boundary to one neighbour: channels, codecs and the boxes between them.

    stage n   outbox ══ forward, codec ══► inbox      stage n + 1
              inbox  ◄═ backward, codec ══ outbox
              ◄─ agree: what both ends hold of the coming samples ─►    where the forward codec remembers them

The same parts as wantrain's own jobs have (`pipeline/connect.py`), joined over the engine's pipeline group. Codecs that
remember samples must know one's shape before they are made, so a boundary is opened first and made ready later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wantrain.codec_spec import parse_codec
from wantrain.codecs.aqsgd import AqsgdCodec, entry_bytes_of
from wantrain.codecs.codec import Codec, make_codec
from wantrain.codecs.message_buffer import MessageBuffer
from wantrain.codecs.quantized import key_of
from wantrain.comm.groups import Membership
from wantrain.comm.sender import PIPELINE_PRIORITY, Sender
from wantrain.comm.torch_channel import Opening
from wantrain.errors import WantrainError
from wantrain.pipeline.agreement import Agreement
from wantrain.pipeline.boundary import Inbox, Item, OnError, Outbox, SendLog
from wantrain.pipeline.boundary_codecs import WAYS
from wantrain.pipeline.recorder import Recorder
from wantrain.wire import Transport

_AGREE = "agree"
_AGREE_TRANSPORT = Transport(chunk_bytes=64 * 1024, num_posted=2)
"""Nine bytes a sample and step."""


class Settings(NamedTuple):
    """What all boundaries of an engine have in common; the same on all stages."""

    forward: str
    backward: str
    seed: int
    transport: Transport
    timeout_s: float


class Room(NamedTuple):
    """What a process may take for what it remembers of samples: in memory, then in a folder of its own."""

    ram_bytes: int
    folder: Path | None = None
    file_bytes: int = 0

    def shared(self, count: int) -> Room:
        """Return one of so many equal shares."""
        return self._replace(ram_bytes=self.ram_bytes // count, file_bytes=self.file_bytes // count)


class Step(NamedTuple):
    """What a schedule is about to move: microbatches in order, and the samples of the step after, where known."""

    number: int
    items: Sequence[Item]
    is_training: bool
    upcoming: Sequence[int] | None = None

    @property
    def sample_ids(self) -> list[int]:
        return [sample for item in self.items for sample in item.sample_ids]


class Boundary:
    """One end of the boundary after stage `number`; the neighbour is that stage, or the one after it."""

    def __init__(
        self,
        number: int,
        membership: Membership,
        sender: Sender,
        recorder: Recorder,
        settings: Settings,
        room: Room,
    ) -> None:
        """Connect to the neighbour, who does so too; raise ChannelError where it doesn't come.

        `membership` is of the pipeline's stages. `room` is for what is remembered of samples.
        """
        self.is_after = membership.rank == number
        """Whether the neighbour holds the layers after this stage's."""
        self._number, self._settings, self._room, self._recorder = number, settings, room, recorder
        peer_rank = number + 1 if self.is_after else number
        self.peer = f"stage {peer_rank}"
        self._logs = {kind: SendLog(recorder, self.peer) for kind in (*WAYS, _AGREE)}
        self._boxes: tuple[Outbox, Inbox] | None = None
        self._buffer: MessageBuffer | None = None
        kinds = [*WAYS, _AGREE] if parse_codec(settings.forward).remembers else WAYS

        asked = [
            Opening(
                f"{kind}/{number}", peer_rank, self.peer, sender,
                _AGREE_TRANSPORT if kind == _AGREE else settings.transport, PIPELINE_PRIORITY, self._logs[kind],
            )
            for kind in kinds
        ]  # fmt: skip
        self._channels = dict(zip(kinds, membership.open_channels(asked, settings.timeout_s), strict=True))

    @property
    def remembers(self) -> bool:
        """Whether activations' samples must be told apart."""
        return parse_codec(self._settings.forward).remembers

    @property
    def is_ready(self) -> bool:
        return self._boxes is not None

    def make_ready(self, sample_shape: Sequence[int], device: torch.device, on_error: OnError) -> None:
        """Make the codecs for samples of this shape, before the first tensor; tensors will come on `device`."""
        timeout_s = self._settings.timeout_s
        out, back = WAYS if self.is_after else reversed(WAYS)
        sending, receiving = (self._make_codec(way, tuple(sample_shape), device) for way in (out, back))
        outbox = Outbox(
            self._channels[out], sending, self._recorder, self._logs[out], on_error, self._agreement(sending)
        )
        inbox = Inbox(self._channels[back], receiving, self._recorder, timeout_s, device, self._agreement(receiving))
        self._boxes = outbox, inbox

    def _make_codec(self, way: str, sample_shape: tuple[int, ...], device: torch.device) -> Codec:
        name = self._settings.forward if way == "forward" else self._settings.backward
        spec, seed = parse_codec(name), key_of(self._settings.seed, self._number, WAYS.index(way))
        if not spec.remembers:
            return make_codec(name, seed=seed)
        entry_bytes = entry_bytes_of(spec, sample_shape)
        side = "sender" if self.is_after else "receiver"
        self._buffer = MessageBuffer(
            self._number, entry_bytes, ram_bytes=self._room.ram_bytes, folder=self._room.folder,
            file_bytes=self._room.file_bytes, device=device, name=f"{side}-0",
        )  # fmt: skip
        return AqsgdCodec(spec, self._buffer, seed=seed)

    def _agreement(self, codec: Codec) -> Agreement | None:
        return Agreement(self._channels[_AGREE], codec, self._settings.timeout_s) if codec.spec.remembers else None

    def begin(self, step: Step) -> None:
        """Post what a step receives, and offer to agree on its samples and on the next one's."""
        outbox, inbox = self._ready_boxes()
        if step.is_training:
            outbox.offer(step.sample_ids)
            inbox.offer(step.sample_ids)
        if step.is_training or not self.is_after:
            inbox.expect(step.items, f"{'B' if self.is_after else 'F'}{{}} of step {step.number}")
        if step.is_training and step.upcoming is not None:
            inbox.offer(step.upcoming)

    def put(self, tensor: Tensor, step: Step, place: int) -> None:
        """Send the `place`-th tensor of a step, of a microbatch that comes as `place`-th."""
        outbox, _ = self._ready_boxes()
        outbox.put(tensor, step.items[place])
        if place == len(step.items) - 1 and step.is_training and step.upcoming is not None:
            outbox.offer(step.upcoming)

    def take(self, step: Step, place: int) -> Tensor:
        """Return the `place`-th tensor that the neighbour sends in a step, once it is there."""
        return self._ready_boxes()[1].take(step.items[place].microbatch)

    def _ready_boxes(self) -> tuple[Outbox, Inbox]:
        assert self._boxes is not None, "a boundary is made ready before anything goes over it"
        return self._boxes

    def fail(self, error: WantrainError) -> None:
        """End every wait for the neighbour with an error of this process."""
        if self._boxes is not None:
            self._boxes[1].fail(error)

    def raise_if_failed(self) -> None:
        """Raise the error that ended one of this process's threads, if one has."""
        if self._boxes is not None:
            self._boxes[1].raise_if_failed()

    @property
    def sent_bytes(self) -> int:
        """Bytes of payloads that this end has sent."""
        return sum(channel.stats.payload_bytes_sent for channel in self._channels.values())

    def close(self, patience_s: float, *, is_orderly: bool) -> None:
        """Part from the neighbour, who does so too. Not `is_orderly`: whatever waits there is given up."""
        ends: list[Callable[[], None]] = [self._close_boxes, partial(self._close_channels, patience_s)]
        for end in ends if is_orderly else reversed(ends):
            end()
        if self._buffer is not None:
            self._buffer.close()

    def _close_boxes(self) -> None:
        for box in self._boxes or ():
            box.close()

    def _close_channels(self, patience_s: float) -> None:
        closing: list[Callable[[], None]] = [partial(one.close, patience_s) for one in self._channels.values()]
        with ThreadPoolExecutor(len(closing)) as pool:
            list(pool.map(lambda close: close(), closing))
