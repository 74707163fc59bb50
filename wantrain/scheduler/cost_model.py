"""What a plan costs: seconds of compute, bytes on the wire, bytes in memory. Pure functions of frozen facts.

Memory of a rank, with w its weights in bytes, a_s the stored activations of a microbatch on stage s, d_s the stage's
`max_in_flight`, p_s its `max_postponed`, f_s and b_s the payloads that leave stage s forwards and backwards:

    weights + gradients                     2·w, and once those that are not trained
    AdamW's two moments                     2·w
    activations                             d_s · a_s
    those whose weights' gradients wait     p_s · a_s, all that was made anew for the backward included
    a backward's gradients, at work         what the stage's largest layer has stored, or makes anew
    payloads to send                        d_s · f_s + d_(s-1) · b_s
    payloads received, not yet used         d_(s-1) · f_(s-1) + d_s · b_(s+1)
    staging of the channels                 window of each, both directions
    gradient pieces under way               2 buckets, scatter and gather, as payloads and decoded
    residuals                               w, where the gradients' codec feeds errors back
    message buffers                         their budget, where a codec of the rank's boundaries remembers samples

A microbatch in flight on stage s-1 is, seen from s, either still on its way, received, in flight here, or on its way
back: hence the d_(s-1). Every term is an upper bound that a slow neighbour can bring about.

Encoding and decoding take a worker's threads beside the computing: values / `codec_values_per_s`. Where a topology
doesn't say that speed they count as free; `raw` is free everywhere, for it copies nothing that isn't copied anyway.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from wantrain.codec_spec import parse_codec
from wantrain.plan import Plan, Prediction
from wantrain.profile import LayerProfile, ModelProfile
from wantrain.schedule import splits_backward
from wantrain.scheduler.routes import busy_s
from wantrain.scheduler.simulator import PlayedStep, Workload, play_step
from wantrain.topology import Topology
from wantrain.wire import Transport, payload_bytes

ADAMW_STATES = 2
OPTIMIZER_FLOPS_PER_PARAMETER = 12
"""AdamW's multiplications, additions, a square root and a division, per parameter (counted)."""


def stage_layers(plan: Plan, profile: ModelProfile, stage: int) -> tuple[LayerProfile, ...]:
    """Return the layers of one stage."""
    span = plan.stages[stage]
    return profile.layers[span.first_layer : span.end_layer]


def _parameter_bytes(plan: Plan, profile: ModelProfile, stage: int) -> int:
    return sum(layer.parameter_bytes for layer in stage_layers(plan, profile, stage))


def boundary_bytes(plan: Plan, profile: ModelProfile, stage: int) -> tuple[int, int]:
    """Return the payload bytes of one microbatch over the boundary after `stage`: forwards and backwards."""
    elements, size = stage_layers(plan, profile, stage)[-1].activation_elements, plan.microbatch_size
    shape, boundary = (size, elements // size), plan.boundaries[stage]
    return payload_bytes(boundary.forward_codec, shape), payload_bytes(boundary.backward_codec, shape)


def bucket_sizes(plan: Plan, profile: ModelProfile, stage: int) -> tuple[int, ...]:
    """Return the wire bytes of a stage's gradient buckets, evenly cut; a bucket's size is that of its fp32 values."""
    full, rest = divmod(_parameter_bytes(plan, profile, stage), plan.bucket_bytes)
    sizes = (plan.bucket_bytes,) * full + ((rest,) if rest else ())
    return tuple(payload_bytes(plan.gradient_codec, (size // 4,)) for size in sizes)


def make_workload(plan: Plan, topology: Topology, profile: ModelProfile) -> Workload:
    """Turn a plan's layers, workers and codecs into the seconds and bytes that the simulator plays."""
    forward_s, backward_s, weights_s, step_s = [], [], [], []
    for rank, name in enumerate(plan.workers):
        layers = stage_layers(plan, profile, plan.stage_of(rank))
        speed = topology.worker(name).flops_per_s
        forward_s.append(sum(layer.forward_s(speed) for layer in layers))
        backward_s.append(sum(layer.backward_s(speed) for layer in layers))
        weights_s.append(sum(layer.weights_s(speed) for layer in layers))
        num_parameters = sum(layer.parameter_bytes for layer in layers) / 4
        step_s.append(num_parameters * optimizer_flops(profile) / speed)
    stages = range(plan.num_stages)
    crossing = [boundary_bytes(plan, profile, stage) for stage in stages[:-1]]
    forward_coding_s, backward_coding_s = (_coding_s(plan, topology, profile, way) for way in ("forward", "backward"))
    return Workload(
        forward_s=tuple(forward_s),
        backward_s=tuple(backward_s),
        step_s=tuple(step_s),
        forward_bytes=(*(forward for forward, _ in crossing), 0),
        backward_bytes=(0, *(backward for _, backward in crossing)),
        bucket_bytes=tuple(bucket_sizes(plan, profile, stage) for stage in stages),
        forward_encode_s=forward_coding_s[0],
        forward_decode_s=forward_coding_s[1],
        backward_encode_s=backward_coding_s[0],
        backward_decode_s=backward_coding_s[1],
        bucket_coding_s=tuple(_bucket_coding_s(plan, topology, stage) for stage in stages),
        weights_s=tuple(weights_s),
        agrees=True,
    )


def optimizer_flops(profile: ModelProfile) -> float:
    """Return what updating a parameter takes: as measured, or else as counted."""
    measured = profile.optimizer_flops_per_parameter
    return OPTIMIZER_FLOPS_PER_PARAMETER if measured is None else measured


def _value_s(topology: Topology, worker: str, codec: str) -> float:
    """Return the seconds that a codec takes for one value on a worker, as far as they are known."""
    speed = topology.worker(worker).codec_values_per_s
    return 0.0 if speed is None or parse_codec(codec).kind == "raw" else 1 / speed


def _coding_s(
    plan: Plan, topology: Topology, profile: ModelProfile, way: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return by rank the seconds of encoding what it sends this way, and of decoding what it is sent."""
    encode_s, decode_s = [0.0] * plan.world_size, [0.0] * plan.world_size
    for boundary, chosen in enumerate(plan.boundaries):
        codec = chosen.forward_codec if way == "forward" else chosen.backward_codec
        num_values = stage_layers(plan, profile, boundary)[-1].activation_elements
        for replica in range(len(plan.replicas)):
            ends = plan.rank_at(replica, boundary), plan.rank_at(replica, boundary + 1)
            sender, receiver = ends if way == "forward" else ends[::-1]
            encode_s[sender] = num_values * _value_s(topology, plan.workers[sender], codec)
            decode_s[receiver] = num_values * _value_s(topology, plan.workers[receiver], codec)
    return tuple(encode_s), tuple(decode_s)


def _bucket_coding_s(plan: Plan, topology: Topology, stage: int) -> float:
    """Return the seconds of encoding a stage's bucket on the slowest of those that hold the stage."""
    workers = [plan.workers[rank] for rank in plan.data_group(stage)]
    return plan.bucket_bytes / 4 * max(_value_s(topology, name, plan.gradient_codec) for name in workers)


def _window_bytes(transports: Sequence[Transport]) -> int:
    """Return the staging buffers of some channels: a window each way."""
    return sum(2 * transport.window_bytes for transport in transports)


def memory_bytes(plan: Plan, profile: ModelProfile, rank: int) -> int:
    """Return what a rank needs at most, the process itself apart (formula above)."""
    return sum(memory_terms(plan, profile, rank).values())


def memory_terms(plan: Plan, profile: ModelProfile, rank: int) -> dict[str, int]:
    """Return the terms of what a rank needs, in bytes, named as an error names them."""
    stage, replica = plan.stage_of(rank), plan.replica_of(rank)
    depths = [one.max_in_flight for one in plan.stages]
    weights = _parameter_bytes(plan, profile, stage)
    layers = stage_layers(plan, profile, stage)
    payloads = staging = 0
    for boundary in range(max(0, stage - 1), min(stage + 1, plan.num_stages - 1)):
        payloads += depths[boundary] * sum(boundary_bytes(plan, profile, boundary))
        staging += _window_bytes([plan.boundaries[boundary].transports[replica]] * 2)
    states = (2 + ADAMW_STATES) * weights + sum(layer.frozen_bytes for layer in stage_layers(plan, profile, stage))
    others = len(plan.replicas) - 1
    if others:
        payloads += 4 * min(plan.bucket_bytes, weights)
        states += weights if parse_codec(plan.gradient_codec).has_feedback else 0
        staging += _window_bytes([plan.gradient_transport] * others)  # of two lines, one that sends, one that receives
    return {
        "weights, gradients and the optimizer": states,
        "activations": depths[stage] * sum(layer.stored_bytes for layer in layers)
        + _num_postponed(plan, rank) * sum(layer.backward_bytes for layer in layers)
        + max(layer.backward_bytes for layer in layers),
        "payloads": payloads,
        "channels": staging,
        "message buffers": plan.buffer_bytes if _remembers(plan, stage) else 0,
    }


def _num_postponed(plan: Plan, rank: int) -> int:
    """Return how many microbatches a rank holds beside those in flight, at most."""
    stage = plan.stages[plan.stage_of(rank)]
    return max(0, min(stage.max_postponed, plan.replicas[plan.replica_of(rank)].num_microbatches - stage.max_in_flight))


def _remembers(plan: Plan, stage: int) -> bool:
    """Say whether a codec before or after a stage keeps what was last sent for each sample."""
    beside = plan.boundaries[max(0, stage - 1) : stage + 1]
    return any(parse_codec(boundary.forward_codec).remembers for boundary in beside)


def predict(plan: Plan, topology: Topology, profile: ModelProfile) -> Prediction:
    """Play the plan in virtual time and sum up where the step goes."""
    return predict_and_play(plan, topology, profile)[0]


def predict_and_play(plan: Plan, topology: Topology, profile: ModelProfile) -> tuple[Prediction, PlayedStep]:
    """Sum up where the step goes, and return also what happens in it."""
    workload = make_workload(plan, topology, profile)
    played = play_step(plan, topology, workload)
    compute = played.compute_by_rank()
    slowest = max(range(plan.world_size), key=lambda rank: compute[rank])
    ideal_s = max(_ideal_s(plan, workload, replica) for replica in range(len(plan.replicas)))
    return (
        Prediction(
            step_s=played.step_s,
            compute_s=compute[slowest],
            bubble_s=max(0.0, ideal_s - compute[slowest]),
            exposed_communication_s=max(0.0, played.step_s - ideal_s),
            memory_bytes={name: memory_bytes(plan, profile, rank) for rank, name in enumerate(plan.workers)},
            bottleneck=_bottleneck(plan, topology, played, compute, slowest),
        ),
        played,
    )


def _ideal_s(plan: Plan, workload: Workload, replica: int) -> float:
    """Return the step's seconds with a network that costs nothing: the slowest stage's work, and the way there."""
    ranks = [plan.rank_at(replica, stage) for stage in range(plan.num_stages)]
    once = [workload.forward_s[rank] + workload.backward_s[rank] for rank in ranks]
    if any(map(splits_backward, plan.actions(replica))):
        count = plan.replicas[replica].num_microbatches  # gradients of weights fill the way back
        ways = itertools.accumulate((workload.forward_s[rank] for rank in ranks), initial=0.0)
        return max(way + count * own for way, own in zip(ways, once, strict=False))
    return sum(once) + (plan.replicas[replica].num_microbatches - 1) * max(once)


def _bottleneck(plan: Plan, topology: Topology, played: PlayedStep, compute: Sequence[float], slowest: int) -> str:
    """Name what is busy longest: a worker's computing, or a link."""
    sent = played.bytes_by_link()
    links = dict(zip(sent, busy_s(topology, sent), strict=True))
    busiest = max(links, key=lambda pair: links[pair], default=None)
    if busiest is not None and links[busiest] > compute[slowest]:
        return f"link {busiest[0]} → {busiest[1]}"
    return f"compute of {plan.workers[slowest]}"
