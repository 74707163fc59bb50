import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from wantrain.errors import CheckpointError
from wantrain.training import checkpoint
from wantrain.training.checkpoint import CheckpointFolder, Manifest, export, find, layer_state, load_layer_state


def trained_layer(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return layer, optimizer


def write(folder: CheckpointFolder, step: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    layer, optimizer = trained_layer()
    files = folder.write_layers(step, {0: layer}, optimizer)
    folder.finish(Manifest(step=step, num_layers=1, seed=0, model={}, tokenizer="bytes", files=files))
    return layer, optimizer


def test_weights_and_optimizer_state_come_back_bit_for_bit(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    layer, optimizer = write(folder, 5)
    other, fresh = trained_layer(seed=1)
    manifest = folder.load_layers(5, {0: other}, fresh)
    assert manifest.step == 5
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, fresh.state[b][key]), key


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2, 3, 10):
        write(folder, step)
    assert folder.steps() == [10, 3]


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = CheckpointFolder(tmp_path)
    write(folder, 1)
    monkeypatch.setattr(checkpoint.os, "fsync", full)
    layer, optimizer = trained_layer()
    with pytest.raises(CheckpointError, match=r"No space left on device\); free some space"):
        folder.write_layers(2, {0: layer}, optimizer)
    assert list((tmp_path / "step-00000002.partial").iterdir()) == []
    folder.abandon(2)
    assert folder.steps() == [1]


def test_state_of_another_shape_is_refused_by_name() -> None:
    layer, optimizer = trained_layer()
    state = layer_state(layer, optimizer)
    with pytest.raises(CheckpointError, match="here does not fit the model"):
        load_layer_state(nn.Linear(4, 2), None, state, "here")


def test_a_layer_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    write(folder, 1)
    assert "has no layer 7" in folder.problem(1, [7])
    assert folder.problem(1, [0]) == ""


def test_find_takes_a_run_a_folder_of_checkpoints_or_one_of_them(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    write(folder, 1)
    write(folder, 2)
    newest = tmp_path / "checkpoints" / "step-00000002"
    assert find(tmp_path) == find(tmp_path / "checkpoints") == find(newest) == newest
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        find(tmp_path / "elsewhere")


def test_the_whole_model_is_exported_as_one_file(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    layer, _ = write(folder, 1)
    export(tmp_path / "step-00000001", tmp_path / "model.safetensors")
    tensors: dict[str, Any] = load_file(tmp_path / "model.safetensors")
    assert set(tensors) == {"layers.0.weight", "layers.0.bias"}
    assert torch.equal(tensors["layers.0.weight"], layer.state_dict()["weight"])
