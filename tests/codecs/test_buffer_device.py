import pytest
import torch

from wantrain.codecs.buffer_device import DeviceTier, no_wait
from wantrain.errors import CodecError

CPU = torch.device("cpu")


def host(fill: int) -> torch.Tensor:
    return torch.full((10,), fill, dtype=torch.uint8)


def test_what_is_stored_is_on_the_host_and_still_on_the_device() -> None:
    tier, memory = DeviceTier(CPU, 10, 2), host(1)
    tier.fetch(7, memory).fill_(5)
    assert tier.store(7, memory) is no_wait
    assert torch.equal(memory, host(5))
    memory.fill_(9)  # it is not copied up again
    assert torch.equal(tier.fetch(7, memory), host(5))


def test_the_one_used_last_leaves_first_and_none_in_use() -> None:
    tier = DeviceTier(CPU, 10, 2)
    for sample in (1, 2):
        tier.reserve(sample).fill_(sample)
        tier.store(sample, host(0))
    tier.reserve(3)
    assert torch.equal(tier.fetch(1, host(0)), host(1))
    with pytest.raises(CodecError, match=r"device memory is all in use \(2 entries\); raise buffers.device"):
        tier.reserve(2)


def test_what_is_forgotten_makes_room() -> None:
    tier = DeviceTier(CPU, 10, 1)
    tier.reserve(1)
    tier.forget(1)
    tier.forget(2)
    assert torch.equal(tier.fetch(2, host(4)), host(4))


def test_without_a_budget_an_entry_is_on_the_device_for_its_use_alone() -> None:
    tier, memory = DeviceTier(CPU, 10, 0), host(1)
    assert tier.num_bytes == 0
    lent = tier.fetch(7, memory)
    assert torch.equal(lent, host(1))
    assert tier.fetch(7, host(2)).data_ptr() == lent.data_ptr()
    lent.fill_(5)
    tier.store(7, memory)
    assert torch.equal(memory, host(5))
    assert torch.equal(tier.fetch(7, host(3)), host(3))  # it was not kept
    tier.reserve(8).fill_(4)
    tier.forget(8)
    assert torch.equal(tier.fetch(8, host(6)), host(6))
