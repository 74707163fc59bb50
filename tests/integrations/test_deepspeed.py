"""DeepSpeed's own pipelines in real processes over gloo: their layers under wantrain, wantrain's codecs in their sends.

Four processes are the stages and replicas of one job after another (`SCENARIOS`); the tests look at what they say.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import wantrain as wt
from tests.jobs import flat_topology
from wantrain.comm.groups import join_process_group
from wantrain.errors import PlanError, WantrainError
from wantrain.integrations.deepspeed import compress, job, profile
from wantrain.integrations.deepspeed.compression import SamplesInOrder
from wantrain.netem.sandbox import die_with_parent
from wantrain.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
WORLD_SIZE = 4
TIMEOUT_S = 500.0
VOCABULARY, HIDDEN, LENGTH, NUM_SAMPLES = 32, 32, 8, 16
MICROBATCH, MICROBATCHES, STEPS = 2, 4, 14
GRADIENTS = "error_feedback:quantized:4"

Said = dict[str, Any]


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.up, self.down = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        before = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        out: Tensor = x + self.down(torch.tanh(self.up(self.norm(before))))
        return out


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def head(embedding: nn.Embedding, x: Tensor) -> Tensor:
    return nn.functional.linear(x, embedding.weight)


def specs(is_tied: bool = False) -> list[Any]:
    """Return eight layers as a user of DeepSpeed lists them."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    shape = VOCABULARY, HIDDEN
    ends = [LayerSpec(nn.Embedding, *shape), LayerSpec(nn.Linear, *reversed(shape))]
    if is_tied:
        ends = [TiedLayerSpec("embed", nn.Embedding, *shape, **more) for more in ({}, {"forward_fn": head})]
    return [ends[0], torch.tanh, *[LayerSpec(Block, HIDDEN) for _ in range(5)], ends[1]]


def ids_of(step: int, replica: int = 0, replicas: int = 1) -> list[int]:
    """Return what a replica trains on: all samples in order, again and again."""
    count = MICROBATCH * MICROBATCHES
    first = (step * replicas + replica) * count
    return [place % NUM_SAMPLES for place in range(first, first + count)]


def samples(ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return tokens, and as targets the tokens one place later."""
    drawn = [torch.randint(VOCABULARY, (LENGTH + 1,), generator=torch.Generator().manual_seed(7 + i)) for i in ids]
    tokens = torch.stack(drawn)
    return tokens[:, :-1], tokens[:, 1:]


def microbatches(ids: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    for at in range(0, len(ids), MICROBATCH):
        yield samples(ids[at : at + MICROBATCH])


class Numbers(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Samples that are their own ids, in a number that two replicas can't share evenly."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.tensor(index), torch.tensor(index)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def make_module(stages: int, is_tied: bool = False, **more: Any) -> Any:
    from deepspeed.pipe import PipelineModule

    given = {"loss_fn": loss, "seed_layers": True, "partition_method": "uniform"} | more
    return PipelineModule(specs(is_tied), num_stages=stages, **given)


def make_engine(stages: int, *, is_tied: bool = False, zero: int = 0, training_data: Any = None) -> Any:
    import deepspeed

    module = make_module(stages, is_tied)
    config = {
        "train_micro_batch_size_per_gpu": MICROBATCH,
        "gradient_accumulation_steps": MICROBATCHES,
        "gradient_clipping": 0.0,  # the default is 1.0
        "steps_per_print": None,
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=adam(module.parameters()), training_data=training_data, config=config
    )
    return engine


def weights(parameters: Any) -> list[list[float]]:
    return [parameter.detach().flatten().tolist() for parameter in parameters]


def train(engine: Any) -> Said:
    """Train an engine; return its losses and this process's weights."""
    place = engine.grid.get_data_parallel_rank(), engine.grid.data_parallel_size
    losses = [float(engine.train_batch(microbatches(ids_of(step, *place)))) for step in range(STEPS)]
    return {"losses": losses, "weights": weights(engine.module.parameters())}


def compressed(engine: Any, forward: str, backward: str, gradients: str | None = None) -> Said:
    """Train an engine through codecs; say what was sent too, and validate with and without them."""
    place = engine.grid.get_data_parallel_rank(), engine.grid.data_parallel_size
    compression = compress(
        engine, forward=forward, backward=backward, gradients=gradients,
        sample_ids=lambda step: ids_of(step, *place), bytes_per_s=12.5e6, latency_s=0.001, timeout_s=TIMEOUT_S,
    )  # fmt: skip
    said = train(engine)
    said["sent_bytes"] = compression.sent_bytes
    validate = [float(engine.eval_batch(microbatches(ids_of(0))))]
    compression.close()
    said["validation"] = [*validate, float(engine.eval_batch(microbatches(ids_of(0))))]
    return said


def plan_of(num_stages: int) -> Plan:
    """Return a plan for the layers that cuts where DeepSpeed does."""
    made = wt.make_plan(
        flat_topology(num_stages), profile(specs(), samples([0, 1])[0]), batch_size=MICROBATCH * MICROBATCHES,
        num_stages=num_stages,
    )  # fmt: skip
    each = 8 // num_stages
    stages = [
        one.model_dump() | {"first_layer": i * each, "end_layer": (i + 1) * each} for i, one in enumerate(made.stages)
    ]
    return Plan.parse(made.model_dump() | {"stages": stages}, PlanError, "plan")


def under_wantrain(module: Any, rank: int, **more: Any) -> Said:
    """Train a PipelineModule's layers in a wantrain job."""
    plan = plan_of(WORLD_SIZE)
    trainer = wt.Trainer(
        **job(module, plan, **more)._asdict(), plan=plan, worker=plan.workers[rank], optimizer=adam, clip_norm=None,
        membership=join_process_group(None, TIMEOUT_S), timeout_s=TIMEOUT_S,
    )  # fmt: skip
    batches = [wt.Batch(ids, *samples(ids)) for ids in map(ids_of, range(STEPS))]
    said = {"losses": [trainer.step(batch).loss for batch in batches], "weights": weights(trainer.parameters)}
    trainer.close()
    return said


def in_order() -> tuple[list[int], list[int]]:
    """Return the samples that DeepSpeed deals this process in four epochs, and those that three steps are taken for."""
    import deepspeed.runtime.dataloader as loading

    make_loader = loading.DataLoader
    loading.DataLoader = lambda *args, **options: make_loader(*args, **options | {"num_workers": 0})  # one process less
    engine = make_engine(2, training_data=Numbers())
    named, count = SamplesInOrder(engine, "aqsgd:4"), 3 * MICROBATCHES
    dealt = [int(one) for _ in range(count) for one in next(engine.data_iterator)[0]]
    return dealt, [sample for step in range(3) for sample in named(step)]


def refusals(rank: int) -> Said:
    """Ask for what can't be done; return what is said to each."""
    from deepspeed.pipe import TiedLayerSpec

    engine, plan, layers = make_engine(2), plan_of(WORLD_SIZE), specs()
    tied = TiedLayerSpec("norm", nn.LayerNorm, HIDDEN)
    twice = TiedLayerSpec("norm", nn.LayerNorm, HIDDEN, tied_weight_attr=["weight", "bias"])
    unseeded, checkpointing = make_module(2, seed_layers=False), make_module(2, activation_checkpoint_interval=1)
    asked: dict[str, Callable[[], object]] = {
        "a module": lambda: compress(engine.module),
        "no ids": lambda: compress(engine),
        "remembered gradients": lambda: compress(engine, backward="aqsgd:4"),
        "unknown codec": lambda: compress(engine, forward="aqsgd:5"),
        "ZeRO reduces": lambda: compress(make_engine(2, zero=1), gradients=GRADIENTS, forward="quantized:4"),
        "tied in the middle": lambda: job([*layers[:3], tied, *layers[4:7], tied], plan, loss_fn=loss),
        "two weights": lambda: job([twice, *layers[1:7], twice], plan, loss_fn=loss),
        "no loss": lambda: job(layers, plan),
        "another plan": lambda: job(layers[:7], plan, loss_fn=loss),
        "unseeded": lambda: job(unseeded, plan).layers(rank * 2, rank * 2 + 2),
        "checkpointing": lambda: job(checkpointing, plan),
    }
    return {what: _refusal(ask) for what, ask in asked.items()}


def _refusal(ask: Callable[[], object]) -> str:
    try:
        return f"not refused: {ask()}"
    except WantrainError as caught:
        return f"{caught.exit_status}: {caught}"


SCENARIOS: dict[str, Callable[[int], Any]] = {
    "raw": lambda _: train(make_engine(4)),
    "job": lambda rank: under_wantrain(make_module(4), rank),
    "raw codecs": lambda _: compressed(make_engine(4), "raw:fp32", "raw:fp32"),
    "aqsgd": lambda _: compressed(make_engine(4), "aqsgd:4", "quantized:8"),
    "tied": lambda _: train(make_engine(4, is_tied=True)),
    "tied job": lambda rank: under_wantrain(specs(is_tied=True), rank, loss_fn=loss),
    "replicas": lambda _: train(make_engine(2)),
    "gradients": lambda _: compressed(make_engine(2), "aqsgd:4", "quantized:8", GRADIENTS),
    "replicas, codecs": lambda _: compressed(make_engine(2), "aqsgd:4", "quantized:8"),
    "zero": lambda _: compressed(make_engine(2, zero=1), "aqsgd:4", "quantized:8"),
    "in order": lambda _: in_order(),
    "refusals": refusals,
    "in the docs": lambda _: in_the_docs(0),
}


def member(rank: int, port: int, names: Sequence[str], results: Any) -> None:
    """Be one process of some jobs, and say what came of each."""
    die_with_parent()
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE),
        "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    torch.set_num_threads(1)

    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__ = {}  # none of its own operators is needed, and one would be compiled first
    deepspeed.init_distributed("gloo")
    results.put((rank, {name: SCENARIOS[name](rank) for name in names}))
    dist.barrier()
    dist.destroy_process_group()


def run(names: Sequence[str]) -> list[Said]:
    """Return what each process said of some jobs, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    processes = [
        context.Process(target=member, args=(rank, port, names, results), daemon=True) for rank in range(WORLD_SIZE)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(_next(results, processes) for _ in processes)
        for process in processes:
            process.join(TIMEOUT_S)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    return [found[rank] for rank in range(WORLD_SIZE)]


def _next(results: Any, processes: Sequence[Any]) -> tuple[int, Said]:
    """Wait for what the next process says, as long as none has failed."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        with suppress(queue.Empty):
            said: tuple[int, Said] = results.get(timeout=1.0)
            return said
        assert not any(process.exitcode for process in processes), "a process failed; see its stderr"
    raise AssertionError(f"no word within {TIMEOUT_S:g} s")


@pytest.fixture(scope="module")
def said() -> list[Said]:
    return run([name for name in SCENARIOS if name not in ("replicas, codecs", "zero")])


def losses(said: list[Said], name: str) -> list[float]:
    """Return a scenario's losses, on which all processes agree."""
    found: list[float] = said[0][name]["losses"]
    assert all(one[name]["losses"] == found for one in said)
    return found


ROUNDING = 2.0**-22
"""DeepSpeed adds the microbatches' losses in fp32, wantrain in fp64: what is reported differs, what is learned not."""


@pytest.mark.parametrize(("deepspeed", "wantrain"), [("raw", "job"), ("tied", "tied job")])
def test_a_pipeline_module_trains_the_same_under_wantrain(said: list[Said], deepspeed: str, wantrain: str) -> None:
    assert losses(said, wantrain) == pytest.approx(losses(said, deepspeed), rel=ROUNDING)
    assert losses(said, wantrain)[-1] < 0.7 * losses(said, wantrain)[0]
    for one in said:
        assert sorted(one[wantrain]["weights"]) == sorted(
            one[deepspeed]["weights"]
        )  # bit for bit; tied ones come first


def test_a_tied_weight_is_one_on_both_ends(said: list[Said]) -> None:
    assert said[0]["tied job"]["weights"][0] == said[-1]["tied job"]["weights"][-1]
    assert losses(said, "tied") != losses(said, "raw")


def test_raw_codecs_change_no_bit(said: list[Said]) -> None:
    assert losses(said, "raw codecs") == losses(said, "raw")
    assert all(one["raw codecs"]["weights"] == one["raw"]["weights"] for one in said)
    assert all(len(set(one["raw codecs"]["validation"])) == 1 for one in said)


def test_aqsgd_learns_as_well_with_an_eighth_of_the_bytes(said: list[Said]) -> None:
    assert losses(said, "aqsgd") != losses(said, "raw")
    assert losses(said, "aqsgd")[-1] == pytest.approx(losses(said, "raw")[-1], rel=0.02)
    for one in said[1:3]:
        assert 3 * one["aqsgd"]["sent_bytes"] < one["raw codecs"]["sent_bytes"]


def test_weight_gradients_in_four_bits_train_as_well(said: list[Said]) -> None:
    assert losses(said, "gradients")[-1] == pytest.approx(losses(said, "replicas")[-1], rel=0.05)
    assert losses(said, "gradients") != losses(said, "replicas")
    _replicas_agree(said, "gradients")


@pytest.mark.slow
def test_zero_1_within_a_stage_changes_nothing_beside_codecs_between_stages() -> None:
    said = run(["replicas, codecs", "zero"])
    assert losses(said, "zero") == losses(said, "replicas, codecs")
    _replicas_agree(said, "zero")


def _replicas_agree(said: list[Said], name: str) -> None:
    for rank in (0, 2):  # the first replica of each stage
        assert said[rank][name]["weights"] == said[rank + 1][name]["weights"]


def test_samples_of_training_data_are_told_apart_as_deepspeed_deals_them(said: list[Said]) -> None:
    for one in said:
        dealt, named = one["in order"]
        assert named == dealt


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("a module", "takes a PipelineEngine"),
        ("no ids", "'aqsgd:4' remembers samples by their ids"),
        ("remembered gradients", "can't carry gradients of activations"),
        ("unknown codec", "unknown codec 'aqsgd:5'"),
        ("ZeRO reduces", "with ZeRO the optimizer reduces gradients itself"),
        ("tied in the middle", "'norm' ties layers 3, 7, on stages 1, 3"),
        ("two weights", "'norm' ties 2 weights"),
        ("no loss", "no loss_fn"),
        ("another plan", "the plan is for 8 layers"),
        ("unseeded", "without seed_layers"),
        ("checkpointing", "activation_checkpoint_interval"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(said: list[Said], what: str, reason: str) -> None:
    for one in said:
        refusal = one["refusals"][what]
        assert refusal.startswith("2: ")
        assert reason in refusal
        assert "\n" not in refusal


def programs() -> list[str]:
    """Return the programs of the docs' section on DeepSpeed."""
    text = (ROOT / "docs" / "integrations.md").read_text()
    section = text[text.index("## DeepSpeed") :].split("\n## ", 1)[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def in_the_docs(number: int) -> float:
    """Run a program of the docs in this process; return the loss that it ends with."""
    from deepspeed import comm

    names: Said = {}
    exec(programs()[number], names)
    comm.barrier()
    return float(names["loss"])


def test_the_first_program_in_the_docs_runs_as_it_stands(said: list[Said]) -> None:
    assert all(one["in the docs"] < 0.1 for one in said)


def test_the_second_program_in_the_docs_runs_as_it_stands(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(programs()[1])
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    found = re.search(r"^loss ([\d.]+)", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    assert float(found[1]) < 0.1
