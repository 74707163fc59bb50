"""After a warm-up no kernel is compiled any more."""

import pytest
import torch

from wantrain_kernels import cpu_jit, dequantize, quantize, warm_up


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels whose machine code is asked for from now on."""
    names: list[str] = []
    make = cpu_jit._machine_code

    def noted(function, args):  # type: ignore[no-untyped-def]
        names.append(function.__name__)
        return make(function, args)

    monkeypatch.setattr(cpu_jit, "_machine_code", noted)
    return names


def test_what_was_warmed_up_is_ready_for_any_shape_and_dtype(compiled: list[str]) -> None:
    warm_up({"quantized", "aqsgd", "hadamard"})
    compiled.clear()
    x = torch.randn(3, 130, dtype=torch.float32).to(torch.bfloat16)
    dequantize(quantize(x, 3, 64, "stochastic", 5), x.shape, torch.float16, 3, 64)
    assert compiled == []


def test_codecs_without_kernels_need_none(compiled: list[str]) -> None:
    warm_up({"raw"})
    assert compiled == []
