"""What is owed outlives the process."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.jobs import MODEL, change, make_trainer, named, run_ranks, small_plan, train_rank
from wantrain.comm.loopback import LoopbackJob
from wantrain.plan import Plan
from wantrain.training.checkpoint import CheckpointFolder, Manifest
from wantrain.training.quantized_adam import QuantizedAdam
from wantrain.training.residuals import load_residuals, residual_file, save_residuals
from wantrain.training.trainer import Trainer

TIED = MODEL.model_copy(update={"tied": True})
Body = Callable[[Trainer], object]


def on_all(plan: Plan, body: Body, **kwargs: object) -> list[object]:
    """Run `body` with the trainer of every rank."""
    job = LoopbackJob(plan.world_size)

    def of_rank(rank: int) -> object:
        trainer = make_trainer(plan, job.member(rank), rank, model=TIED, **kwargs)  # type: ignore[arg-type]
        result = body(trainer)
        trainer.close()
        return result

    torch.set_num_threads(1)
    return run_ranks(plan.world_size, of_rank)


def save(trainer: Trainer, folder: CheckpointFolder) -> None:
    """Write a checkpoint of all ranks, as the training loop does."""
    own = trainer.layers if trainer.replica == 0 else {}
    sums = folder.write_layers(trainer.step_number, own, trainer.optimizer)
    sums |= save_residuals(folder, trainer.step_number, trainer.layers, trainer.buckets, trainer.replica)
    files = {name: digest for one in trainer.gather(sums) for name, digest in one.items()}
    if trainer.rank == 0:
        manifest = Manifest(
            step=trainer.step_number, num_layers=6, seed=0, model={}, tokenizer="bytes", files=files
        )  # fmt: skip
        folder.finish(manifest)
    trainer.gather("saved")


def load(trainer: Trainer, folder: CheckpointFolder, step: int) -> str:
    folder.load_layers(step, trainer.layers, trainer.optimizer)
    trainer.step_number = step
    return load_residuals(folder, step, trainer.layers, trainer.buckets, trainer.replica)


def owed(trainer: Trainer) -> float:
    """Return the sum of all magnitudes that a rank owes."""
    kept = [view for buckets in trainer.buckets for places in buckets.residuals().values() for view, _ in places]
    return sum(view.abs().sum().item() for view in kept)


CODECS = ["error_feedback:quantized:4", "error_feedback:quantized:2,rounding=stochastic", "error_feedback:cocktail:4"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "adam", [None, partial(QuantizedAdam, lr=1e-2, warmup_steps=2)], ids=["adamw", "quantized_adam"]
)
def test_a_job_that_goes_on_has_the_very_losses_and_weights(tmp_path: Path, codec: str, adam: object) -> None:
    plan, folder = small_plan(2, 2, model=TIED, gradient_codec=codec), CheckpointFolder(tmp_path)
    kwargs = {} if adam is None else {"optimizer": adam}

    def whole(trainer: Trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
        train_rank(trainer, 4)
        save(trainer, folder)
        return train_rank(trainer, 3, first_step=4).losses, named(trainer, lambda p: p)

    def resumed(trainer: Trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
        assert load(trainer, folder, 4) == ""
        assert owed(trainer) > 0
        return train_rank(trainer, 3, first_step=4).losses, named(trainer, lambda p: p)

    for (losses, weights), (others, other_weights) in zip(  # type: ignore[misc]
        on_all(plan, whole, **kwargs), on_all(plan, resumed, **kwargs), strict=True
    ):
        assert losses == others
        assert all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Plan, CheckpointFolder]:
    """Save a job of two stages and two replicas after two steps."""
    plan, folder = small_plan(2, 2, model=TIED, gradient_codec=CODECS[0]), CheckpointFolder(tmp_path)
    on_all(plan, lambda trainer: (train_rank(trainer, 2), save(trainer, folder)))
    return plan, folder


def test_every_replica_has_a_file_of_each_layer(saved: tuple[Plan, CheckpointFolder]) -> None:
    _, folder = saved
    names = {path.name for path in folder.path_of(2).glob("*residual*")}
    assert names == {residual_file(layer, replica) for layer in range(6) for replica in range(2)}
    assert names <= set(folder.manifest(2).files)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"bucket_bytes": 100_000}, "was saved for other buckets or replicas"),
        ({"gradient_codec": "error_feedback:cocktail:4"}, "was saved for other buckets or replicas"),
        ({"gradient_codec": "quantized:4"}, ""),
        ({}, ""),
    ],
)
def test_what_means_something_else_here_is_not_taken(
    saved: tuple[Plan, CheckpointFolder], changes: dict[str, object], problem: str
) -> None:
    plan, folder = saved
    problems = on_all(change(plan, **changes), lambda trainer: load(trainer, folder, 2))
    assert all(problem in str(one) and bool(one) == bool(problem) for one in problems)


@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_a_file_that_is_damaged_or_gone_is_named(saved: tuple[Plan, CheckpointFolder], damage: str) -> None:
    plan, folder = saved
    file = folder.path_of(2) / residual_file(1, 1)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink() if damage == "gone" else file.write_bytes(data)
    problems: Sequence[object] = on_all(plan, lambda trainer: load(trainer, folder, 2))
    assert [bool(one) for one in problems] == [False, False, True, False]
    assert file.name in str(problems[2])


def test_to_drop_is_to_owe_nothing() -> None:
    def body(trainer: Trainer) -> tuple[float, float]:
        train_rank(trainer, 1)
        before = owed(trainer)
        for buckets in trainer.buckets:
            buckets.drop_residuals()
        return before, owed(trainer)

    for before, after in on_all(small_plan(2, 2, model=TIED, gradient_codec=CODECS[0]), body):  # type: ignore[misc]
        assert before > 0 == after
