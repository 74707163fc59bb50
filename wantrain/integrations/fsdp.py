"""Compressed gradients in torch's FSDP2: one call after `fully_shard`, and all else stays as it is.

    fully_shard(model)
    compressed = fsdp.compress(model, "error_feedback:quantized:4")

FSDP's backward gives every member the mean gradient of its own shard, a reduce-scatter for each group of parameters.
Here every piece goes through the codec straight to its owner, which adds in member order, over wantrain's connections.
With error feedback each group keeps what its pieces lost on the way. It takes FSDP's documented way for that,
`set_custom_reduce_scatter`.

Weights travel as FSDP sends them, whole, once or twice a step: over a slow network that is then most of it, and DDP's
hook (ddp.py) or a pipeline the better choice where the model fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wantrain.codec_spec import check_gradient_codec, parse_codec
from wantrain.codecs.codec import make_codec
from wantrain.codecs.error_feedback import ErrorFeedback
from wantrain.comm.groups import join_process_group
from wantrain.errors import ConfigError
from wantrain.integrations.averager import PIECE_VALUES, close_at_exit, host_values, open_to_all, part
from wantrain.wire import transport_for


def compress(
    model: nn.Module,
    codec: str = "error_feedback:quantized:4",
    *,
    process_group: dist.ProcessGroup | None = None,
    bytes_per_s: float = 125e6,
    latency_s: float = 0.02,
    timeout_s: float = 600.0,
) -> Compression:
    """Let the gradients of a model that `fully_shard` was applied to go through a codec, from the next backward on.

    Every process calls it in the same order. `process_group` is the one that the model is sharded over (default:
    torch's own). `bytes_per_s` and one-way `latency_s` say how many connections a link gets and how much is under way
    on it, not how fast it is. `timeout_s`: how late a member may be.

    Raises ConfigError for a codec that can't do it, a model that is not sharded and without a process group,
    ChannelError where a member doesn't come.
    """
    from torch.distributed.fsdp import FSDPModule  # a second to import

    check_gradient_codec(codec)
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        raise ConfigError("the model is not sharded; call fully_shard on it before compress")
    compression = Compression(codec, process_group, bytes_per_s, latency_s, timeout_s)
    for module in sharded:
        module.set_custom_reduce_scatter(_ReduceScatter(compression))  # type: ignore[arg-type]  # it has the methods
    return compression


class Compression:
    """Connections to the other members, and both ends' codecs. Made by `compress`."""

    def __init__(
        self, codec: str, group: dist.ProcessGroup | None, bytes_per_s: float, latency_s: float, timeout_s: float
    ) -> None:
        self.codec, self.timeout_s = codec, timeout_s
        self.has_feedback = parse_codec(codec).has_feedback
        self._membership = join_process_group(group, timeout_s)
        self._ranks = dist.get_process_group_ranks(group)
        self._channels = open_to_all(self._membership, transport_for(bytes_per_s, latency_s), timeout_s)
        self._encoders = {peer: ErrorFeedback(codec) for peer in self._channels}
        self._decoders = {peer: make_codec(codec) for peer in self._channels}
        self._num_pieces = 0
        self._is_open = True
        close_at_exit(self.close)

    @property
    def sent_bytes(self) -> int:
        """Bytes of payloads that this member has sent."""
        return sum(channel.stats.payload_bytes_sent for channel in self._channels.values())

    def check_group(self, group: dist.ProcessGroup) -> None:
        """Raise ConfigError where a reduce-scatter is over others than these members."""
        ranks = dist.get_process_group_ranks(group)
        if ranks != self._ranks:
            raise ConfigError(f"the model is sharded over ranks {ranks}, not {self._ranks}; give compress their group")

    def reduce_scatter(self, shards: Tensor, residuals: Tensor | None) -> Tensor:
        """Return the sum of this member's shard over all members, fp32 [values]; wait for it.

        `shards`: this member's part of everyone's, fp32 [members, values] in host memory; `residuals`, of the same
        shape, what is owed of them.
        """
        pieces = torch.split(shards, PIECE_VALUES, dim=1)
        owed: Sequence[Tensor | None] = [None] * len(pieces)
        if residuals is not None:
            owed = torch.split(residuals, PIECE_VALUES, dim=1)
        for number, (piece, rest) in enumerate(zip(pieces, owed, strict=True), self._num_pieces):
            for peer, encoder in self._encoders.items():
                payload = encoder.encode(piece[peer], None if rest is None else rest[peer], number)
                self._channels[peer].send(payload)
        sums = [self._sum(piece, number) for number, piece in enumerate(pieces, self._num_pieces)]
        self._num_pieces += len(pieces)
        return torch.cat(sums)

    def _sum(self, piece: Tensor, number: int) -> Tensor:
        """Add what the others send of a piece, in member order."""
        total = torch.zeros_like(piece[0])
        for member in range(self._membership.world_size):
            total += piece[member] if member == self._membership.rank else self._received(member, number)
        return total

    def _received(self, member: int, number: int) -> Tensor:
        decoder = self._decoders[member]
        decoder.moment = number
        return decoder.decode(self._channels[member].recv(self.timeout_s, f"piece {number} of the gradients"))

    def close(self, timeout_s: float | None = None) -> None:
        """Part from the other members, who do so too; the end of the program does it by itself.

        Raises ChannelError where a member is late by `timeout_s` (default: the compression's), or gone.
        """
        if self._is_open:
            self._is_open = False
            part(self._membership, self._channels.values(), self.timeout_s if timeout_s is None else timeout_s)


class _ReduceScatter:
    """One group of parameters' reduce-scatter, as FSDP calls it."""

    def __init__(self, compression: Compression) -> None:
        self._compression = compression
        self._residuals: Tensor | None = None
        self._is_checked = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        if not self._is_checked:
            self._compression.check_group(group)
            self._is_checked = True
        if op not in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
            raise ConfigError(f"gradients can't be reduced by {op}; leave set_gradient_divide_factor alone")
        if op == dist.ReduceOp.AVG:
            input_tensor.div_(group.size())
        shards = host_values(input_tensor).view(group.size(), -1)
        if self._compression.has_feedback and self._residuals is None:
            self._residuals = torch.zeros_like(shards)
        output_tensor.copy_(self._compression.reduce_scatter(shards, self._residuals))
