"""Plans under test: where curves cross, and what is said of a run."""

import pytest

from bench_planning import SHAPE, Entry, crossover, uniform_profile
from emulated_job import EmulatedJob
from tests.jobs import flat_topology
from wantrain.scheduler.solve import make_plan


def test_a_crossing_lies_between_the_points_around_it() -> None:
    assert crossover([0, 1, 2], [-1, -1, 1]) == pytest.approx(1.5)
    assert crossover([0, 1, 2], [-2, 1, 3]) == pytest.approx(2 / 3)
    assert crossover([0, 1], [1, 2]) is None
    assert crossover([0, 1], [1, -1]) is None


def test_an_entry_is_said_with_its_error_and_a_peers_without() -> None:
    topology, profile = flat_topology(2, "100 Mbit/s"), uniform_profile(2, 0.01, SHAPE, 1000)
    plan = make_plan(topology, profile, batch_size=2, num_stages=1, num_replicas=2)
    own = Entry("own", EmulatedJob(plan, topology, profile, SHAPE), [])
    assert own.predicted_s
    own.steps_s.append(own.predicted_s / 1.1)
    assert "+10.0%" in own.said
    assert "busy" not in own.said
    own.busy = 0.9
    assert "90% busy: dilate more" in own.said
    peer = Entry("peer", EmulatedJob(plan, topology, profile, SHAPE, peer="torch DDP"), [1.0])
    assert "%" not in peer.said
    assert peer.as_json()["predicted_s"] is None
