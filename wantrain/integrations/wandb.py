"""A run's figures at Weights & Biases, or in a folder for `wandb sync` to send there later.

W&B counts a process as a run. By default only rank 0 is one: it has the job's figures and its own links. With
`all_ranks` every worker is one, in a group with the run directory's name.

A resumed run goes on in the same W&B run: its id is kept in the run directory. Steps are a figure like any other
(`step`), on which all curves are drawn, so that steps done again overwrite nothing and are refused nowhere.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from wantrain.errors import ConfigError
from wantrain.fact import read_text, write_text
from wantrain.run_directory import StepRecord, ValidationRecord
from wantrain.training.metrics import RunFacts, job_figures, own_figures

_INIT_WITHIN_S = 90
_FINISH_WITHIN_S = 15
"""Chosen: a server that is gone must hold up neither the beginning for long nor the end; what is left lies on disk."""


class WeightsAndBiases:
    """Tells W&B's own process, which does the sending."""

    def __init__(
        self, project: str = "wantrain", entity: str | None = None, mode: str = "online", all_ranks: bool = False
    ) -> None:
        """Log to a project; `mode` is "online" or "offline"."""
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "Weights & Biases needs the package wandb (not installed); run pip install 'wantrain[watch]'"
            ) from None
        self._wandb: Any = wandb
        self._project, self._entity, self._mode, self._all_ranks = project, entity, mode, all_ranks
        self._run: Any = None

    def begin(self, facts: RunFacts) -> None:
        """Begin a W&B run; raise ConfigError where W&B refuses it or can't be reached."""
        if not (facts.is_first or self._all_ranks):
            return
        self._is_first = facts.is_first
        folder = facts.folder or Path()
        quiet = {"silent": True, "console": "off", "init_timeout": _INIT_WITHIN_S, "finish_timeout": _FINISH_WITHIN_S}
        try:
            self._run = self._wandb.init(
                project=self._project,
                entity=self._entity,
                mode=self._mode,
                dir=str(folder),
                id=_id(folder, facts.rank),
                name=f"{facts.name}/{facts.worker}" if self._all_ranks else facts.name,
                group=facts.name if self._all_ranks else None,
                config={**facts.config, "plan": facts.plan.model_dump(mode="json"), "worker": facts.worker},
                resume="allow" if self._mode == "online" else None,
                settings=self._wandb.Settings(**quiet),
            )
            self._run.define_metric("*", step_metric="step")
        except (self._wandb.Error, OSError) as caught:
            reason = " ".join(str(caught).split())
            raise ConfigError(f'can\'t begin a run at W&B ({reason}); log in, or set mode = "offline"') from None

    def step(self, record: StepRecord) -> None:
        """Log a step's figures."""
        if self._run is not None:
            figures = own_figures(record) | (job_figures(record) if self._is_first else {})
            self._run.log({"step": record.step, **figures})

    def validation(self, record: ValidationRecord) -> None:
        """Log the held-out loss."""
        if self._run is not None and self._is_first:
            self._run.log({"step": record.step, "held_out_loss": record.validation_loss})

    def note(self, text: str) -> None:
        """Keep the newest note beside the run."""
        if self._run is not None:
            self._run.summary["note"] = text

    def close(self) -> None:
        """Have W&B send what is left; its process ends with ours, since others may use it too."""
        if self._run is not None:
            self._run.finish()


def _id(folder: Path, rank: int) -> str:
    """Return the id of a rank's W&B run: the one of the run that is resumed, or a new one, kept for later."""
    path = folder / "wandb" / f"rank-{rank}.id"
    if path.exists():
        return read_text(path, ConfigError).strip()
    name = secrets.token_hex(4)
    write_text(path, name + "\n")
    return name
