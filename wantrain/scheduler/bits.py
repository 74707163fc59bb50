"""How many bits each boundary gets: just enough that the wire hides behind computing, and as many as that allows.

A plan is first placed with the fewest bits that its data bears. Then the boundaries get bits back as long as the step
stays as short as the few made it.

    data seen again (fine-tuning)   forward  aqsgd 2 3 4 6 8 → raw    backward  hadamard 4 6 8 → raw
    data seen once (pre-training)   forward  hadamard 4 6 8 → raw     backward  hadamard 4 6 8 → raw

For data seen again the least bits are those at which fine-tuning ended within 0.1 % of the loss that it ends with
without a codec: 0.08 % above at 2 and 4 bits, 0.02 % at 3 and 6 (`benchmarks/bench_convergence.py`). For data seen once
they are chosen after what others report (TAH-Quant: 3 to 4 bits, rotated); a GPT of 10.8 million weights that was
trained from scratch with them ended 0.5 % above, one seed (`benchmarks/bench_time_to_loss.py`). The rotated codec of
weight gradients has not been measured: direct quantization with error feedback was, at 4 bits. A delta has nothing to
be taken from there, so the codec that remembers counts for nothing.
"""

from __future__ import annotations

from typing import Literal

from wantrain.plan import Plan, Prediction
from wantrain.profile import ModelProfile
from wantrain.scheduler.cost_model import predict
from wantrain.topology import Topology

Seen = Literal["once", "again"]

SAME_WITHIN = 1.01
"""Chosen: a step longer by less than a percent counts as equal."""

LADDERS: dict[tuple[Seen, str], tuple[str, ...]] = {
    ("again", "forward"): ("aqsgd:2", "aqsgd:3", "aqsgd:4", "aqsgd:6", "aqsgd:8", "raw:bf16", "raw:fp32"),
    ("again", "backward"): ("hadamard:4", "hadamard:6", "hadamard:8", "raw:bf16", "raw:fp32"),
    ("once", "forward"): ("hadamard:4", "hadamard:6", "hadamard:8", "raw:bf16", "raw:fp32"),
    ("once", "backward"): ("hadamard:4", "hadamard:6", "hadamard:8", "raw:bf16", "raw:fp32"),
}
GRADIENT_LADDER = ("error_feedback:hadamard:4", "error_feedback:hadamard:8", "raw:fp32")


def fewest_bits(seen: Seen) -> dict[str, str]:
    """Return the codecs that a plan is first made with, by the argument of `make_plan`."""
    return {
        "forward_codec": LADDERS[seen, "forward"][0],
        "backward_codec": LADDERS[seen, "backward"][0],
        "gradient_codec": GRADIENT_LADDER[0],
    }


def give_back_bits(plan: Plan, topology: Topology, profile: ModelProfile, seen: Seen) -> Plan:
    """Return the plan with as many bits on every way as leave its step as short as it is, and its prediction.

    All climb together, a rung at a time: so that no boundary takes what the others would need.
    """
    allowed_s = predict(plan, topology, profile).step_s * SAME_WITHIN
    ways = [(way, boundary) for way in ("backward", "forward") for boundary in range(plan.num_stages - 1)]
    ladders = {way: LADDERS[seen, way[0]] for way in ways} | {("gradient", 0): GRADIENT_LADDER}
    for rung in range(1, max(map(len, ladders.values()))):
        for way, ladder in list(ladders.items()):
            if rung >= len(ladder):
                continue
            wider = _with_codec(plan, *way, ladder[rung])
            prediction = predict(wider, topology, profile)
            if prediction.step_s <= allowed_s and _fits(prediction, topology):
                plan = wider
            else:
                del ladders[way]  # what was too much once stays too much
    return plan.model_copy(update={"prediction": predict(plan, topology, profile)})


def _fits(prediction: Prediction, topology: Topology) -> bool:
    return all(needed <= topology.worker(name).memory_bytes for name, needed in prediction.memory_bytes.items())


def _with_codec(plan: Plan, way: str, boundary: int, codec: str) -> Plan:
    if way == "gradient":
        return plan.model_copy(update={"gradient_codec": codec})
    boundaries = list(plan.boundaries)
    boundaries[boundary] = boundaries[boundary].model_copy(update={f"{way}_codec": codec})
    return plan.model_copy(update={"boundaries": tuple(boundaries)})
