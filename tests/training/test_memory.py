"""What a rank needs at most is what the planner says it needs."""

import multiprocessing
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import small_plan
from wantrain.model_config import ModelConfig
from wantrain.plan import Plan
from wantrain.profile import gpt_profile
from wantrain.scheduler.cost_model import memory_bytes

BIG = ModelConfig(num_layers=4, hidden=256, num_heads=4, seq_len=256)
MICROBATCH = 4


def resident_bytes(field: str) -> int:
    """Return VmRSS or VmHWM (the peak) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(rank: int, plan: Plan, port: int, results: "multiprocessing.Queue[tuple[int, int]]") -> None:
    """Be one rank of a job over gloo; report the peak above what the process itself took."""
    import torch

    from tests.jobs import TIMEOUT_S, make_trainer
    from wantrain.comm.groups import join
    from wantrain.models import gpt
    from wantrain.training.loop import set_up_process
    from wantrain.training.trainer import Batch

    set_up_process(threads=1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(plan.world_size)}
    membership = join(plan.world_size, rank, TIMEOUT_S)
    tiny = BIG.model_copy(update={"hidden": 12, "seq_len": 8})  # loads what torch loads at first use
    layers = gpt.build_layers(tiny, 0, tiny.num_layers_total, 0)
    hidden = torch.zeros(1, 8, dtype=torch.int64)
    for layer in layers:
        hidden = layer(hidden)
    hidden.sum().backward()
    torch.optim.AdamW([parameter for layer in layers for parameter in layer.parameters()]).step()
    baseline = resident_bytes("VmRSS")
    trainer = make_trainer(plan, membership, rank, model=BIG)
    samples = plan.replicas[trainer.replica].num_microbatches * plan.microbatch_size
    tokens = torch.randint(0, 256, (samples, BIG.seq_len))
    for _ in range(2):
        trainer.step(Batch(list(range(samples)), tokens, tokens))
    results.put((rank, resident_bytes("VmHWM") - baseline))
    trainer.close()


@pytest.mark.parametrize(("stages", "replicas", "depths"), [(2, 1, None), (2, 1, (6, 6)), (1, 2, None)])
def test_the_peak_is_within_a_quarter_of_the_planners_formula(
    stages: int, replicas: int, depths: tuple[int, ...] | None
) -> None:
    plan = small_plan(
        stages, replicas, model=BIG, batch_size=24 * replicas, num_lanes=replicas, microbatch_size=MICROBATCH,
        max_in_flight=depths, bucket_bytes=4 * 2**20,
    )  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[tuple[int, int]] = context.Queue()
    processes = [context.Process(target=measure, args=(rank, plan, port, results)) for rank in range(plan.world_size)]
    for process in processes:
        process.start()
    peaks = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    profile = gpt_profile(BIG, MICROBATCH)
    for rank, peak in peaks.items():
        formula = memory_bytes(plan, profile, rank)
        print(f"rank {rank}: peak {peak / 1e6:.0f} MB, formula {formula / 1e6:.0f} MB, {peak / formula:.2f}")
        assert peak <= 1.25 * formula, f"rank {rank}"
        assert peak >= 0.3 * formula, f"rank {rank}: the formula says far too much"


def test_a_worker_has_large_blocks_in_large_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this kernel gives no large pages")
    program = (
        "from pathlib import Path; import torch; from wantrain.training.loop import set_up_process; set_up_process(1);"
        " kept = torch.ones(1 << 24); print(Path('/proc/self/smaps_rollup').read_text())"
    )
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    (kilobytes,) = re.findall(r"AnonHugePages: +(\d+) kB", shown)
    assert int(kilobytes) >= 32 << 10, "half of the tensor"
