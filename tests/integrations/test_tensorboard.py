"""TensorBoard's own reader finds in a real run's event files what the run directory says."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import make_trainer, replica_batch, run_ranks, small_plan
from tests.watched import Watched
from wantrain.comm.loopback import LoopbackJob
from wantrain.errors import ConfigError
from wantrain.integrations.tensorboard import TensorBoard
from wantrain.plan import Plan
from wantrain.run_directory import RunDirectory
from wantrain.training.metrics import RunFacts, RunLines

tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def curves(folder: Path) -> Any:
    """Return TensorBoard's own view of a folder of event files."""
    found = tensorboard.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return found


def test_the_losses_read_back_are_the_runs(watched: Watched) -> None:
    worker, other = Plan.load(watched.run.plan).workers
    found = curves(watched.run.path / "tensorboard" / worker)
    records = watched.run.read_steps(0)
    assert len(records) > 12
    loss = found.Scalars("loss")
    assert [point.step for point in loss] == [record.step for record in records]
    assert [point.value for point in loss] == pytest.approx([record.loss for record in records], rel=1e-6)
    held_out = [(point.step, point.value) for point in found.Scalars("held_out_loss")]
    assert held_out == [
        (record.step, pytest.approx(record.validation_loss, rel=1e-6)) for record in watched.run.read_validations()
    ]
    sent = [point.value for point in found.Scalars(f"sent_bytes/{other}")]
    assert sent == [record.sent[other].wire_bytes for record in records]
    assert any(b"stopped after step" in text.tensor_proto.string_val[0] for text in found.Tensors("notes/text_summary"))


def test_other_workers_show_their_own_links_and_not_the_jobs_loss(watched: Watched) -> None:
    worker, other = Plan.load(watched.run.plan).workers
    tags = curves(watched.run.path / "tensorboard" / other).Tags()["scalars"]
    assert f"sent_bytes/{worker}" in tags
    assert f"waited_s/{worker}" in tags
    assert "loss" not in tags


def test_research_code_gives_sinks_to_the_trainer(tmp_path: Path) -> None:
    plan = small_plan(2, 1)
    job = LoopbackJob(plan.world_size)

    def body(rank: int) -> list[float]:
        sinks = [RunLines(tmp_path / "run"), TensorBoard(tmp_path / "events")]
        trainer = make_trainer(plan, job.member(rank), rank, sinks=sinks)
        losses = [trainer.step(replica_batch(plan, 0, step)).loss for step in range(3)]
        trainer.close()
        return losses

    losses = run_ranks(2, body)[0]
    found = curves(tmp_path / "events" / plan.workers[0])
    assert [point.value for point in found.Scalars("loss")] == pytest.approx(losses, rel=1e-6)
    run = RunDirectory(tmp_path / "run")
    assert [record.loss for record in run.read_steps(1)] == losses
    assert run.read_steps(0)[0].tokens == 8 * 16
    assert Plan.load(run.plan) == plan


def test_without_a_folder_or_the_package_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="give it a folder"):
        TensorBoard().begin(RunFacts("run", 0, small_plan(1, 1)))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="can't write"):
        TensorBoard(tmp_path / "file").begin(RunFacts("run", 0, small_plan(1, 1)))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"needs the package tensorboard \(not installed\)"):
        TensorBoard()
