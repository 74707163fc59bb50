"""What a lossy codec loses now is sent later: error feedback for tensors that are summed step after step.

Compressed gradients lose the same small values every time, unless what was lost is kept, the *residual* e, and added to
what is sent next:

    w = g + e          what should arrive by now
    sent: Q(w)         what arrives
    e ← w − Q(w)       what is still owed

Over any number of steps Σ Q(w) = Σ g + e₀ − e: everything arrives, at most as late as the codec makes it, so that even
a codec that keeps one value in fifty trains (Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014;
Karimireddy et al., "Error Feedback Fixes SignSGD", ICML 2019). Per step the law holds to one rounding of w and one of
the subtraction.

That needs tensors that come again, each with a residual of its own, and a sum to which late is as good as never late.
Activations have neither: `error_feedback:…` is for gradients alone.
"""

from __future__ import annotations

from torch import Tensor

from wantrain.codecs.codec import Payload, make_codec


class ErrorFeedback:
    """The sending end of a codec, which knows what the receiving end will see. Not for use by two threads at once.

    Residuals belong to the caller, one for each tensor that comes again: fp32 of the tensor's shape, zero at first.
    Where the codec saturates, NaN and infinity are forgotten: nothing can make up for them.
    """

    def __init__(self, codec_name: str, stream: int = 0) -> None:
        """Send with `codec_name`, with or without its `error_feedback:`."""
        self._encoder, self._mirror = make_codec(codec_name, stream), make_codec(codec_name, stream)
        self._saturates = self._encoder.spec.saturate

    def encode(self, values: Tensor, residual: Tensor | None, moment: int) -> Payload:
        """Return the payload of values + residual and leave in `residual` what it lacks; None: what is lost is lost.

        `moment` keys what is random, see `Codec.moment`. Raise CodecError where the codec refuses the values; the
        residual is then of no more use.
        """
        if residual is None:
            self._encoder.moment = moment
            self._mirror.pass_over()
            return self._encoder.encode(values)
        return self.encode_and_decode(values, residual, moment)[0]

    def encode_and_decode(self, values: Tensor, residual: Tensor | None, moment: int) -> tuple[Payload, Tensor]:
        """Do as `encode` and return also what the receiving end will see, perhaps in the payload's own memory."""
        wanted = values if residual is None else residual.add_(values)
        self._encoder.moment = self._mirror.moment = moment
        payload = self._encoder.encode(wanted)
        decoded = self._mirror.decode(payload)
        if residual is not None:
            residual.sub_(decoded)
            if self._saturates:
                residual.nan_to_num_(0.0, 0.0, 0.0)
        return payload, decoded
