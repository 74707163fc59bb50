"""A run's checkpoints: all ranks write one together, and find together the newest that all can go on from.

Beside the layers (`checkpoint.py`) they hold what else decides the numbers of the steps to come: what gradient codecs
still owe (`residuals.py`), message buffers (`buffers.py`), and the bits that guards have asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import xxhash

from wantrain.codecs.message_buffer import MessageBuffer
from wantrain.config import RunConfig
from wantrain.errors import CheckpointError
from wantrain.plan import Plan
from wantrain.run_directory import RunDirectory
from wantrain.training.buffers import keep_claims, load_buffers, save_buffers
from wantrain.training.checkpoint import CheckpointFolder, Manifest, ranks_on_disk
from wantrain.training.metrics import announce
from wantrain.training.residuals import load_residuals, save_residuals
from wantrain.training.trainer import Trainer


class RunCheckpoints:
    """One rank's part; every rank calls the same methods in the same order."""

    def __init__(self, trainer: Trainer, config: RunConfig, run_directory: RunDirectory) -> None:
        """Find out which ranks see the same run directory."""
        self._trainer, self._config, self._run_directory = trainer, config, run_directory
        self._folder = CheckpointFolder(run_directory.checkpoints, config.checkpoint.keep)
        self._disk: Sequence[int] = ranks_on_disk(run_directory.path, trainer.rank, trainer.gather)

    def save(self, step: int) -> None:
        """Write a checkpoint: every layer once per disk, the manifest last."""
        trainer = self._trainer
        everyone: list[dict[str, Any]] = trainer.gather(self._write(step))
        problems = [one["error"] for one in everyone if one["error"]]
        if problems:
            self._folder.abandon(step)
            raise CheckpointError(problems[0])
        if trainer.rank == min(self._disk):
            self._folder.finish(self._manifest(step, everyone))
        trainer.gather("saved")
        keep_claims(self._kept_buffers(), self._folder)

    def _write(self, step: int) -> dict[str, Any]:
        """Write this rank's files; return their checksums and the bits it wants, or what went wrong."""
        trainer, folder = self._trainer, self._folder
        holders = set(trainer.plan.data_group(trainer.stage_index)) & set(self._disk)
        own = trainer.layers if trainer.rank == min(holders) else {}
        try:
            sums = folder.write_layers(step, own, trainer.optimizer)
            sums |= save_residuals(folder, step, trainer.layers, trainer.buckets, trainer.replica)
            sums |= save_buffers(self._kept_buffers(), folder.begin(step), step, _digest(trainer.plan))
        except CheckpointError as caught:
            return {"error": str(caught)}
        return {"files": sums, "bits": trainer.connections.codecs.wanted_bits(), "error": ""}

    def _manifest(self, step: int, everyone: Sequence[dict[str, Any]]) -> Manifest:
        config = self._config
        return Manifest(
            step=step,
            num_layers=config.model.num_layers_total,
            seed=config.training.seed,
            model=config.model.model_dump(mode="json"),
            tokenizer=config.data.tokenizer,
            files={name: digest for one in everyone for name, digest in one["files"].items()},
            bits={name: bits for one in everyone for name, bits in one["bits"].items()},
        )

    def resume(self) -> int:
        """Load the newest checkpoint that is whole on every rank, drop later ones; return its step, 0 without any.

        Raise CheckpointError where there are some and none can be used: starting anew would overwrite them.
        """
        step = self._newest()
        if step is None:
            self._announce("no checkpoint yet; starting from step 0")
            step = 0
        else:
            self._load(step)
        if self._trainer.rank == min(self._disk):
            self._folder.drop_after(step)
        return step

    def _newest(self) -> int | None:
        folder, problem = self._folder, ""
        own = {str(step): folder.problem(step, self._trainer.layers) for step in folder.steps()}
        everyone: list[dict[str, str]] = self._trainer.gather(own)
        for step in sorted({int(name) for found in everyone for name in found}, reverse=True):
            problems = [found.get(str(step), f"step {step} is missing on a worker's disk") for found in everyone]
            problem = next((one for one in problems if one), "")
            if not problem:
                return step
            self._announce(f"passed over the checkpoint of step {step}: {problem}")
        if problem:
            raise CheckpointError(f"no checkpoint in {folder.path} can be used ({problem}); start a new run directory")
        return None

    def _load(self, step: int) -> None:
        trainer, manifest = self._trainer, self._folder.manifest(step)
        _check_manifest(manifest, self._config)
        self._folder.load_layers(step, trainer.layers, trainer.optimizer)
        trainer.step_number = step
        trainer.connections.codecs.want_bits(manifest.bits)
        self._announce(f"resumed from step {step}")
        self._load_residuals(step)
        self._load_buffers(step)

    def _load_residuals(self, step: int) -> None:
        """Load what the gradients' codec still owes; where one rank can't, all forget it, so replicas stay equal."""
        trainer = self._trainer
        problem = load_residuals(self._folder, step, trainer.layers, trainer.buckets, trainer.replica)
        problems = [one for one in trainer.gather(problem) if one]
        if problems:
            for buckets in trainer.buckets:
                buckets.drop_residuals()
            self._announce(f"dropped what the gradient codec still owed: {problems[0]}")

    def _load_buffers(self, step: int) -> None:
        """Fill this rank's message buffers, and tell the user what is missing of anyone's."""
        plan, num_lanes = self._trainer.plan, self._config.training.num_lanes
        lanes = set(plan.replicas[self._trainer.replica].lanes)
        lines = load_buffers(
            self._kept_buffers(),
            self._folder,
            step,
            _digest(plan),
            self._run_directory.buffers,
            lambda sample: sample % num_lanes in lanes,
        )
        everyone: list[list[str]] = self._trainer.gather(lines)
        for line in (line for own in everyone for line in own):
            self._announce(line)

    def _kept_buffers(self) -> Sequence[MessageBuffer]:
        """Return the message buffers that belong into checkpoints."""
        return self._trainer.connections.codecs.buffers if self._config.buffers.on_checkpoint == "keep" else ()

    def _announce(self, text: str) -> None:
        announce(self._run_directory, self._trainer.rank, text)


def _digest(plan: Plan) -> str:
    return xxhash.xxh3_64_hexdigest(plan.model_dump_json(exclude={"prediction"}).encode())


def _check_manifest(manifest: Manifest, config: RunConfig) -> None:
    """Raise CheckpointError where a checkpoint was made with another model, text or seed."""
    for what, kept, asked in (
        ("model", manifest.model, config.model.model_dump(mode="json")),
        ("tokenizer", manifest.tokenizer, config.data.tokenizer),
        ("seed", manifest.seed, config.training.seed),
    ):
        if kept != asked:
            raise CheckpointError(
                f"the checkpoint has another {what} (got {kept}, the run file has {asked}); use its own"
            )
