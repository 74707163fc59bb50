import pytest

from tests.scheduler.cases import PROFILE, regions, with_speeds
from wantrain.errors import PlanError
from wantrain.scheduler.lanes import make_deck
from wantrain.scheduler.network import make_network
from wantrain.scheduler.problem import Request
from wantrain.scheduler.search import Searcher, shapes_to_try
from wantrain.topology import Topology


def searcher(topology: Topology, **choices: object) -> Searcher:
    network = make_network(topology, [worker.name for worker in topology.workers])
    return Searcher(Request(PROFILE, 16, **choices), network, make_deck(16, 1, None, 1))  # type: ignore[arg-type]


def test_layouts_fill_the_grid_by_rows_or_by_columns() -> None:
    search = searcher(regions({"a": 4}))
    assert search.start((2, 2), [3, 2, 1, 0], "pipelines").placement.rows == ((1, 0), (3, 2))
    assert search.start((2, 2), [3, 2, 1, 0], "stages").placement.rows == ((2, 0), (3, 1))


def test_pinned_workers_start_in_their_stage() -> None:
    search = searcher(regions({"a": 4}), pinned={"a-0": 1, "a-3": 0})
    rows = search.start((2, 1), [0, 1, 2, 3], "pipelines").placement.rows
    assert rows == ((3, 0),)


def test_site_orders_keep_sites_together() -> None:
    topology = regions({"a": 2, "b": 2, "c": 2})
    search = searcher(topology)
    for order in search.site_orders():
        sites = [search.network.site_of[w] for w in order]
        assert sites == sorted(sites, key=sites.index)


def test_candidates_come_best_first_and_differ() -> None:
    search = searcher(with_speeds(regions({"a": 2, "b": 2}), [1e10, 2e10, 3e10, 4e10]))
    found = search.run([(1, 2), (2, 1), (2, 2)])
    assert [one.price for one in found] == sorted(one.price for one in found)
    assert len({one.placement for one in found}) == len(found)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((2, 2), [(2, 2)]), ((2, None), [(2, 1), (2, 2)]), ((None, 4), [(1, 4)])],
)
def test_numbers_that_are_given_are_kept(shape: tuple[int | None, int | None], expected: list[tuple[int, int]]) -> None:
    search = searcher(regions({"a": 4}))
    assert shapes_to_try(search.request, search.network, search.deck, *shape) == expected


def test_pins_that_no_shape_holds_are_refused() -> None:
    search = searcher(regions({"a": 4}), pinned={"a-0": 9})
    with pytest.raises(PlanError, match=r"the pinned workers need stage 9 .*; pin fewer, or to earlier stages"):
        shapes_to_try(search.request, search.network, search.deck, None, None)
