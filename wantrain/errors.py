"""Every error that wantrain raises on purpose.

    WantrainError
    ├── UserError            the input is at fault: one line, exit status 2
    │   ├── ConfigError      a run file, a flag, a value
    │   ├── TopologyError    a topology file
    │   ├── PlanError        a plan that can't be, or doesn't fit the job
    │   ├── DataError        the training text
    │   ├── CheckpointError  a checkpoint that can't be read or written
    │   └── EmulationError   what this machine can't emulate
    └── RunError             something failed while running: one line, exit status 1
        ├── ChannelError     a peer that is gone, late or damaged
        └── CodecError       numbers that a codec can't encode

A message is one lower-case line: *what is wrong (got X, expected Y); what to do*.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WantrainError(Exception):
    """Base of every error that wantrain raises on purpose."""

    exit_status = 1


class UserError(WantrainError):
    """The user's input is at fault; nothing was started."""

    exit_status = 2


class ConfigError(UserError):
    """A run file, a flag or a value."""


class TopologyError(UserError):
    """A topology file, or a question it has no answer to."""


class PlanError(UserError):
    """A plan that can't be made, or that doesn't fit the job."""


class DataError(UserError):
    """Training text that is missing, empty or too short."""


class CheckpointError(UserError):
    """A checkpoint that can't be read or written."""


class EmulationError(UserError):
    """A network that this machine can't emulate."""


class RunError(WantrainError):
    """Something failed while the job ran."""


class ChannelError(RunError):
    """A peer that is gone, late, or whose payload arrived damaged."""


class CodecError(RunError):
    """Numbers that a codec can't encode."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ' (did you mean 'x'?)' for the nearest known word, or an empty string."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""
