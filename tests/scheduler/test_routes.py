"""A topology's arrays say of every pair of workers what the topology itself says."""

from __future__ import annotations

import numpy as np
import pytest
from plays import flat, make_plan, work

from wantrain.errors import TopologyError
from wantrain.resources import find_config, shipped
from wantrain.scheduler.disturbance import CALM
from wantrain.scheduler.layout import lay_out
from wantrain.scheduler.routes import number_lanes, way_columns
from wantrain.scheduler.script import GRADIENT_LANES, LANES, LATENCY_S, LINE_OF, PACE, S_PER_BYTE, WAYS
from wantrain.topology import PAYLOAD_SHARE, Topology


@pytest.mark.parametrize("name", shipped("topologies"))
def test_every_lane_has_its_links_rate_latency_and_lines(name: str) -> None:
    topology = Topology.load(find_config("topologies", name, TopologyError))
    stages = len(topology.workers) // 2
    plan = make_plan(stages, 2, 1)
    names = [worker.name for worker in topology.workers]
    replicas = [one.model_copy(update={"workers": tuple(names[i::2][:stages])}) for i, one in enumerate(plan.replicas)]
    plan = plan.model_copy(update={"replicas": tuple(replicas)})
    lanes = number_lanes(plan, has_gradients=True)
    _, columns = way_columns(plan, topology, lanes)
    for lane, (a, b) in enumerate(zip(lanes.source, lanes.target, strict=True)):
        source, target = plan.workers[a], plan.workers[b]
        limit = topology.payload_bytes_per_s(source, target)
        assert columns[LANES, S_PER_BYTE][lane] == pytest.approx(1 / limit)
        assert columns[LANES, LATENCY_S][lane] == topology.link(source, target).latency_s
        paces = columns[WAYS, PACE][5 * lane + 1 : 5 * lane + 5]
        shared = sorted(1 / (PAYLOAD_SHARE * rate) for _, rate in topology.shared_limits(source, target))
        assert sorted(pace for pace in paces if pace) == pytest.approx(shared)
        assert [line < 0 for line in columns[WAYS, LINE_OF][5 * lane + 1 : 5 * lane + 5]] == [not p for p in paces]


def test_lanes_lead_to_neighbours_in_the_pipeline_and_to_every_other_member() -> None:
    plan = make_plan(2, 3, 1)
    lanes = number_lanes(plan, has_gradients=True)
    ways = list(zip(lanes.source.tolist(), lanes.target.tolist(), strict=True))
    assert ways[:6] == [(0, 1), (2, 3), (4, 5), (1, 0), (3, 2), (5, 4)]
    assert sorted(ways[6:]) == sorted(
        (a, b) for s in (0, 1) for a in (s, s + 2, s + 4) for b in (s, s + 2, s + 4) if a != b
    )
    assert [ways[lane] for lane in lanes.gradient_lane[:3].tolist() if lane >= 0] == [(0, 2), (0, 4)]
    assert number_lanes(plan, has_gradients=False).source.tolist() == [0, 2, 4, 1, 3, 5]


def test_a_changed_topology_is_not_taken_for_the_one_before() -> None:
    plan, topology = make_plan(2, 1, 1), flat(2)
    faster = topology.with_link("s", "s", bandwidth_bytes_per_s=4e6 / PAYLOAD_SHARE)
    paces = [
        lay_out(plan, one, work(plan), CALM, is_recorded=False).column(LANES, S_PER_BYTE, is_float=True).tolist()
        for one in (topology, faster, topology)
    ]
    assert np.array(paces) == pytest.approx(np.array([[1e-6] * 2, [0.25e-6] * 2, [1e-6] * 2]))


def test_without_gradients_there_are_no_gradient_lanes() -> None:
    plan = make_plan(2, 2, 1)
    made = lay_out(plan, flat(4), work(plan), CALM, is_recorded=False)
    assert made.column(GRADIENT_LANES, 0).tolist() == []


def test_a_plans_worker_that_the_topology_lacks_is_named() -> None:
    plan = make_plan(3, 1, 1)
    with pytest.raises(TopologyError, match="topology 'flat' has no worker 'w2'"):
        lay_out(plan, flat(2), work(plan), CALM, is_recorded=False)
