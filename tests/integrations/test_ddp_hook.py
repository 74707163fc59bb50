"""A stock DistributedDataParallel program with wantrain's hook: real processes over gloo."""

import multiprocessing
import os
import re
import socket
import subprocess
import sys
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wantrain.errors import ConfigError, WantrainError
from wantrain.integrations import ddp

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 100.0
STEPS = 12

Weights = list[list[float]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).to(dtype)


def train(rank: int, world_size: int, port: int, codec: str | None, dtype: torch.dtype, results: Any) -> None:
    """Be one member: train a little, and say the losses and final weights."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    model = make_model(dtype)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.02)  # type: ignore[arg-type]  # several buckets
    if codec is not None:
        state = ddp.State(codec, timeout_s=TIMEOUT_S)
        wrapped.register_comm_hook(state, ddp.hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(1 + rank)
    inputs = torch.randn(16, 40, generator=generator).to(dtype)
    targets = inputs[:, :8].tanh()
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(wrapped(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    results.put((rank, losses, [parameter.flatten().tolist() for parameter in model.parameters()]))
    if codec is not None:
        state.close()
    del wrapped
    dist.destroy_process_group()


def run(world_size: int, codec: str | None, dtype: torch.dtype = torch.float32) -> tuple[list[float], list[Weights]]:
    """Return the losses of rank 0, and all members' final weights."""
    context = multiprocessing.get_context("spawn")
    results: Queue[Any] = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=train, args=(rank, world_size, port, codec, dtype, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    said = {rank: (losses, weights) for rank, losses, weights in (results.get(timeout=TIMEOUT_S) for _ in processes)}
    for process in processes:
        process.join(TIMEOUT_S)
        assert process.exitcode == 0
    return said[0][0], [said[rank][1] for rank in range(world_size)]


def flat(weights: Weights) -> torch.Tensor:
    return torch.cat([torch.tensor(one) for one in weights])


@pytest.fixture(scope="module")
def stock() -> tuple[list[float], list[Weights]]:
    return run(3, None)


def test_uncompressed_it_trains_as_torch_does(stock: tuple[list[float], list[Weights]]) -> None:
    losses, weights = run(3, "raw:fp32")
    assert losses == pytest.approx(stock[0], rel=1e-4)
    torch.testing.assert_close(flat(weights[0]), flat(stock[1][0]), rtol=1e-3, atol=1e-5)
    assert weights[0] == weights[1] == weights[2]


def test_four_bits_with_error_feedback_train_as_well(stock: tuple[list[float], list[Weights]]) -> None:
    losses, weights = run(3, "error_feedback:quantized:4")
    assert weights[0] == weights[1] == weights[2]
    assert weights[0] != stock[1][0]
    assert losses[-1] == pytest.approx(stock[0][-1], rel=0.02)
    assert losses[-1] < 0.5 * losses[0]


def test_gradients_in_bf16_are_averaged_too() -> None:
    losses, weights = run(2, "error_feedback:quantized:8", torch.bfloat16)
    assert weights[0] == weights[1]
    assert losses[-1] < 0.6 * losses[0]


def test_what_cannot_work_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="call init_process_group first"):
        ddp.State()
    with pytest.raises(WantrainError, match="aqsgd"):
        ddp.State("aqsgd:4")


def test_the_program_in_the_docs_runs_as_it_stands(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "integrations.md").read_text(), re.DOTALL)
    script = tmp_path / "train.py"
    script.write_text(block)
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    found = re.search(r"loss ([\d.]+)", done.stdout)
    assert found is not None
    assert float(found[1]) < 0.5
