from tests.scheduler.cases import PROFILE, regions, with_speeds
from wantrain.scheduler.draft import Drafter
from wantrain.scheduler.lanes import make_deck
from wantrain.scheduler.network import make_network
from wantrain.scheduler.playing import Player
from wantrain.scheduler.polish import neighbours, polish
from wantrain.scheduler.problem import Request
from wantrain.scheduler.search import Candidate, Searcher


def start() -> tuple[Player, Candidate]:
    topology = with_speeds(regions({"a": 2, "b": 2}, far="10 Mbit/s"), [4e10, 4e9, 4e10, 4e9])
    network = make_network(topology, [worker.name for worker in topology.workers])
    request, deck = Request(PROFILE, 8), make_deck(8, 1, None, 2)
    candidate = Searcher(request, network, deck).start((2, 2), [1, 0, 3, 2], "pipelines")
    return Player(topology, PROFILE, Drafter(request, topology, network, deck)), candidate


def test_neighbours_are_sorted_by_estimate_and_each_is_one_change_away() -> None:
    _, candidate = start()
    found = list(neighbours(candidate))
    prices = [one.price for one in found]
    assert prices == sorted(prices)
    assert all(one.placement != candidate.placement for one in found)


def test_polishing_never_makes_a_plan_slower_and_stops_at_its_limit() -> None:
    player, candidate = start()
    played = player.best_depths(candidate)
    assert played is not None
    score, plan = played
    _, same = polish(player, candidate, plan, score, 0)
    assert same is plan
    moved, better = polish(player, candidate, plan, score, 50_000)
    assert player.score(better) < score
    assert moved.placement != candidate.placement
