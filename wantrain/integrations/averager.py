"""The average of flat gradients over a process group of torch.distributed, through a codec: what hooks are made of.

Every piece goes through the codec straight to its owner and the sum straight back (`comm/allreduce.py`), over
connections of the averager's own. All members end with the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor

from wantrain.codec_spec import check_gradient_codec
from wantrain.comm.allreduce import Handle, Reducer
from wantrain.comm.channel import Channel, TwoWay
from wantrain.comm.groups import Membership, join_process_group
from wantrain.comm.sender import REDUCE_PRIORITY, Sender
from wantrain.comm.torch_channel import Opening
from wantrain.errors import ChannelError
from wantrain.plan import DEFAULT_BUCKET_BYTES
from wantrain.wire import Transport, transport_for

PIECE_VALUES = DEFAULT_BUCKET_BYTES // 4
"""Other programs' buckets are large: in pieces, compressing one overlaps the wire of the others."""

_AT_EXIT_S = 20.0
"""Chosen: members end within seconds of each other, or not at all."""


class Averager:
    """One member's part. Every member makes its own, in the same order, and averages the same tensors in one order."""

    def __init__(
        self,
        codec: str,
        process_group: dist.ProcessGroup | None,
        *,
        bytes_per_s: float,
        latency_s: float,
        timeout_s: float,
    ) -> None:
        """Connect to all members of the group (default: torch's own).

        `bytes_per_s` and one-way `latency_s` say how many connections a link gets and how much is under way on it.
        `timeout_s`: how late a member may be. Raises ConfigError for a codec that can't do it or without a process
        group, ChannelError where a member doesn't come.
        """
        check_gradient_codec(codec)
        self.timeout_s = timeout_s
        self._membership = join_process_group(process_group, timeout_s)
        self.world_size = self._membership.world_size
        self._channels = open_to_all(self._membership, transport_for(bytes_per_s, latency_s), timeout_s)
        self._reducer = Reducer(self._membership.rank, self._channels, timeout_s, codec)
        self.needs_residuals = self._reducer.needs_residuals

    def begin_step(self, step: int) -> None:
        """Number what is averaged from here on by its step; all members say the same."""
        self._reducer.begin_step(step)

    def start(self, flat: Tensor, residual: Tensor | None = None) -> list[Handle]:
        """Start to sum a flat fp32 CPU tensor in place, piece by piece; wait for each handle.

        `residual`, of the same shape, is kept by the caller for this tensor's next turn, where `needs_residuals`.
        """
        pieces = torch.split(flat, PIECE_VALUES)
        owed: Sequence[Tensor | None] = [None] * len(pieces)
        if residual is not None:
            owed = torch.split(residual, PIECE_VALUES)
        return [self._reducer.submit(piece, rest) for piece, rest in zip(pieces, owed, strict=True)]

    @property
    def sent_bytes(self) -> int:
        """Bytes of payloads that this member has sent."""
        return sum(channel.stats.payload_bytes_sent for channel in self._channels.values())

    def close(self, patience_s: float) -> None:
        """Part from the other members, who do so too; raise ChannelError where one is late, or gone."""
        self._reducer.close(patience_s)
        part(self._membership, self._channels.values(), patience_s)


def host_values(buffer: Tensor) -> Tensor:
    """Return a flat tensor's values as an averager takes them: itself where it is fp32 in host memory, else a copy."""
    if buffer.device.type == "cpu" and buffer.dtype == torch.float32:
        return buffer
    return buffer.to("cpu", torch.float32)


def open_to_all(membership: Membership, transport: Transport, timeout_s: float) -> dict[int, Channel]:
    """Open a line for each way with every other member: see `pipeline/connect.py`."""
    rank, sender = membership.rank, Sender(None)
    peers = [peer for peer in range(membership.world_size) if peer != rank]
    asked = [
        Opening(f"{way}/{min(rank, peer)}-{max(rank, peer)}", peer, f"rank {peer}", sender, transport, REDUCE_PRIORITY)
        for peer in peers
        for way in (("up", "down") if peer > rank else ("down", "up"))
    ]
    opened = iter(membership.open_channels(asked, timeout_s))
    return {peer: TwoWay(out, back) for peer, out, back in zip(peers, opened, opened, strict=True)}


def part(membership: Membership, channels: Collection[Channel], patience_s: float) -> None:
    """Close all lines at once, then leave together; raise ChannelError where a member is late, or gone."""
    with ThreadPoolExecutor(max(1, len(channels))) as pool:
        list(pool.map(lambda channel: channel.close(patience_s), channels))
    membership.leave(patience_s)


def close_at_exit(close: Callable[[float], None]) -> None:
    """Close when the program ends, while threads still can; a member that is gone is no news by then."""

    def quietly() -> None:
        with suppress(ChannelError):
            close(_AT_EXIT_S)

    threading._register_atexit(quietly)  # type: ignore[attr-defined]  # atexit's are too late for threads
