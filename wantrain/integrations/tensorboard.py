"""A run's figures as event files that TensorBoard shows.

    tensorboard --logdir runs/demo/tensorboard

Every worker writes into a folder of its own, so that TensorBoard's "runs" are workers: the job's figures (`loss`,
`held_out_loss`, `tokens_per_s`, …) are in rank 0's, and `sent_bytes/PEER`, `waited_s/PEER` and the like in each.
A resumed run hides what it does again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wantrain.errors import ConfigError
from wantrain.run_directory import StepRecord, ValidationRecord
from wantrain.training.metrics import RunFacts, job_figures, own_figures

_FLUSH_S = 10
"""Chosen: a picture that is this old is young enough, and a file system on a network is spared."""


class TensorBoard:
    """Writes event files, through torch's own writer and its thread."""

    def __init__(self, folder: str | Path | None = None) -> None:
        """Write below `folder` (default: `tensorboard` in the run directory)."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "TensorBoard needs the package tensorboard (not installed); run pip install 'wantrain[watch]'"
            ) from None
        self._open: Any = SummaryWriter
        self._folder = folder

    def begin(self, facts: RunFacts) -> None:
        """Open the worker's event file; raise ConfigError where there is no place for it."""
        folder = self._folder
        if folder is None and facts.folder is not None:
            folder = facts.folder / "tensorboard"
        if folder is None:
            raise ConfigError("TensorBoard has no place to write to; give it a folder")
        place = Path(folder) / facts.worker
        try:
            self._writer = self._open(str(place), purge_step=facts.first_step or None, flush_secs=_FLUSH_S)
        except OSError as caught:
            raise ConfigError(f"can't write {place} ({caught.strerror}); choose another folder") from None
        self._is_first, self._step = facts.is_first, facts.first_step

    def step(self, record: StepRecord) -> None:
        """Add a point to every curve."""
        self._step = record.step
        figures = own_figures(record) | (job_figures(record) if self._is_first else {})
        for name, value in figures.items():
            self._writer.add_scalar(name, value, record.step, walltime=record.finished_at)

    def validation(self, record: ValidationRecord) -> None:
        """Add a point to the held-out loss."""
        if self._is_first:
            self._writer.add_scalar("held_out_loss", record.validation_loss, record.step)

    def note(self, text: str) -> None:
        """Add a text, where TensorBoard shows texts."""
        self._writer.add_text("notes", text, self._step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
