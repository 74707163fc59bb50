import itertools

import pytest

from wantrain.probe.rounds import tournament


@pytest.mark.parametrize("num_players", [1, 2, 3, 7, 8, 33])
def test_everybody_meets_everybody_once_and_nobody_twice_in_a_round(num_players: int) -> None:
    players = [f"w-{i}" for i in range(num_players)]
    rounds = tournament(players)
    assert all(len({one for pair in pairs for one in pair}) == 2 * len(pairs) for pairs in rounds)
    met = sorted(tuple(sorted(pair)) for pairs in rounds for pair in pairs)
    assert met == sorted(tuple(sorted(pair)) for pair in itertools.combinations(players, 2))


@pytest.mark.parametrize(("num_players", "num_rounds"), [(0, 0), (1, 0), (2, 1), (7, 7), (8, 7), (64, 63)])
def test_rounds_are_about_as_many_as_players(num_players: int, num_rounds: int) -> None:
    assert len(tournament(range(num_players))) == num_rounds
