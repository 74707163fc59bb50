"""Which backend computes: by device, or by name; what is asked for and is not there is refused."""

import pytest
import torch

from wantrain_kernels import backends, cpu_ops, reference

CPU = torch.device("cpu")


def test_the_fastest_on_the_cpu_is_the_compiled_one() -> None:
    assert backends.choose("auto", CPU) is cpu_ops


def test_a_backend_can_be_had_by_name() -> None:
    assert backends.choose("reference", CPU) is reference


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no backend 'fast' \(expected auto, reference, cpu, triton, cuda"):
        backends.choose("fast", CPU)


def test_a_device_that_a_backend_cannot_use_is_refused() -> None:
    with pytest.raises(RuntimeError, match="backend 'cpu' can't work on device 'cuda'"):
        backends.choose("cpu", torch.device("cuda"))


def test_triton_on_the_cpu_is_only_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "is_available", lambda name: True)
    with pytest.raises(RuntimeError, match="backend 'triton' can't work on device 'cpu'"):
        backends.choose("triton", CPU)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "is_available", lambda name: name == "reference")
    with pytest.raises(RuntimeError, match="backend 'cpu' needs numba, which is not installed"):
        backends.choose("cpu", CPU)
    assert backends.choose("auto", CPU) is reference
