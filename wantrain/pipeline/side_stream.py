"""Encode and decode beside the computing: on a GPU, on a stream of their own; elsewhere there is nothing to do.

compute stream   F0 ─┬─ F1 ─┬─ F2            a box's thread waits for its own stream, never for this one
                     ▼      ▼
side stream          encode encode ─► pinned memory
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SideStream:
    """The stream of one box."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._stream = _new_stream(self._device) if self._device.type == "cuda" else None

    def mark(self) -> torch.cuda.Event | None:
        """Return a mark of what the calling thread has handed to its stream so far."""
        return torch.cuda.current_stream(self._device).record_event() if self._stream is not None else None

    @contextmanager
    def after(self, mark: torch.cuda.Event | None, *tensors: Tensor) -> Iterator[None]:
        """Work on the side stream once `mark` is reached; `tensors` are those of the marking stream that are read."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if mark is not None:
                self._stream.wait_event(mark)
            for tensor in tensors:
                tensor.record_stream(self._stream)
            yield

    def hand_over(self, tensor: Tensor, mark: torch.cuda.Event | None) -> Tensor:
        """Let the calling thread's stream wait for `mark`, and own a tensor that was made on the side stream."""
        if mark is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(mark)
            tensor.record_stream(stream)
        return tensor


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
