"""A stock FSDP2 program with wantrain's reduce-scatter: real processes over gloo."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from tests.integrations.members import TIMEOUT_S, process_group, said_by_members
from wantrain.errors import ConfigError, WantrainError
from wantrain.integrations import fsdp

STEPS = 12

TRAININGS = {"stock": None, "raw": "raw:fp32", "4 bits": "error_feedback:quantized:4"}
"""How gradients travel; None: as FSDP sends them."""


class Said(NamedTuple):
    """What one member says of a training: its losses, the weights in full, and the bytes that it sent."""

    losses: list[float]
    weights: list[list[float]]
    sent_bytes: int


def train(codec: str | None) -> Said:
    """Train a little with the others: rows that three members can't share out evenly, and two groups of parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    fully_shard(model[2])
    fully_shard(model)
    compressed = None if codec is None else fsdp.compress(model, codec, timeout_s=TIMEOUT_S)
    if compressed is None:
        model.set_force_sum_reduction_for_comms(True)  # gloo has no mean
        model[2].set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    inputs = torch.randn(16, 40, generator=generator)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), inputs[:, :8].tanh())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    weights = [parameter.full_tensor().flatten().tolist() for parameter in model.parameters()]  # type: ignore[attr-defined]
    sent_bytes = 0
    if compressed is not None:
        sent_bytes = compressed.sent_bytes
        compressed.close()
    return Said(losses, weights, sent_bytes)


def refusals() -> list[str]:
    """Return what is said to a model that is not sharded, and to one that is sharded over others."""
    said = []
    with pytest.raises(ConfigError) as caught:
        fsdp.compress(nn.Linear(4, 4))
    said.append(str(caught.value))
    model = nn.Linear(8, 8)
    fully_shard(model)
    pairs = [dist.new_group([0, 1]), dist.new_group([0, 2])]
    if dist.get_rank() == 2:
        return said
    compressed = fsdp.compress(model, process_group=pairs[0], timeout_s=TIMEOUT_S)
    with pytest.raises(ConfigError) as caught:
        compressed.check_group(dist.distributed_c10d._get_default_group())
    said.append(str(caught.value))
    compressed.close()
    return said


def be_member(rank: int, ports: Sequence[int], results: Any) -> None:
    """Be one member of every training."""
    said, refused = {}, []
    for (name, codec), port in zip(TRAININGS.items(), ports, strict=True):
        with process_group(rank, port):
            said[name] = tuple(train(codec))
            refused += refusals() if name == "4 bits" else []
            dist.barrier()
    results.put((rank, (said, refused)))


class Outcome(NamedTuple):
    """What all members said, by rank: of every training, and of what was refused."""

    trained: dict[str, list[Said]]
    refused: list[list[str]]


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    """Train in every way, in real processes."""
    said = said_by_members(be_member, len(TRAININGS))
    trained = {name: [Said(*trainings[name]) for trainings, _ in said] for name in TRAININGS}
    return Outcome(trained, [refused for _, refused in said])


def flat(said: Said) -> torch.Tensor:
    return torch.cat([torch.tensor(one) for one in said.weights])


def test_uncompressed_it_trains_as_fsdp_does(outcome: Outcome) -> None:
    raw, stock = outcome.trained["raw"], outcome.trained["stock"]
    assert raw[0].losses == pytest.approx(stock[0].losses, rel=1e-4)
    torch.testing.assert_close(flat(raw[0]), flat(stock[0]), rtol=1e-3, atol=1e-5)
    assert raw[0].weights == raw[1].weights == raw[2].weights


def test_four_bits_with_error_feedback_train_as_well_for_an_eighth_of_the_bytes(outcome: Outcome) -> None:
    coded, raw = outcome.trained["4 bits"], outcome.trained["raw"]
    assert coded[0].weights == coded[1].weights == coded[2].weights
    assert coded[0].losses[-1] == pytest.approx(raw[0].losses[-1], rel=0.02)
    assert coded[0].losses[-1] < 0.5 * coded[0].losses[0]
    assert all(few.sent_bytes < raw_one.sent_bytes / 5 for few, raw_one in zip(coded, raw, strict=True))


def test_what_cannot_work_is_refused_in_one_line(outcome: Outcome) -> None:
    first, second, third = outcome.refused
    assert first == second
    assert first[0] == third[0] == "the model is not sharded; call fully_shard on it before compress"
    assert first[1] == "the model is sharded over ranks [0, 1, 2], not [0, 1]; give compress their group"
    with pytest.raises(WantrainError, match="aqsgd"):
        fsdp.compress(nn.Linear(4, 4), "aqsgd:4")
