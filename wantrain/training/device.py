"""The device that a worker computes on, tried before anything is built on it."""

from __future__ import annotations

import torch

from wantrain.errors import ConfigError


def open_device(name: str, who: str, remedy: str) -> torch.device:
    """Return a device by name; raise ConfigError, of `who` and with the `remedy`, where this machine hasn't got it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as caught:
        reason = str(caught).splitlines()[0].split(". ")[0]
        raise ConfigError(f"{who} can't use device '{name}' ({reason}); {remedy}") from None
    return device
