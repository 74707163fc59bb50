import torch

from wantrain.codecs.buffer_arena import Arena
from wantrain.codecs.buffer_file import ALIGNMENT


def test_slots_are_aligned_apart_and_exactly_what_was_asked_for() -> None:
    arena = Arena(3, 5000, torch.device("cpu"))
    assert arena.num_bytes == 3 * 2 * ALIGNMENT
    assert sorted(arena.free) == [0, 1, 2]
    for slot in arena.free:
        arena.entry(slot).fill_(slot + 1)
    for slot in arena.free:
        assert arena.memory(slot).ctypes.data % ALIGNMENT == 0
        assert set(arena.memory(slot)[:5000].tolist()) == {slot + 1}
        assert set(arena.memory(slot)[5000:].tolist()) == {0}
