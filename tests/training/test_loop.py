import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import flat_topology, make_trainer, run_ranks
from wantrain.comm.loopback import LoopbackJob
from wantrain.config import RunConfig, TrainingConfig
from wantrain.errors import CheckpointError, ConfigError, PlanError
from wantrain.plan import Plan
from wantrain.run_directory import RunDirectory, StepRecord
from wantrain.training import checkpoint
from wantrain.training.job import Job, plan_for
from wantrain.training.loop import codec_settings, learning_rate, make_optimizer, train
from wantrain.training.quantized_adam import QuantizedAdam

TEXT = "".join(f"{i} is a number and {i * i} is its square.\n" for i in range(400))


class CrashError(Exception):
    """Stands for a process that is killed."""


@pytest.fixture(autouse=True)
def _cache_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


LOSSY = {
    "forward_codec": "aqsgd:4,group=32,first=hadamard:8",
    "backward_codec": "quantized:6,group=32,rounding=stochastic",
    "gradient_codec": "error_feedback:quantized:4,group=32",
}


def make_config(
    folder: Path,
    text: str = TEXT,
    parallel: dict[str, Any] | None = None,
    buffers: dict[str, Any] | None = None,
    **training: Any,
) -> RunConfig:
    (folder / "text.txt").write_text(text)
    return RunConfig.parse(
        {
            "model": {"num_layers": 4, "hidden": 32, "num_heads": 2, "seq_len": 16},
            "data": {"source": str(folder / "text.txt"), "validation_fraction": 0.1},
            "training": {
                **{"steps": 6, "batch_size": 8, "num_lanes": 4, "warmup_steps": 2},
                **{"validation_samples": 8, "record_every": 2},
                **training,
            },
            "checkpoint": {"every": 2, "keep": 2},
            "parallel": parallel or {},
            "buffers": buffers or {},
        },
        ConfigError,
        "test",
    )


def plan_of(config: RunConfig, stages: int, replicas: int) -> Plan:
    parallel = config.parallel.model_copy(update={"num_stages": stages, "num_replicas": replicas})
    return plan_for(config.model_copy(update={"parallel": parallel}), flat_topology(stages * replicas))


def run_job(
    config: RunConfig,
    plan: Plan,
    run: RunDirectory,
    is_resumed: bool = False,
    crash_at: int | None = None,
    stop_at: int | None = None,
) -> None:
    """Run the whole loop on every rank; `crash_at` kills all before that step, `stop_at` asks rank 1 to stop in it."""
    job = LoopbackJob(plan.world_size)
    whole = Job(config, flat_topology(plan.world_size), plan)

    def body(rank: int) -> None:
        settings = codec_settings(config, run, plan.workers[rank])
        trainer = make_trainer(plan, job.member(rank), rank, model=config.model, codec_settings=settings)

        def stop_requested() -> bool:
            if trainer.step_number == crash_at:
                raise CrashError
            return rank == plan.world_size - 1 and trainer.step_number == stop_at

        train(trainer, whole, run, is_resumed, stop_requested)
        trainer.close()

    torch.set_num_threads(1)
    run_ranks(plan.world_size, body)


def losses(run: RunDirectory, rank: int = 0) -> list[float]:
    return [record.loss for record in run.read_steps(rank)]


def test_a_run_writes_metrics_validations_timelines_and_checkpoints(tmp_path: Path) -> None:
    config, run = make_config(tmp_path, validate_every=3), RunDirectory(tmp_path / "run")
    plan = plan_of(config, 2, 2)
    run_job(config, plan, run)
    steps: list[StepRecord] = run.read_steps(3)
    assert [record.step for record in steps] == list(range(6))
    assert steps[0].tokens == 8 * 16
    assert all(0 < record.compute_s < record.step_s for record in steps)
    assert [record.step for record in run.read_validations()] == [2, 5]
    assert [timeline.step for timeline in run.read_timelines(plan.workers)] == [0, 2, 4]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000004", "step-00000006"]
    assert json.loads(run.summary.read_text())["steps"] == 6
    up, data = steps[0].sent[plan.workers[2]], steps[0].sent[plan.workers[1]]
    assert up.raw_bytes == 4 * 16 * 32 * 4
    assert up.wire_bytes > up.raw_bytes
    assert data.wire_bytes > 0


def test_an_emulated_link_is_busy_for_at_least_its_bytes_over_its_rate(tmp_path: Path) -> None:
    config, run = make_config(tmp_path, steps=1), RunDirectory(tmp_path / "run")
    plan = plan_of(config, 2, 1)
    run.path.mkdir()
    run.network.write_text("{}")
    run_job(config, plan, run)
    (sent,) = run.read_steps(0)[0].sent.values()
    assert sent.busy_s >= sent.wire_bytes / 125e6


def test_a_killed_run_goes_on_with_the_very_losses_it_would_have_had(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    plan = plan_of(config, 2, 2)
    whole, broken = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "broken")
    run_job(config, plan, whole)
    with pytest.raises(CrashError):
        run_job(config, plan, broken, crash_at=5)
    run_job(config, plan, broken, is_resumed=True)
    for rank in range(4):
        assert losses(broken, rank) == losses(whole, rank)
    assert [record.validation_loss for record in broken.read_validations()] == [
        record.validation_loss for record in whole.read_validations()
    ]


@pytest.mark.parametrize("buffers", [{}, {"ram": "200 kB", "file": "1 MB"}], ids=["ram", "file"])
def test_a_killed_run_with_lossy_codecs_goes_on_with_the_very_losses(tmp_path: Path, buffers: dict[str, Any]) -> None:
    config = make_config(tmp_path, TEXT[:700], LOSSY, buffers, steps=14, validate_every=7)
    plan = plan_of(config, 2, 2)
    whole, broken = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "broken")
    run_job(config, plan, whole)
    with pytest.raises(CrashError):
        run_job(config, plan, broken, crash_at=11)
    run_job(config, plan, broken, is_resumed=True)
    for rank in range(4):
        assert losses(broken, rank) == losses(whole, rank)
    first, last = whole.read_steps(0)[0], whole.read_steps(0)[-1]
    peer = plan.workers[1]
    assert last.sent[peer].wire_bytes < first.sent[peer].wire_bytes  # every sample has been seen
    assert 0 < last.codecs[f"{peer}/forward"].relative_error < 0.2
    assert last.codecs[f"{peer}/forward"].bits == 4


def test_bits_that_were_raised_are_kept_by_a_run_that_goes_on(tmp_path: Path) -> None:
    config = make_config(tmp_path, parallel={"backward_codec": "quantized:3", "max_codec_error": 0.05}, steps=14)
    plan = plan_of(config, 2, 1)
    whole, broken = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "broken")
    run_job(config, plan, whole)
    with pytest.raises(CrashError):
        run_job(config, plan, broken, crash_at=11)
    run_job(config, plan, broken, is_resumed=True)
    assert losses(broken, 1) == losses(whole, 1)
    bits = [record.codecs[f"{plan.workers[0]}/backward"].bits for record in broken.read_steps(1)]
    assert bits == [3, 4] + [6] * 12


def test_dropped_buffers_begin_with_first_visits(tmp_path: Path) -> None:
    config = make_config(tmp_path, TEXT[:700], LOSSY, {"on_checkpoint": "drop"}, steps=14)
    plan = plan_of(config, 2, 1)
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(CrashError):
        run_job(config, plan, run, crash_at=11)
    run_job(config, plan, run, is_resumed=True)
    sent = [record.sent[plan.workers[1]].wire_bytes for record in run.read_steps(0)]
    assert sent[10] == sent[0] > sent[9]
    assert not list(run.checkpoints.rglob("buffer-*"))


def test_bits_rise_where_too_much_is_lost_and_the_run_says_so(tmp_path: Path) -> None:
    config = make_config(tmp_path, parallel={"backward_codec": "quantized:3", "max_codec_error": 0.05}, steps=5)
    run = RunDirectory(tmp_path / "run")
    plan = plan_of(config, 2, 1)
    run_job(config, plan, run)
    records = run.read_steps(1)
    bits = [record.codecs[f"{plan.workers[0]}/backward"].bits for record in records]
    assert bits == [3, 4, 6, 6, 6]
    assert records[-1].codecs[f"{plan.workers[0]}/backward"].relative_error < 0.05
    assert "4 → 6 bits from the next step" in run.notes.read_text()


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_a_checkpoint_of_four_stages_goes_on_under_any_plan(tmp_path: Path, stages: int, replicas: int) -> None:
    config = make_config(tmp_path)
    whole, moved = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "moved")
    run_job(config, plan_of(config, 4, 1), whole)
    with pytest.raises(CrashError):
        run_job(config, plan_of(config, 4, 1), moved, crash_at=4)
    run_job(config, plan_of(config, stages, replicas), moved, is_resumed=True)
    got, expected = losses(moved), losses(whole)
    assert got[:4] == expected[:4]
    assert got == (expected if replicas == 1 else pytest.approx(expected, rel=1e-5))


def test_a_request_to_stop_ends_all_ranks_after_the_same_step_with_a_checkpoint(tmp_path: Path) -> None:
    config, run = make_config(tmp_path), RunDirectory(tmp_path / "run")
    run_job(config, plan_of(config, 2, 2), run, stop_at=2)
    assert {len(losses(run, rank)) for rank in range(4)} == {3}
    assert "step-00000003" in {path.name for path in run.checkpoints.iterdir()}
    whole = RunDirectory(tmp_path / "whole")
    run_job(config, plan_of(config, 2, 2), whole)
    run_job(config, plan_of(config, 2, 2), run, is_resumed=True)
    assert losses(run) == losses(whole)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_said_so(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run, whole = make_config(tmp_path), RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "whole")
    plan = plan_of(config, 2, 1)
    run_job(config, plan, whole)
    with pytest.raises(CrashError):
        run_job(config, plan, run, crash_at=5)
    newest = run.checkpoints / "step-00000004"
    file = newest / ("manifest.json" if damage == "no manifest" else "layer-0003.safetensors")
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    run_job(config, plan, run, is_resumed=True)
    said = capsys.readouterr().err
    assert "passed over the checkpoint of step 4" in said
    assert "resumed from step 2" in said
    assert losses(run) == losses(whole)


def test_a_half_written_checkpoint_is_never_taken_for_one(tmp_path: Path) -> None:
    config, run = make_config(tmp_path), RunDirectory(tmp_path / "run")
    run_job(config, plan_of(config, 1, 1), run)
    (run.checkpoints / "step-00000006").rename(run.checkpoints / "step-00000006.partial")
    run_job(config, plan_of(config, 1, 1), run, is_resumed=True)
    assert [record.step for record in run.read_steps(0)] == list(range(6))


def test_a_full_disk_while_saving_is_one_error_on_every_rank_and_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = make_config(tmp_path), RunDirectory(tmp_path / "run")

    def full(path: Path, data: bytes) -> str:
        if "00000004" in str(path):
            raise CheckpointError(f"can't write {path} (No space left on device); free some space")
        return original(path, data)

    original = checkpoint.write_file
    monkeypatch.setattr(checkpoint, "write_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        run_job(config, plan_of(config, 2, 1), run)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000002"]


def test_the_rate_warms_up_and_falls_to_its_final_share() -> None:
    training = TrainingConfig(
        steps=100, batch_size=1, warmup_steps=10, learning_rate=1.0, final_learning_rate_ratio=0.1
    )
    rates = [learning_rate(training, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_ranks_with_other_text_are_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    plan = plan_of(config, 2, 1)
    job = LoopbackJob(2)

    def body(rank: int) -> None:
        trainer = make_trainer(plan, job.member(rank), rank, model=config.model)
        trainer.agree({"the plan": "one", "the training text": f"digest {rank}"})

    with pytest.raises(PlanError, match="the training text of worker 'w-1' differs"):
        run_ranks(2, body)


def test_what_gradients_owe_is_dropped_under_another_plan_and_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, parallel={"gradient_codec": "error_feedback:quantized:4"})
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(CrashError):
        run_job(config, plan_of(config, 1, 2), run, crash_at=5)
    run_job(config, plan_of(config, 1, 2), run, is_resumed=True)
    assert "dropped what the gradient codec still owed" not in capsys.readouterr().err
    whole = losses(run)
    (run.path / "metrics" / "rank-0.jsonl").unlink()
    longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 8})})
    run_job(longer, plan_of(config, 1, 4), run, is_resumed=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "dropped" in line]
    assert said == [
        "dropped what the gradient codec still owed: the residual of weight:0 was saved for other buckets or replicas"
    ]
    assert len(whole) == 6
    assert len(losses(run)) == 2


def test_the_optimizer_is_the_run_files_and_gains_do_not_decay(tmp_path: Path) -> None:
    training = make_config(tmp_path, optimizer="quantized_adam", fix_variance_after=3).training
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2,))]
    optimizer = make_optimizer(training, parameters)
    assert isinstance(optimizer, QuantizedAdam)
    assert optimizer.warmup_steps == 3
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert isinstance(make_optimizer(make_config(tmp_path).training, parameters), torch.optim.AdamW)
