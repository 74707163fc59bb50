"""What a plan costs, rank by rank and stage by stage: all that the simulator needs to know about a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Seconds of compute, bytes on each boundary, gradient buckets by stage, seconds of coding.

    `forward_s[rank]`, `backward_s[rank]` per microbatch, and of the latter `weights_s[rank]` for what a schedule may
    leave for later (empty: nothing); `step_s[rank]` for the optimizer; `forward_bytes[stage]` is
    sent to the next stage and `backward_bytes[stage]` back to the one before, per microbatch; `bucket_bytes[stage]`
    lists the wire bytes of each gradient bucket in the order in which the backward finishes them.

    Coding is done by threads beside the computing, one at a time in each: what leaves forwards is encoded by its sender
    in `forward_encode_s[rank]` and decoded by its receiver in `forward_decode_s[rank]`, what leaves backwards likewise.
    `bucket_coding_s[stage]` is what encoding a whole gradient bucket takes, and decoding one too. Empty: no time.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    step_s: tuple[float, ...]
    forward_bytes: tuple[int, ...]
    backward_bytes: tuple[int, ...]
    bucket_bytes: tuple[tuple[int, ...], ...]
    forward_encode_s: tuple[float, ...] = ()
    forward_decode_s: tuple[float, ...] = ()
    backward_encode_s: tuple[float, ...] = ()
    backward_decode_s: tuple[float, ...] = ()
    bucket_coding_s: tuple[float, ...] = ()
    weights_s: tuple[float, ...] = ()
    agrees: bool = False
    """Whether every rank hears every other's gradient norm before its update, as the trainer does."""
