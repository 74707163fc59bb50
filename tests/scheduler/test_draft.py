import pytest

from tests.scheduler.cases import PROFILE, regions
from wantrain.errors import PlanError
from wantrain.scheduler.draft import Drafter, Placement
from wantrain.scheduler.lanes import make_deck
from wantrain.scheduler.network import make_network
from wantrain.scheduler.problem import Request
from wantrain.scheduler.solve import make_plan
from wantrain.topology import PAYLOAD_SHARE
from wantrain.wire import transport_for

PLACEMENT = Placement(((0, 2), (1, 3)), (0, 3, 6), (3, 5))


def drafter(**choices: object) -> Drafter:
    topology = regions({"a": 2, "b": 2})
    network = make_network(topology, [worker.name for worker in topology.workers])
    return Drafter(Request(PROFILE, 8, **choices), topology, network, make_deck(8, 1, None, 2))  # type: ignore[arg-type]


def test_a_plan_holds_what_the_placement_says() -> None:
    plan = drafter().plan(PLACEMENT, (4, 2))
    assert [replica.workers for replica in plan.replicas] == [("a-0", "b-0"), ("a-1", "b-1")]
    assert [replica.num_microbatches for replica in plan.replicas] == [3, 5]
    assert [replica.lanes for replica in plan.replicas] == [(0, 1, 2), (3, 4, 5, 6, 7)]
    assert [(stage.end_layer, stage.max_in_flight) for stage in plan.stages] == [(3, 4), (6, 2)]


def test_transports_fill_their_links() -> None:
    plan = drafter().plan(PLACEMENT, (4, 2))
    assert set(plan.boundaries[0].transports) == {transport_for(PAYLOAD_SHARE * 25e6, 0.020)}
    assert plan.gradient_transport == transport_for(PAYLOAD_SHARE * 1.25e9, 0.0005)


def test_where_the_backward_is_split_all_some_or_nothing_may_wait() -> None:
    split = drafter(schedule="zero_bubble")
    assert (4, 1) in split.depths(PLACEMENT, (9, 9))  # the last stage's depth stays: it would hold up its own gradient
    found = [[stage.max_postponed for stage in plan.stages] for plan in split.plans(PLACEMENT, (4, 1))]
    assert found == [[5, 5], [0, 3], [0, 0]]
    assert len(list(split.plans(PLACEMENT, (4, 4)))) == 2
    assert len(list(drafter().plans(PLACEMENT, (4, 1)))) == 1


def test_depths_are_multiples_of_1f1bs_own_within_what_memory_allows() -> None:
    tried = list(drafter().depths(PLACEMENT, (3, 3)))
    assert tried[0] == (2, 1)
    assert (3, 2) in tried
    assert len(tried) == len(set(tried))
    assert all(a >= b for a, b in tried)
    assert list(drafter(max_in_flight=(5, 5)).depths(PLACEMENT, (1, 1))) == [(5, 5)]


def test_a_profile_that_knows_of_no_gradients_of_weights_is_refused() -> None:
    topology = regions({"a": 2})
    layers = tuple(layer.model_copy(update={"weight_flops": 0.0}) for layer in PROFILE.layers)
    older = PROFILE.model_copy(update={"layers": layers})
    with pytest.raises(PlanError, match=r"weight_flops.*use 1f1b"):
        make_plan(topology, older, batch_size=8, num_stages=2, schedule="zero_bubble")
