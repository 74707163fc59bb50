"""Both ends of a boundary agree before they send: what each holds of the coming samples, and with how many bits.

One small message each way per step, on a channel of its own. It leaves right after a step's last encode (or decode), so
it crosses while the backwards still run, and nobody waits for it:

    sender     F0 F1 F2 F3 │ view of step n+1 ──►        B0 B1 B2 B3  settle │ F0 …
    receiver      F0 F1 F2 F3 │ view of step n+1 ──►  B0 B1 B2 B3     settle │    F0 …

So the size of every payload is known before it is made, and nothing has to be healed inside a running pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wantrain.codecs.codec import Codec
from wantrain.comm.channel import Channel
from wantrain.errors import RunError


class Agreement:
    """One end's part; used by the one thread that uses the codec."""

    def __init__(self, channel: Channel, codec: Codec, timeout_s: float) -> None:
        self._channel, self._codec, self._timeout_s = channel, codec, timeout_s
        self._offered: tuple[list[int], bytes] | None = None

    def offer(self, sample_ids: Sequence[int]) -> None:
        """Tell the other end what this one holds of the samples that come next, in the order they come."""
        ids = list(sample_ids)
        if self._offered is not None:
            if self._offered[0] != ids:
                raise RunError("the samples of this step are not those announced; give `upcoming` as they will come")
            return
        view = self._codec.view(ids)
        self._offered = ids, view
        self._channel.send(torch.frombuffer(bytearray(view), dtype=torch.uint8))

    def settle(self) -> None:
        """Wait for the other end's view, if one was offered, and let the codec decide."""
        if self._offered is None:
            return
        ids, own = self._offered
        other = self._channel.recv(self._timeout_s, "the view of the coming samples")
        self._codec.agree(ids, own, other.numpy().tobytes())
        self._offered = None
