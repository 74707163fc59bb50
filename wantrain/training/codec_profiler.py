"""Measure how many values per second this machine's codecs get through: encode and decode, direct and delta.

The tensor is large enough to leave every cache and small enough for any machine. Four bits stand for all: what the
arithmetic costs hardly depends on how many bits are kept.
"""

from __future__ import annotations

import statistics
import time
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from wantrain.codec_spec import parse_codec
from wantrain.codecs.aqsgd import AqsgdCodec, entry_bytes_of
from wantrain.codecs.buffer_file import slot_bytes
from wantrain.codecs.codec import Codec, make_codec
from wantrain.codecs.message_buffer import MessageBuffer
from wantrain.profile import CodecSpeed

_SHAPE = (1, 1024, 1600)
"""One sample of GPT-2 XL at a boundary: 6.6 MB in fp32."""

_NUM_ROUNDS = 7
_DIRECT, _DELTA = "quantized:4", "aqsgd:4"


class _Ends(NamedTuple):
    sender: Codec
    receiver: Codec
    ids: list[int]

    def agree(self) -> None:
        """Settle on what both hold, as neighbours do before every batch."""
        views = self.sender.view(self.ids), self.receiver.view(self.ids)
        self.sender.agree(self.ids, *views)
        self.receiver.agree(self.ids, *views[::-1])


def measure_codecs(device: torch.device) -> CodecSpeed:
    """Measure on `device`, with the threads that torch now has."""
    tensor = torch.randn(_SHAPE, device=device)
    direct_speeds = _values_per_s(_Ends(make_codec(_DIRECT), make_codec(_DIRECT), []), tensor, device)
    with closing(_remembering(device)) as sent, closing(_remembering(device)) as received:
        sender, receiver = (AqsgdCodec(parse_codec(_DELTA), buffer) for buffer in (sent, received))
        delta_speeds = _values_per_s(_Ends(sender, receiver, [0]), tensor, device)
    return CodecSpeed(
        direct_encode=direct_speeds[0],
        direct_decode=direct_speeds[1],
        delta_encode=delta_speeds[0],
        delta_decode=delta_speeds[1],
    )


def _remembering(device: torch.device) -> MessageBuffer:
    entry_bytes = entry_bytes_of(parse_codec(_DELTA), _SHAPE[1:])
    return MessageBuffer(1, entry_bytes, ram_bytes=4 * slot_bytes(entry_bytes), device=device)


def _values_per_s(ends: _Ends, tensor: Tensor, device: torch.device) -> tuple[float, float]:
    """Return the median speeds of encode and decode; the first round compiles, and is a first visit."""
    encode_s, decode_s = [], []
    for _ in range(_NUM_ROUNDS + 2):
        ends.agree()
        began = time.perf_counter()
        payload = ends.sender.encode(tensor, ends.ids)
        sent = _now_s(device)
        payload = payload.clone()
        received = time.perf_counter()
        ends.receiver.decode(payload, ends.ids, device)
        encode_s.append(sent - began)
        decode_s.append(_now_s(device) - received)
        tensor = tensor + 0.01 * torch.randn_like(tensor)
    return tensor.numel() / statistics.median(encode_s[2:]), tensor.numel() / statistics.median(decode_s[2:])


def _now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
