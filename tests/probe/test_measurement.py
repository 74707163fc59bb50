from wantrain.probe.measurement import Measurement, Pair, Participant, find_sites, turned


def both_ways(latencies_ms: dict[str, float]) -> dict[Pair, float]:
    """Return latencies from {"a b": milliseconds}."""
    pairs = {(key[0], key[-1]): value / 1e3 for key, value in latencies_ms.items()}
    return pairs | {(b, a): value for (a, b), value in pairs.items()}


def test_workers_that_are_near_each_other_are_a_site() -> None:
    near = {"a b": 0.2, "c d": 1.5, "a c": 20.0, "a d": 21.0, "b c": 20.5, "b d": 20.0}
    found = find_sites("abcd", both_ways(near))
    assert found == {"a": "site-0", "b": "site-0", "c": "site-1", "d": "site-1"}


def test_a_jump_in_distance_ends_a_site_even_where_all_are_near() -> None:
    found = find_sites("abc", both_ways({"a b": 0.1, "a c": 2.0, "b c": 2.0}))
    assert found["a"] == found["b"] != found["c"]


def test_far_workers_are_sites_of_their_own_whatever_the_jumps() -> None:
    found = find_sites("abcd", both_ways({"a b": 6, "a c": 60, "b c": 60, "a d": 70, "b d": 70, "c d": 65}))
    assert len(set(found.values())) == 4


def test_noise_on_a_switch_makes_no_sites() -> None:
    found = find_sites("abc", both_ways({"a b": 0.02, "a c": 0.2, "b c": 0.25}))
    assert set(found.values()) == {"site-0"}


def test_a_chain_of_near_workers_is_one_site() -> None:
    found = find_sites("abcd", both_ways({"a b": 1, "b c": 1, "c d": 1, "a c": 2, "b d": 2, "a d": 3}))
    assert set(found.values()) == {"site-0"}


def test_two_workers_are_told_apart_by_distance_alone() -> None:
    assert find_sites("ab", both_ways({"a b": 1})) == {"a": "site-0", "b": "site-0"}
    assert find_sites("ab", both_ways({"a b": 4})) == {"a": "site-0", "b": "site-1"}


def test_the_better_of_one_and_several_connections_is_what_a_pair_reaches() -> None:
    workers = (Participant("a", "x"), Participant("b", "x"))
    made = Measurement(workers, {}, {("a", "b"): 2.0, ("b", "a"): 5.0}, {("a", "b"): 4.0, ("b", "a"): 4.0}, 8)
    assert [made.best_bytes_per_s(pair) for pair in (("a", "b"), ("b", "a"))] == [4.0, 5.0]
    assert made.sites == {"x": ["a", "b"]}


def test_turning_pairs_around_twice_changes_nothing() -> None:
    assert turned([("a", "b")]) == (("b", "a"),)
