"""What a search over placements works on: the facts as flat sequences, and the placement that it changes.

A request says what is asked for; with a number of stages and replicas it becomes a Problem. Everything is counted as
the cost model counts it: payloads with their headers, weights with gradients and the optimizer's moments.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from wantrain.codec_spec import parse_codec
from wantrain.plan import DEFAULT_BUCKET_BYTES
from wantrain.profile import ModelProfile
from wantrain.schedule import ScheduleKind, default_in_flight, is_own
from wantrain.scheduler.cost_model import ADAMW_STATES, OPTIMIZER_FLOPS_PER_PARAMETER
from wantrain.scheduler.network import Network
from wantrain.wire import payload_bytes, transport_for

Numbers = Any
"""A flat sequence of numbers: a list, or a numpy array for machine code."""


class Problem(NamedTuple):
    """All that stays the same while placements change. Per worker, per pair of classes, per layer, and the step."""

    s_per_flop: Numbers
    memory: Numbers
    class_of: Numbers
    kind_of: Numbers
    site_of: Numbers
    up_s_per_byte: Numbers
    down_s_per_byte: Numbers
    pinned: Numbers
    """The stage that a worker must hold, -1: any."""
    s_per_byte: Numbers
    latency_s: Numbers
    window_bytes: Numbers
    """Staging buffers of a channel in one direction, for each pair of classes."""
    site_up_s_per_byte: Numbers
    site_down_s_per_byte: Numbers
    forward_flops: Numbers
    """Of all layers before each, like the next four; one more than there are layers."""
    backward_flops: Numbers
    parameter_bytes: Numbers
    frozen_bytes: Numbers
    stored_bytes: Numbers
    largest_stored_bytes: Numbers
    """Of each layer."""
    forward_bytes: Numbers
    """Payload of a microbatch over a boundary behind each layer, like the next."""
    backward_bytes: Numbers
    max_depth: Numbers
    """Per stage, like the next: between them memory decides."""
    least_depth: Numbers
    num_classes: int
    num_stages: int
    num_replicas: int
    num_microbatches: int
    is_gpipe: int
    is_dealt: int
    """Whether `State.counts` holds; else lanes are dealt freely."""
    has_site_limits: int
    has_pins: int
    wire_bytes_per_parameter_byte: float
    optimizer_flops_per_parameter_byte: float
    weight_copies: float
    bucket_bytes: float
    strictness: float
    """How much a placement that doesn't fit into memory is put at a disadvantage: little leaves ways through."""


class State(NamedTuple):
    """A placement and what follows from it, changed in place."""

    cells: Numbers
    """Every worker once: the grid row by row, then those who stay out."""
    cuts: Numbers
    counts: Numbers
    stage_forward: Numbers
    stage_backward: Numbers
    stage_weights: Numbers
    stage_fixed: Numbers
    stage_slope: Numbers
    stage_window: Numbers
    """Staging of the channels for gradients."""
    stage_room: Numbers
    """Least memory of its workers beside the staging of the channels to their neighbours."""
    stage_there: Numbers
    stage_back: Numbers
    fill_s: Numbers
    period_s: Numbers
    home_s: Numbers
    """Per cell: from the end of its last backward to the end of the pipeline's."""
    busy_s: Numbers
    """Per cell: when the pipeline ends if nothing holds it up but this cell, and the gradients sent to it."""
    turned_s: Numbers
    """Per cell: the same for a single backward, after the forwards that must come before it."""
    end_s: Numbers
    """Per cell: the same for all that it has to wait for."""
    pace_s: Numbers
    """Per stage, of the replica at work: seconds of a backward."""
    link_s: Numbers
    """Per stage, of the replica at work: seconds of a gradient on its way there."""
    trip_s: Numbers
    """Per cell: from the start of a forward here to the end of its backward here."""
    done_s: Numbers
    """Per replica: the end of its last backward."""
    reduce_s: Numbers
    """Per cell: the exchange of gradients that its last backward can't hide, and the optimizer."""
    exchange_s: Numbers
    """Per class, of the stage at work: how long its busiest link to another member is taken, and the latency."""
    last_s: Numbers
    """The same for the last bucket, one way."""
    limit: Numbers
    """Per stage: how deep memory lets it, and all before it, run ahead."""
    present: Numbers
    num_present: Numbers
    site_out: Numbers
    site_in: Numbers


STRICT = 10.0
"""Chosen: what doesn't fit counts as twice as slow, at least."""

_PIECE_BYTES = 512 * 1024
"""Chosen: a bucket is shared among its replicas in pieces, and one below this is mostly latency."""

_MOST_PIECES = 100_000
"""Chosen: so many pieces a step are played in a tenth of a second, and overlap as well as more of them would."""


@dataclass(frozen=True)
class Request:
    """What a plan is asked for, its shape and who holds what apart."""

    profile: ModelProfile
    batch_size: int
    model: str = "model"
    num_lanes: int | None = None
    schedule: ScheduleKind = "1f1b"
    max_in_flight: tuple[int, ...] | None = None
    forward_codec: str = "raw:fp32"
    backward_codec: str = "raw:fp32"
    gradient_codec: str = "raw:fp32"
    bucket_bytes: int | None = None
    """None: by the number of replicas, see `bucket_bytes_for`."""
    max_codec_error: float | None = None
    buffer_bytes: int = 0
    """What message buffers may take of a worker's memory."""
    pinned: Mapping[str, int] = field(default_factory=dict)


def make_problem(
    request: Request, network: Network, num_stages: int, num_replicas: int, units: int, per_unit: int
) -> Problem:
    """Return the problem of one shape; lanes are dealt in `units` of so many microbatches."""
    layers, size = request.profile.layers, request.profile.microbatch_size
    num_microbatches = units * per_unit
    fixed = request.max_in_flight
    if is_own(request.schedule):
        fixed = default_in_flight(request.schedule, num_stages, -(-units // num_replicas) * per_unit)
    asked = fixed or (num_microbatches,) * num_stages
    every = -(-units // num_replicas) * per_unit if request.schedule == "gpipe" else 1
    least = fixed or (every,) * num_stages
    bucket_bytes = bucket_bytes_for(request, num_stages, num_replicas)
    feedback = num_replicas > 1 and parse_codec(request.gradient_codec).has_feedback
    remembers = num_stages > 1 and parse_codec(request.forward_codec).remembers
    buffer_bytes = request.buffer_bytes if remembers else 0
    return Problem(
        s_per_flop=[1 / speed for speed in network.speed],
        memory=[has - buffer_bytes for has in network.memory],
        class_of=list(network.class_of),
        kind_of=list(network.kind_of),
        site_of=list(network.site_of),
        up_s_per_byte=list(network.up_s_per_byte),
        down_s_per_byte=list(network.down_s_per_byte),
        pinned=[request.pinned.get(name, -1) for name in network.names],
        s_per_byte=list(network.s_per_byte),
        latency_s=list(network.latency_s),
        window_bytes=_windows(network),
        site_up_s_per_byte=list(network.site_up_s_per_byte),
        site_down_s_per_byte=list(network.site_down_s_per_byte),
        forward_flops=_sums(layer.forward_flops for layer in layers),
        backward_flops=_sums(layer.backward_flops for layer in layers),
        parameter_bytes=_sums(float(layer.parameter_bytes) for layer in layers),
        frozen_bytes=_sums(float(layer.frozen_bytes) for layer in layers),
        stored_bytes=_sums(float(layer.stored_bytes) for layer in layers),
        largest_stored_bytes=[float(layer.backward_bytes) for layer in layers],
        forward_bytes=_crossing(request.forward_codec, request.profile, size),
        backward_bytes=_crossing(request.backward_codec, request.profile, size),
        max_depth=list(asked),
        least_depth=list(least),
        num_classes=network.num_classes,
        num_stages=num_stages,
        num_replicas=num_replicas,
        num_microbatches=num_microbatches,
        is_gpipe=int(request.schedule == "gpipe"),
        is_dealt=int(units == num_replicas),
        has_pins=int(bool(request.pinned)),
        has_site_limits=int(any(network.site_up_s_per_byte) or any(network.site_down_s_per_byte)),
        wire_bytes_per_parameter_byte=_wire_ratio(request.gradient_codec, bucket_bytes),
        optimizer_flops_per_parameter_byte=OPTIMIZER_FLOPS_PER_PARAMETER / 4,
        weight_copies=float(2 + ADAMW_STATES + feedback),
        bucket_bytes=float(bucket_bytes),
        strictness=STRICT,
    )


def bucket_bytes_for(request: Request, num_stages: int, num_replicas: int) -> int:
    """Return the size of gradient buckets: what is asked, or as large as it takes for pieces that are worth sending."""
    if request.bucket_bytes is not None:
        return request.bucket_bytes
    pairs = num_replicas * (num_replicas - 1)
    most = _MOST_PIECES // (2 * pairs) - num_stages if pairs else _MOST_PIECES
    return max(DEFAULT_BUCKET_BYTES, num_replicas * _PIECE_BYTES, request.profile.parameter_bytes // max(most, 1))


def num_pieces(request: Request, num_stages: int, num_replicas: int) -> int:
    """Return how many pieces of gradients cross the network in a step."""
    bucket_bytes = bucket_bytes_for(request, num_stages, num_replicas)
    buckets = request.profile.parameter_bytes // bucket_bytes + num_stages
    return 2 * num_replicas * (num_replicas - 1) * buckets


def make_state(problem: Problem, cells: Sequence[int], cuts: Sequence[int], counts: Sequence[int]) -> State:
    """Return a placement, with room for all that follows from it."""
    num_stages, num_replicas = problem.num_stages, problem.num_replicas
    num_sites = len(problem.site_up_s_per_byte)
    per_stage: dict[str, Any] = {name: [0.0] * num_stages for name in State._fields if name.startswith("stage_")}
    return State(
        cells=list(cells),
        cuts=list(cuts),
        counts=list(counts),
        **per_stage,
        fill_s=[0.0] * num_replicas,
        period_s=[0.0] * num_replicas,
        home_s=[0.0] * num_stages * num_replicas,
        turned_s=[0.0] * num_stages * num_replicas,
        end_s=[0.0] * num_stages * num_replicas,
        pace_s=[0.0] * num_stages,
        link_s=[0.0] * num_stages,
        busy_s=[0.0] * num_stages * num_replicas,
        trip_s=[0.0] * num_stages * num_replicas,
        done_s=[0.0] * num_replicas,
        reduce_s=[0.0] * num_stages * num_replicas,
        exchange_s=[0.0] * problem.num_classes,
        last_s=[0.0] * problem.num_classes,
        limit=[0] * num_stages,
        present=[0] * problem.num_classes,
        num_present=[0] * problem.num_classes,
        site_out=[0.0] * num_sites,
        site_in=[0.0] * num_sites,
    )


def as_arrays(facts: Any) -> Any:
    """Return a problem or a state with numpy arrays for lists, as machine code wants them."""
    import numpy as np

    return facts._replace(**{name: np.array(v) for name, v in facts._asdict().items() if isinstance(v, list)})


def _windows(network: Network) -> list[float]:
    return [
        float(transport_for(1 / s_per_byte, latency_s).window_bytes) if s_per_byte else 0.0
        for s_per_byte, latency_s in zip(network.s_per_byte, network.latency_s, strict=True)
    ]


def _sums(values: Iterable[float]) -> list[float]:
    return list(itertools.accumulate(values, initial=0.0))


def _crossing(codec: str, profile: ModelProfile, size: int) -> list[float]:
    """Return the payload of a microbatch over a boundary behind each layer."""
    known: dict[int, float] = {}
    for layer in profile.layers:
        elements = layer.activation_elements
        if elements not in known:
            known[elements] = float(payload_bytes(codec, (size, elements // size)))
    return [known[layer.activation_elements] for layer in profile.layers]


def _wire_ratio(codec: str, bucket_bytes: int) -> float:
    """Return the wire bytes of a byte of fp32 gradients, headers spread over the bucket."""
    values = max(bucket_bytes // 4, 1)
    return payload_bytes(codec, (values,)) / (4 * values)
