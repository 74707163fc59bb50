import pytest

from tests.scheduler.cases import PROFILE, regions
from wantrain.scheduler.cost_model import memory_terms
from wantrain.scheduler.draft import Drafter
from wantrain.scheduler.lanes import make_deck
from wantrain.scheduler.network import make_network
from wantrain.scheduler.playing import Objective, Player
from wantrain.scheduler.problem import Request
from wantrain.scheduler.search import Candidate, Searcher
from wantrain.topology import Topology
from wantrain.units import format_bytes


def prepared(topology: Topology, objective: Objective | None = None) -> tuple[Player, Candidate]:
    network = make_network(topology, [worker.name for worker in topology.workers])
    request, deck = Request(PROFILE, 8), make_deck(8, 1, None, 1)
    candidate = Searcher(request, network, deck).start((2, 1), [0, 1], "pipelines")
    return Player(topology, PROFILE, Drafter(request, topology, network, deck), objective), candidate


def test_the_depth_is_the_leanest_of_those_that_are_as_fast_where_computing_decides() -> None:
    player, candidate = prepared(regions({"a": 2}))
    played = player.best_depths(candidate)
    assert played is not None
    assert [stage.max_in_flight for stage in played[1].stages] == [2, 1]


def test_an_objective_scores_plans_with_their_prediction() -> None:
    player, candidate = prepared(regions({"a": 2}), lambda plan: 1.0 if plan.prediction else 2.0)
    played = player.best_depths(candidate)
    assert played is not None
    assert played[0] == 1.0


def test_the_worst_shortage_is_told_with_both_figures() -> None:
    player, candidate = prepared(regions({"a": 2}, memory="2 MB"))
    assert player.best_depths(candidate) is None
    plan = player.drafter.plan(candidate.placement, (1, 1))
    said = player.shortage(plan) or ""
    most = max(memory_terms(plan, PROFILE, 0).values())
    assert f"(has 2 MB), {format_bytes(most)} of it for " in said


def test_the_seconds_of_a_plan_are_those_of_its_prediction() -> None:
    player, candidate = prepared(regions({"a": 2}))
    plan = player.drafter.plan(candidate.placement, (2, 1))
    prediction = player.predicted(plan).prediction
    assert prediction is not None
    assert player.seconds(plan) == pytest.approx(prediction.step_s)
