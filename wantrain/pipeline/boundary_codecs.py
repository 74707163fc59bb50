"""The codecs of one rank's boundaries: made as the plan says, and what they keep from step to step.

That is the message buffers of codecs that remember samples, and the bits that a guard has asked for. A boundary is
named by the layer that it comes after, so that both outlive the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from wantrain.codec_spec import parse_codec
from wantrain.codecs.aqsgd import AqsgdCodec, entry_bytes_of
from wantrain.codecs.codec import Codec, make_codec
from wantrain.codecs.message_buffer import MessageBuffer
from wantrain.codecs.quantized import key_of
from wantrain.errors import PlanError
from wantrain.pipeline.guard import Guard
from wantrain.plan import Plan
from wantrain.run_directory import CodecLoss

WAYS = ("forward", "backward")
"""A boundary's two channels. On one alone, what one end tells the other about room for more would queue behind its own
payloads."""


class CodecSettings(NamedTuple):
    """What codecs need to know beyond the plan.

    `sample_shape` is one sample's activation between any two layers ([seq, hidden]), for codecs that remember samples;
    `seed` keys what is random, the same on all ranks; the bytes are what all message buffers of a rank may take
    together, in memory, in files in `folder`, on the device; `say` is told, a line each, what a user should know.
    """

    sample_shape: tuple[int, ...] | None = None
    seed: int = 0
    ram_bytes: int = 1 << 30
    file_bytes: int = 0
    folder: Path | None = None
    device_bytes: int = 0
    say: Callable[[str], None] = lambda _: None


DEFAULT_SETTINGS = CodecSettings()


def codec_name(plan: Plan, boundary: int, way: str) -> str:
    """Return what the plan calls the codec of one way over a boundary."""
    chosen = plan.boundaries[boundary]
    return chosen.forward_codec if way == "forward" else chosen.backward_codec


def needs_agreement(plan: Plan, boundary: int, way: str) -> bool:
    """Say whether the ends of a boundary must agree before they send: on what they remember, or on more bits."""
    spec = parse_codec(codec_name(plan, boundary, way))
    return spec.remembers or (plan.max_codec_error is not None and spec.kind != "raw")


def make_end(
    name: str, layer: int, way: str, side: str, settings: CodecSettings, num_buffers: int = 1,
    device: torch.device | str = "cpu",
) -> Codec:  # fmt: skip
    """Return one end of a codec over the boundary before `layer`; `side` names its message buffer, where it has one.

    `num_buffers` share what the settings allow. Raise PlanError where a codec that remembers lacks a sample's shape.
    """
    spec, seed = parse_codec(name), key_of(settings.seed, layer, WAYS.index(way))
    if not spec.remembers:
        return make_codec(name, seed=seed)
    if settings.sample_shape is None:
        raise PlanError(
            "codecs that remember samples need to know one; say what one looks like (CodecSettings.sample_shape)"
        )
    buffer = MessageBuffer(
        layer, entry_bytes_of(spec, settings.sample_shape), ram_bytes=settings.ram_bytes // num_buffers,
        folder=settings.folder, file_bytes=settings.file_bytes // num_buffers, device=device,
        device_bytes=settings.device_bytes // num_buffers, name=side, on_problem=settings.say,
    )  # fmt: skip
    return AqsgdCodec(spec, buffer, seed=seed)


class BoundaryCodecs:
    """Makes one rank's codecs."""

    def __init__(self, plan: Plan, rank: int, settings: CodecSettings, device: torch.device | str = "cpu") -> None:
        self._plan, self._settings, self._device = plan, settings, device
        self._stage, self._replica = plan.stage_of(rank), plan.replica_of(rank)
        self._guards: dict[str, Guard] = {}
        self._raisable: dict[str, Codec] = {}
        self.buffers: list[MessageBuffer] = []

    def sender(self, boundary: int, way: str, peer: str) -> tuple[Codec, Guard | None]:
        """Return the codec that encodes for `peer`, and who watches what it loses, where anything can be lost."""
        codec = self._make(boundary, way, "sender")
        if codec.spec.kind == "raw":
            return codec, None
        if needs_agreement(self._plan, boundary, way):
            self._raisable[self._key(boundary, way)] = codec
        guard = Guard(codec, self._plan.max_codec_error, self._say_of(f"to {peer}/{way}: "))
        self._guards[f"{peer}/{way}"] = guard
        return codec, guard

    def receiver(self, boundary: int, way: str) -> Codec:
        """Return the codec that decodes what comes over a boundary."""
        return self._make(boundary, way, "receiver")

    def losses(self) -> dict[str, CodecLoss]:
        """Return what was lost in the newest step, by peer and way."""
        return {
            name: CodecLoss(**guard.last._asdict(), bits=guard.bits)
            for name, guard in self._guards.items()
            if guard.last is not None
        }

    def wanted_bits(self) -> dict[str, int]:
        """Return how many bits this rank's senders want next, by boundary, way and replica; what a checkpoint keeps."""
        return {key: codec.wanted_bits for key, codec in self._raisable.items()}

    def want_bits(self, saved: Mapping[str, int]) -> None:
        """Ask at the next agreement for no fewer bits than were wanted: this replica's, or any's where it had none."""
        for key, codec in self._raisable.items():
            boundary = key.rpartition("/")[0]
            others = [bits for name, bits in saved.items() if name.rpartition("/")[0] == boundary]
            codec.wanted_bits = max(codec.wanted_bits, saved.get(key, max(others, default=0)))

    def close(self) -> None:
        """Close the message buffers."""
        for buffer in self.buffers:
            buffer.close()

    def _make(self, boundary: int, way: str, side: str) -> Codec:
        codec = make_end(
            codec_name(self._plan, boundary, way), self._layer(boundary), way, f"{side}-{self._replica}",
            self._settings, self._num_buffers(), self._device,
        )  # fmt: skip
        if isinstance(codec, AqsgdCodec):
            self.buffers.append(codec.buffer)
        return codec

    def _num_buffers(self) -> int:
        """Return how many message buffers share what this rank may take."""
        boundaries = [one for one in (self._stage - 1, self._stage) if 0 <= one < self._plan.num_stages - 1]
        return sum(parse_codec(codec_name(self._plan, one, "forward")).remembers for one in boundaries) or 1

    def _layer(self, boundary: int) -> int:
        return self._plan.stages[boundary].end_layer

    def _key(self, boundary: int, way: str) -> str:
        return f"{self._layer(boundary)}/{way}/{self._replica}"

    def _say_of(self, prefix: str) -> Callable[[str], None]:
        return lambda text: self._settings.say(prefix + text)
