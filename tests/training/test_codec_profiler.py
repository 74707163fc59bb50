from __future__ import annotations

import threading

import pytest
import torch

from wantrain.training import codec_profiler
from wantrain.training.codec_profiler import measure_codecs


def test_all_four_speeds_are_measured_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_profiler, "_SHAPE", (1, 64, 256))
    before = threading.active_count()
    speed = measure_codecs(torch.device("cpu"))
    assert all(1e5 < one < 1e12 for one in speed.model_dump().values())
    assert len(speed.model_dump()) == 4
    assert threading.active_count() == before
