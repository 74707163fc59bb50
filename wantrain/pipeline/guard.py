"""Watch what a lossy codec loses on a boundary, and ask for more bits where it is too much.

One microbatch a step is measured before it is encoded. Above `max_error` this end asks for the next number of bits at
the coming agreement, and keeps asking until the error is below; bits are never lowered again, so that both ends and
every later run of the same numbers see the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from wantrain.codec_spec import bits_of
from wantrain.codecs.codec import Codec, Loss


class Guard:
    """Encodes through a codec; used by the one thread that uses the codec."""

    def __init__(
        self, codec: Codec, max_error: float | None = None, say: Callable[[str], None] = lambda _: None
    ) -> None:
        """`max_error` is relative; None only measures. `say` is told, in one line, when more bits are asked for."""
        self._codec, self._max_error, self._say = codec, max_error, say
        self._measured_step: int | None = None
        self.last: Loss | None = None
        """Of the newest measured step that had something to measure."""

    @property
    def bits(self) -> int:
        return self._codec.bits

    def encode(self, tensor: Tensor, sample_ids: Sequence[int], step: int) -> Tensor:
        """Return the codec's payload; measure first, once a step."""
        if step != self._measured_step:
            self._measured_step = step
            self.last = self._codec.measure(tensor, sample_ids) or self.last
            self._raise_bits(step)
        return self._codec.encode(tensor, sample_ids)

    def _raise_bits(self, step: int) -> None:
        if self._max_error is None or self.last is None or self.last.relative_error <= self._max_error:
            return
        codec = self._codec
        more = next((bits for bits in bits_of(codec.spec.kind) if bits > codec.wanted_bits), None)
        if codec.wanted_bits == codec.bits and more is not None:
            codec.wanted_bits = more
            self._say(
                f"step {step}: relative error {self.last.relative_error:.3g} is above {self._max_error:g};"
                f" {codec.bits} → {more} bits from the next step"
            )
