"""`wt.Trainer` inside Ray Train's TorchTrainer: Ray starts the processes, keeps reports and checkpoints, and restarts.

    def train_loop(config):                                  in each of plan.world_size processes
        trainer = ray_train.make_trainer(layers, plan, loss=…, optimizer=…)
        for step in range(ray_train.resume(trainer), config["steps"]):
            result = trainer.step(batch)
            ray_train.report(trainer, {"loss": result.loss}, with_checkpoint=(step + 1) % 10 == 0)
        trainer.close()

A checkpoint is wantrain's own, keyed by layer: each process hands in what it holds, Ray Train joins the parts in its
storage, and any plan goes on from the whole. Message buffers (codec aqsgd) are not in it: samples are sent in full once
more.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch._C._distributed_c10d import PrefixStore

from wantrain.comm.groups import TorchMembership, join_process_group
from wantrain.errors import PlanError
from wantrain.pipeline.stage import LossFunction
from wantrain.plan import Plan
from wantrain.training.checkpoint import CheckpointFolder, Manifest, read_manifest, write_file
from wantrain.training.residuals import load_residuals, save_residuals
from wantrain.training.trainer import LayerFactory, Trainer

_TIMEOUT_S = 120.0


def make_trainer(
    layers: Sequence[nn.Module] | LayerFactory,
    plan: Plan,
    *,
    loss: LossFunction,
    timeout_s: float = _TIMEOUT_S,
    **options: Any,
) -> Trainer:
    """Return this process's trainer; every process of the TorchTrainer calls it, as many as the plan has workers.

    Processes are the workers after whom their nodes are called, or whose names their nodes have as a label's value or
    as a custom resource. Where no node is a worker of the plan they are its workers in Ray's order. `options` are
    Trainer's own.
    Raise PlanError where the processes are not the plan's workers.
    """
    first = join_process_group(None, timeout_s)
    everyone: list[list[str]] = first.gather(_own_names(), timeout_s)
    rank = assign(plan, everyone)[first.rank]
    first.leave(timeout_s)
    store = PrefixStore("in-plan", first.store)
    membership = TorchMembership(store, rank, plan.world_size, first.address, timeout_s, plan.workers)
    worker = plan.workers[rank]
    return Trainer(layers, plan, loss=loss, worker=worker, timeout_s=timeout_s, membership=membership, **options)


def assign(plan: Plan, names: Sequence[Sequence[str]]) -> list[int]:
    """Return each process's rank in the plan, by what its node is called; raise PlanError where they don't fit."""
    if len(names) != plan.world_size:
        raise PlanError(f"the plan is for {plan.world_size} processes (got {len(names)}); set num_workers to that")
    found = [next((worker for worker in own if worker in plan.workers), None) for own in names]
    if not any(found):
        return list(range(plan.world_size))
    workers = [worker for worker in found if worker is not None]
    missing = sorted(set(plan.workers) - set(workers))
    if missing:
        raise PlanError(
            f"no process is on the node of worker {', '.join(missing)}; let Ray start one on each node of the plan"
            ' (placement_strategy="STRICT_SPREAD")'
        )
    return [plan.rank_of(worker) for worker in workers]


def _own_names() -> list[str]:
    """Return what this process's node is called: its labels, the custom resources that it has, its name."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    list_nodes: Any = ray.nodes  # Ray gives it no types
    node = next(one for one in list_nodes() if one["NodeID"] == own)
    return [*node.get("Labels", {}).values(), *node.get("Resources", {}), node["NodeName"]]


def report(trainer: Trainer, metrics: Mapping[str, Any], *, with_checkpoint: bool = False) -> None:
    """Report to Ray Train, with a checkpoint of the steps so far if asked; every process calls it alike.

    It returns when all have called it: without a checkpoint it costs Ray's own barrier. Ray keeps what its first
    process reports; a step's loss and norm are the same on all.
    """
    import ray.train

    if not with_checkpoint:
        ray.train.report(dict(metrics))
        return
    with tempfile.TemporaryDirectory() as folder:
        written = _write(trainer, CheckpointFolder(folder))
        ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(str(written)))


def _write(trainer: Trainer, folder: CheckpointFolder) -> Path:
    """Write what this process has to hand in; rank 0 adds the manifest, for which all say what they wrote."""
    step, group = trainer.step_number, trainer.plan.data_group(trainer.stage_index)
    sums = folder.write_layers(step, trainer.layers if trainer.rank == min(group) else {}, trainer.optimizer)
    sums |= save_residuals(folder, step, trainer.layers, trainer.buckets, trainer.replica)
    everyone: list[dict[str, str]] = trainer.gather(sums)
    if trainer.rank == 0:
        files = {name: digest for one in everyone for name, digest in one.items()}
        manifest = Manifest(step=step, num_layers=trainer.plan.num_layers, seed=0, model={}, tokenizer="", files=files)
        write_file(folder.begin(step) / "manifest.json", manifest.model_dump_json(indent=1).encode())
    return folder.begin(step)


def resume(trainer: Trainer) -> int:
    """Load Ray Train's newest checkpoint, if there is one; return the number of steps that are done."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as path:
        return _load(trainer, Path(path))


def _load(trainer: Trainer, path: Path) -> int:
    with tempfile.TemporaryDirectory() as above:
        folder = CheckpointFolder(above)
        step = read_manifest(path).step
        folder.path_of(step).symlink_to(path.resolve(), target_is_directory=True)
        folder.load_layers(step, trainer.layers, trainer.optimizer)
        problem = load_residuals(folder, step, trainer.layers, trainer.buckets, trainer.replica)
    problems = [one for one in trainer.gather(problem) if one]
    if problems:
        if trainer.rank == 0:
            print(f"dropped what the gradient codec still owed: {problems[0]}", file=sys.stderr, flush=True)
        for buckets in trainer.buckets:
            buckets.drop_residuals()
    trainer.step_number = step
    return step
