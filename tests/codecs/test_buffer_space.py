from hypothesis import given
from hypothesis import strategies as st

from wantrain.codecs.buffer_space import FileSpace


def test_an_entry_stays_in_its_slot_until_a_checkpoint_needs_it() -> None:
    space = FileSpace(4)
    home = space.move(None)
    assert home == 0
    assert space.move(home) == 0
    space.claim(100)
    assert space.move(0) == 1
    assert space.move(1) == 1


def test_a_dropped_checkpoint_frees_its_slots() -> None:
    space = FileSpace(2)
    space.move(None)
    space.claim(100)
    assert space.move(0) == 1
    space.claim(200)
    assert space.claims == [100, 200]
    space.keep_claims([200])
    assert space.move(None) == 0
    assert space.move(None) is None


def test_older_checkpoints_give_way_before_an_entry_is_without_a_home_and_the_newest_never() -> None:
    space = FileSpace(3)
    home = space.move(None)
    for step in (100, 200):
        space.claim(step)
        home = space.move(home)
    space.claim(300)
    assert space.claims == [100, 200, 300]
    assert space.move(home) == 0
    assert space.claims == [200, 300]
    assert space.move(None) == 1
    assert space.claims == [300]
    assert space.move(None) is None


def test_a_claim_that_is_read_back_leaves_the_other_slots_free() -> None:
    space = FileSpace(6)
    space.claim(100, [4, 1, 9])  # 9 is beyond this run's budget
    assert space.settle(4)
    assert not space.settle(4)
    assert not space.settle(9)
    assert sorted(slot for _ in range(4) if (slot := space.move(None)) is not None) == [0, 2, 3, 5]
    assert space.move(None) is None


def test_a_step_that_is_saved_again_claims_anew() -> None:
    space = FileSpace(2)
    home = space.move(None)
    space.claim(100)
    home = space.move(home)
    space.claim(100)
    assert space.move(home) == 0
    assert space.claims == [100]


@given(st.integers(1, 6), st.lists(st.tuples(st.sampled_from("mrck"), st.integers(0, 5)), max_size=60))
def test_no_slot_is_given_away_twice(num_slots: int, actions: list[tuple[str, int]]) -> None:
    space, homes, saved = FileSpace(num_slots), dict[int, int](), dict[int, set[int]]()
    for step, (action, entry) in enumerate(actions):
        if action == "m":
            home = space.move(homes.pop(entry, None))
            if home is not None:
                homes[entry] = home
        elif action == "r" and entry in homes:
            space.release(homes.pop(entry))
        elif action == "c":
            space.claim(step)
            saved[step] = set(homes.values())
        elif action == "k":
            space.keep_claims(sorted(saved)[-2:])
        assert len(set(homes.values())) == len(homes)
        assert all(0 <= home < num_slots for home in homes.values())
        if saved and action == "m" and entry in homes:
            assert homes[entry] not in saved[max(saved)]
