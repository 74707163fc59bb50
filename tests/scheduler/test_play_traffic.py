import itertools

import pytest
from plays import flat, make_plan, payload, work

from wantrain.errors import TopologyError
from wantrain.scheduler.simulator import simulate, step_s
from wantrain.timeline import Event, Timeline
from wantrain.topology import PAYLOAD_SHARE, Topology


def sends(timeline: Timeline, worker: str) -> list[Event]:
    return [event for event in timeline.events if event.kind == "send" and timeline.workers[event.rank] == worker]


def test_what_is_ready_first_leaves_first_through_a_shared_uplink() -> None:
    """A middle stage's tensors and gradients take turns in its uplink in the order in which they were ready."""
    plan = make_plan(3, 1, 8, [8, 8, 8])
    events = sends(simulate(plan, flat(3, "100 kB/s"), work(plan)), "w1")
    assert {event.peer for event in events} == {"w0", "w2"}
    assert all(a.end_s <= b.start_s + 1e-9 for a, b in itertools.pairwise(events))
    ready = {(e.kind, e.microbatch): e.end_s for e in simulate(plan, flat(3, "100 kB/s"), work(plan)).of_rank(1)}
    order = [ready["forward" if event.peer == "w2" else "backward", event.microbatch] for event in events]
    assert order == sorted(order)


def test_links_of_one_sender_that_share_nothing_carry_at_once() -> None:
    plan = make_plan(1, 3, 1)
    workload = work(plan, bucket_bytes=((3_000_000,),))
    apart, shared = flat(3), flat(3, "1 MB/s")
    assert step_s(plan, apart, workload) == pytest.approx(3 + 1 + 1)
    assert step_s(plan, shared, workload) == pytest.approx(3 + 2 + 2)


def test_a_payload_of_the_pipeline_waits_for_one_piece_of_gradients_at_most() -> None:
    plan = make_plan(2, 2, 1)
    workload = work(plan, bucket_bytes=((), (200_000,) * 20), step_s=(0.0,) * 4)
    events = sends(simulate(plan, flat(4, "1 MB/s"), workload), "w1")
    last = next(i for i, event in enumerate(events) if event.microbatch >= 0)
    ready_s = 1 + 1 + 1 + 2  # F0, its tensor, F0 and B0 on the second stage
    assert ready_s <= events[last].start_s <= ready_s + 0.1
    assert len(events) - last > 10


def test_a_sites_exit_is_shared_by_what_leaves_it_and_by_nothing_else() -> None:
    def two_sites(**limits: str) -> Topology:
        return Topology.parse(
            {
                "name": "two",
                "worker": [{"name": f"w{i}", "site": "ab"[i // 2]} for i in range(4)],
                "site": [{"name": "a"} | limits],
                "link": [
                    {"within": "a", "bandwidth": payload("1 MB/s")},
                    {"within": "b", "bandwidth": payload("1 MB/s")},
                    {"between": ["a", "b"], "bandwidth": payload("1 MB/s")},
                ],
            },
            TopologyError,
            "two",
        )

    inside = make_plan(2, 2, 1)
    across = inside.model_copy(
        update={
            "replicas": tuple(
                replica.model_copy(update={"workers": names})
                for replica, names in zip(inside.replicas, [("w0", "w2"), ("w1", "w3")], strict=True)
            )
        }
    )
    free, limited = two_sites(), two_sites(uplink=payload("1 MB/s"))
    assert step_s(inside, limited, work(inside)) == step_s(inside, free, work(inside)) == pytest.approx(3 + 3 + 2)
    assert step_s(across, free, work(across)) == pytest.approx(8)
    assert step_s(across, limited, work(across)) == pytest.approx(9)  # the second tensor waits for the first
    assert step_s(across, two_sites(downlink=payload("1 MB/s")), work(across)) == pytest.approx(9)  # the gradients do


def test_a_receivers_downlink_takes_one_payload_after_another() -> None:
    plan = make_plan(1, 3, 1)
    slow = flat(3)
    workers = (slow.workers[0].model_copy(update={"downlink_bytes_per_s": 1e6 / PAYLOAD_SHARE}), *slow.workers[1:])
    workload = work(plan, bucket_bytes=((3_000_000,),))
    limited = step_s(plan, slow.model_copy(update={"workers": workers}), workload)
    assert limited == pytest.approx(step_s(plan, slow, workload) + 2)  # once for the pieces, once for the sums


def test_latency_comes_after_the_last_byte_and_holds_no_line() -> None:
    plan = make_plan(2, 1, 2, [2, 2])
    timeline = simulate(plan, flat(2, latency="5 s"), work(plan))
    assert [event.start_s for event in sends(timeline, "w0")] == [1.0, 2.0]
    assert timeline.span_s == pytest.approx(1 + 1 + 5 + (1 + 2) * 2 + 1 + 5 + 2)
