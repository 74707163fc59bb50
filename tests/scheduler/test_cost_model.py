import pytest

from tests.jobs import change, flat_topology, small_plan
from wantrain.model_config import ModelConfig
from wantrain.profile import gpt_profile
from wantrain.scheduler.cost_model import (
    boundary_bytes,
    bucket_sizes,
    make_workload,
    memory_bytes,
    predict,
    predict_and_play,
)

MODEL = ModelConfig(num_layers=4, hidden=64, num_heads=4, seq_len=32)
PROFILE = gpt_profile(MODEL, 2)


def plan_of(stages: int, replicas: int, **choices: object):  # type: ignore[no-untyped-def]
    return small_plan(stages, replicas, model=MODEL, microbatch_size=2, **choices)


def test_a_boundary_carries_the_activation_of_its_codec() -> None:
    forward, backward = boundary_bytes(plan_of(2, 1), PROFILE, 0)
    assert forward == backward == 64 + 2 * 32 * 64 * 4
    halved, _ = boundary_bytes(plan_of(2, 1, forward_codec="raw:bf16"), PROFILE, 0)
    assert halved == 64 + 2 * 32 * 64 * 2


def test_buckets_cover_the_stages_parameters() -> None:
    plan = plan_of(2, 2, bucket_bytes=10_000)
    sizes = bucket_sizes(plan, PROFILE, 0)
    span = plan.stages[0]
    weights = sum(layer.parameter_bytes for layer in PROFILE.layers[span.first_layer : span.end_layer])
    assert sum(sizes) == 64 * len(sizes) + weights
    assert max(sizes) == 64 + 10_000
    narrow = bucket_sizes(change(plan, gradient_codec="quantized:4"), PROFILE, 0)
    assert len(narrow) == len(sizes)
    assert 7.0 < sum(sizes) / sum(narrow) < 8.0


def test_a_codec_that_feeds_errors_back_costs_the_weights_once_more_where_there_are_replicas() -> None:
    def memory(codec: str, replicas: int) -> int:
        return memory_bytes(change(plan_of(2, replicas), gradient_codec=codec), PROFILE, 0)

    plan = plan_of(2, 2)
    span = plan.stages[0]
    weights = sum(layer.parameter_bytes for layer in PROFILE.layers[span.first_layer : span.end_layer])
    assert memory("error_feedback:quantized:4", 2) - memory("quantized:4", 2) == weights
    assert memory("error_feedback:quantized:4", 1) == memory("quantized:4", 1)


def test_seconds_follow_the_workers_own_speed() -> None:
    plan, topology = plan_of(2, 1), flat_topology(2)
    fast = topology.workers[0].model_copy(update={"flops_per_s": 2 * topology.workers[0].flops_per_s})
    before = make_workload(plan, topology, PROFILE)
    after = make_workload(plan, topology.model_copy(update={"workers": (fast, topology.workers[1])}), PROFILE)
    first = plan.rank_of("w-0")
    assert after.forward_s[first] == pytest.approx(before.forward_s[first] / 2)
    assert after.forward_s[1 - first] == before.forward_s[1 - first]


def test_every_microbatch_in_flight_costs_its_activations_and_its_payloads() -> None:
    plan = plan_of(2, 1)
    deep = change(plan, stages=[stage.model_dump() | {"max_in_flight": 4} for stage in plan.stages])
    stored = [sum(layer.stored_bytes for layer in PROFILE.layers[s.first_layer : s.end_layer]) for s in plan.stages]
    more = 4 - plan.stages[0].max_in_flight
    payloads = sum(boundary_bytes(plan, PROFILE, 0))
    got = memory_bytes(deep, PROFILE, 0) - memory_bytes(plan, PROFILE, 0)
    assert got == more * (stored[0] + payloads)


def test_what_is_put_off_keeps_its_activations_until_it_is_made() -> None:
    plan = plan_of(2, 1, schedule="zero_bubble")

    def memory(postponed: int) -> int:
        stages = [stage.model_dump() | {"max_in_flight": 1, "max_postponed": postponed} for stage in plan.stages]
        return memory_bytes(change(plan, stages=stages), PROFILE, 0)

    own = PROFILE.layers[: plan.stages[0].end_layer]
    stored = sum(layer.stored_bytes for layer in own)
    recomputed, few = PROFILE.with_recomputing(), change(plan, stages=[
        stage.model_dump() | {"max_in_flight": 1, "max_postponed": 1} for stage in plan.stages
    ])  # fmt: skip
    none = change(few, stages=[stage.model_dump() | {"max_postponed": 0} for stage in few.stages])
    assert memory_bytes(few, recomputed, 0) - memory_bytes(none, recomputed, 0) == stored  # all that was made anew
    assert memory(2) - memory(0) == 2 * stored
    assert memory(99) - memory(0) == (plan.replicas[0].num_microbatches - 1) * stored


def test_a_split_backward_is_as_long_as_a_whole_one_in_two_parts() -> None:
    workload = make_workload(plan_of(2, 1), flat_topology(2), PROFILE)
    assert all(
        0 < weights < backward for weights, backward in zip(workload.weights_s, workload.backward_s, strict=True)
    )
    whole, split = (
        predict(plan_of(4, 1, schedule=schedule), flat_topology(4, "100 Gbit/s", "0 ms"), PROFILE)
        for schedule in ("1f1b", "zero_bubble")
    )
    assert split.compute_s == pytest.approx(whole.compute_s)
    assert split.bubble_s < whole.bubble_s
    assert split.step_s < whole.step_s


def test_the_parts_of_a_step_add_up_and_the_bottleneck_is_named() -> None:
    plan = plan_of(2, 1)
    slow = predict(plan, flat_topology(2, "1 Mbit/s"), PROFILE)
    fast, played = predict_and_play(plan, flat_topology(2, "100 Gbit/s", "0 ms"), PROFILE)
    assert slow.bottleneck.startswith("link w-")
    assert fast.bottleneck.startswith("compute of w-")
    assert fast.step_s == pytest.approx(played.timeline().span_s, rel=1e-4)
    assert slow.exposed_communication_s > slow.compute_s
    assert fast.exposed_communication_s < 0.1 * fast.step_s


def test_coding_takes_values_by_the_workers_speed_at_the_end_where_it_is_done() -> None:
    boundaries = [{"forward_codec": "quantized:4", "backward_codec": "raw:bf16", "transports": [{}]}]
    plan, topology = change(plan_of(2, 1), boundaries=boundaries), flat_topology(2)
    workers = [
        worker.model_copy(update={"codec_values_per_s": speed})
        for worker, speed in zip(topology.workers, (1e6, 1e7), strict=True)
    ]
    workload = make_workload(plan, topology.model_copy(update={"workers": tuple(workers)}), PROFILE)
    values, by_name = 2 * 32 * 64, {"w-0": 1e6, "w-1": 1e7}
    assert workload.forward_encode_s[0] == pytest.approx(values / by_name[plan.workers[0]])
    assert workload.forward_decode_s[1] == pytest.approx(values / by_name[plan.workers[1]])
    assert workload.forward_encode_s[1] == workload.forward_decode_s[0] == 0
    assert not any(workload.backward_encode_s + workload.backward_decode_s)
    assert not any(make_workload(plan, topology, PROFILE).forward_encode_s)  # no speed known


def test_message_buffers_take_their_budget_where_a_codec_remembers() -> None:
    plain = change(plan_of(2, 1), buffer_bytes=1_000_000)
    boundaries = [{"forward_codec": "aqsgd:4", "transports": [{}]}]
    remembering = change(plain, boundaries=boundaries)
    without = change(remembering, buffer_bytes=0)
    for rank in range(2):
        assert memory_bytes(remembering, PROFILE, rank) - memory_bytes(without, PROFILE, rank) == 1_000_000
        assert memory_bytes(plain, PROFILE, rank) == memory_bytes(change(plain, buffer_bytes=0), PROFILE, rank)


def test_recomputing_takes_time_and_frees_memory_but_for_the_layer_at_work() -> None:
    again = PROFILE.with_recomputing()
    (stage, *_) = plan_of(1, 1).stages
    plan = change(plan_of(1, 1), stages=[stage.model_dump() | {"max_in_flight": 4}])
    saved = sum(layer.recomputed_bytes for layer in again.layers)
    assert memory_bytes(plan, PROFILE, 0) - memory_bytes(plan, again, 0) == 4 * saved > 0
    plain_s, again_s = (make_workload(plan, flat_topology(1), one) for one in (PROFILE, again))
    assert again_s.forward_s == plain_s.forward_s
    blocks_s = sum(layer.forward_s(flat_topology(1).workers[0].flops_per_s) for layer in PROFILE.layers[1:-1])
    assert again_s.backward_s[0] - plain_s.backward_s[0] == pytest.approx(blocks_s)
