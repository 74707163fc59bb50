import pytest
from plays import flat, make_plan, work

from wantrain.errors import PlanError, RunError
from wantrain.scheduler.disturbance import Disturbance, StandstillError
from wantrain.scheduler.simulator import simulate, step_s


def test_a_slow_worker_slows_the_step_by_its_own_computing() -> None:
    plan = make_plan(1, 2, 4)
    normal = step_s(plan, flat(2), work(plan))
    assert step_s(plan, flat(2), work(plan), Disturbance(slow={"w1": 2.0})) == pytest.approx(2 * normal)


def test_jitter_is_the_same_for_a_seed_and_another_for_another() -> None:
    plan = make_plan(2, 1, 8)
    topology = flat(2, latency="1 s", jitter="300 ms")
    played = [step_s(plan, topology, work(plan), Disturbance(jitter_seed=seed)) for seed in (1, 1, 2)]
    assert played[0] == played[1]
    assert played[0] != played[2]
    assert played[0] != step_s(plan, topology, work(plan))


def test_payloads_of_a_link_stay_in_order_however_late_one_is() -> None:
    plan = make_plan(2, 1, 8, [8, 8])
    timeline = simulate(plan, flat(2, latency="1 s", jitter="5 s"), work(plan), Disturbance(jitter_seed=0))
    forwards = [event.microbatch for event in timeline.of_rank(1) if event.kind == "forward"]
    assert forwards == list(range(8))


def test_a_worker_that_is_gone_stops_the_step_and_it_is_said_who_waits_for_whom() -> None:
    plan = make_plan(3, 1, 4)
    with pytest.raises(
        StandstillError, match="the step never ends: 'w1' is gone at 4 s; 'w0' waits for 'w1'"
    ) as caught:
        simulate(plan, flat(3), work(plan), Disturbance(gone_at_s={"w1": 4.0}))
    assert caught.value.waits["w2"] == ("w1", "microbatch 1")
    assert caught.value.waits["w0"][0] == "w1"
    assert isinstance(caught.value, RunError)


def test_replicas_wait_for_the_weight_gradients_of_the_one_that_is_gone() -> None:
    plan = make_plan(1, 3, 2)
    workload = work(plan, bucket_bytes=((1000,),))
    with pytest.raises(StandstillError) as caught:
        step_s(plan, flat(3), workload, Disturbance(gone_at_s={"w1": 1.5}))
    assert caught.value.waits == {"w0": ("w1", "weight gradients"), "w2": ("w1", "weight gradients")}


def test_who_is_gone_after_the_end_is_not_missed() -> None:
    plan = make_plan(2, 1, 2)
    calm = step_s(plan, flat(2), work(plan))
    assert step_s(plan, flat(2), work(plan), Disturbance(gone_at_s={"w1": calm + 1})) == calm


@pytest.mark.parametrize(
    ("disturbance", "message"),
    [
        (Disturbance(slow={"x": 2.0}), "the plan has no worker 'x'"),
        (Disturbance(slow={"w0": 0.0}), "worker 'w0' can't be 0 times as slow; give a number above zero"),
        (Disturbance(slow={"w0": float("nan")}), "can't be nan times as slow"),
        (Disturbance(gone_at_s={"w0": -1.0}), "worker 'w0' can't be gone at -1 s"),
        (Disturbance(gone_at_s={"x": 1.0}), "the plan has no worker 'x'"),
        (Disturbance(jitter_seed=1), "no link of topology 'flat' has jitter"),
    ],
)
def test_a_disturbance_that_does_not_fit_is_refused_in_one_line(disturbance: Disturbance, message: str) -> None:
    plan = make_plan(2, 1, 2)
    with pytest.raises(PlanError, match=message) as caught:
        step_s(plan, flat(2), work(plan), disturbance)
    assert "\n" not in str(caught.value)
