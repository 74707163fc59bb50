"""A stock DistributedDataParallel program with wantrain's hook: real processes over gloo."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.integrations.members import TIMEOUT_S, process_group, said_by_members
from wantrain.errors import ConfigError, WantrainError
from wantrain.integrations import ddp

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12

Weights = list[list[float]]


def make_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).to(dtype)


class Training(NamedTuple):
    """A codec, none for torch without a hook, and the type of weights and gradients."""

    codec: str | None
    dtype: torch.dtype = torch.float32
    rank: int | None = None


class Outcome(NamedTuple):
    """The losses of rank 0, and all members' final weights."""

    losses: list[float]
    weights: list[Weights]


TRAININGS = {
    "stock": Training(None),
    "raw": Training("raw:fp32"),
    "4 bits": Training("error_feedback:quantized:4"),
    "8 bits of bf16": Training("error_feedback:quantized:8", torch.bfloat16),
    "rank 8 of 4 bits": Training("quantized:4", rank=8),
}


def train(training: Training) -> tuple[list[float], Weights]:
    """Train a little with the others; return the losses and final weights."""
    model = make_model(training.dtype)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.02)  # type: ignore[arg-type]  # several buckets
    if training.codec is not None:
        state = ddp.State(training.codec, rank=training.rank, timeout_s=TIMEOUT_S)
        wrapped.register_comm_hook(state, ddp.hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    inputs = torch.randn(16, 40, generator=generator).to(training.dtype)
    targets = inputs[:, :8].tanh()
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(wrapped(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    if training.codec is not None:
        state.close()
    return losses, [parameter.flatten().tolist() for parameter in model.parameters()]


def be_member(rank: int, ports: Sequence[int], results: Any) -> None:
    """Be one member of every training."""
    said = {}
    for (name, training), port in zip(TRAININGS.items(), ports, strict=True):
        with process_group(rank, port):
            said[name] = train(training)
    results.put((rank, said))


@pytest.fixture(scope="module")
def trained() -> dict[str, Outcome]:
    """Train in every way, in real processes."""
    said = said_by_members(be_member, len(TRAININGS))
    return {name: Outcome(said[0][name][0], [member[name][1] for member in said]) for name in TRAININGS}


def flat(weights: Weights) -> torch.Tensor:
    return torch.cat([torch.tensor(one) for one in weights])


def test_uncompressed_it_trains_as_torch_does(trained: dict[str, Outcome]) -> None:
    (losses, weights), stock = trained["raw"], trained["stock"]
    assert losses == pytest.approx(stock.losses, rel=1e-4)
    torch.testing.assert_close(flat(weights[0]), flat(stock.weights[0]), rtol=1e-3, atol=1e-5)
    assert weights[0] == weights[1] == weights[2]


def test_four_bits_with_error_feedback_train_as_well(trained: dict[str, Outcome]) -> None:
    (losses, weights), stock = trained["4 bits"], trained["stock"]
    assert weights[0] == weights[1] == weights[2]
    assert weights[0] != stock.weights[0]
    assert losses[-1] == pytest.approx(stock.losses[-1], rel=0.02)
    assert losses[-1] < 0.5 * losses[0]


def test_gradients_in_bf16_are_averaged_too(trained: dict[str, Outcome]) -> None:
    losses, weights = trained["8 bits of bf16"]
    assert weights[0] == weights[1] == weights[2]
    assert losses[-1] < 0.6 * losses[0]


def test_matrices_as_factors_of_four_bits_train_too(trained: dict[str, Outcome]) -> None:
    losses, weights = trained["rank 8 of 4 bits"]
    assert weights[0] == weights[1] == weights[2]
    assert weights[0] != trained["4 bits"].weights[0]
    assert losses[-1] < 0.6 * losses[0]


def test_what_cannot_work_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="call init_process_group first"):
        ddp.State()
    with pytest.raises(WantrainError, match="aqsgd"):
        ddp.State("aqsgd:4")
    with pytest.raises(ConfigError, match="rank must be at least 1"):
        ddp.State(rank=0)


def test_the_program_in_the_docs_runs_as_it_stands(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "integrations.md").read_text(), re.DOTALL)
    (block,) = (one for one in blocks if "register_comm_hook" in one)
    script = tmp_path / "train.py"
    script.write_text(block)
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    found = re.search(r"loss ([\d.]+)", done.stdout)
    assert found is not None
    assert float(found[1]) < 0.5
