"""Checkpoints keyed by layer, so that one written under any plan loads under any other.

    checkpoints/step-00000100/
        layer-0000.safetensors     weights and optimizer state of one layer
        layer-0001.safetensors
        buffer-0001-sender-0.json  what a message buffer holds, and where (training/buffers.py)
        manifest.json              step, model, checksum of every file; written last

Writing is atomic: every file is written aside, flushed to disk and renamed inside `step-….partial`; when all ranks are
done, the manifest follows and the folder gets its name. So a folder with the plain name is whole, unless the disk lied,
which the checksums find. The last `keep` are kept.

Every layer is written by the lowest rank that holds it among those that see the same run directory. On machines with
disks of their own each therefore writes what it holds, and reads it back under the same plan; another plan needs the
missing layers copied first, and says which.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import Field
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from wantrain.errors import CheckpointError
from wantrain.fact import Fact, read_json
from wantrain.run_directory import saved_steps

VERSION = 1

_WEIGHT, _OPTIMIZER = "weight:", "optimizer:"


class Manifest(Fact):
    """What a checkpoint holds: `files` maps names to xxh3 checksums, `model` and `tokenizer` rebuild it.

    `bits` is what guards had asked for, by "layer/way/replica".
    """

    version: int = VERSION
    step: int
    num_layers: int
    seed: int
    model: dict[str, Any]
    tokenizer: str
    files: dict[str, str]
    bits: dict[str, int] = Field(default_factory=dict)


def layer_file(layer: int) -> str:
    return f"layer-{layer:04d}.safetensors"


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def layer_state(layer: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Collect a layer's weights and what the optimizer keeps for them, by name; what isn't trained is left out."""
    frozen = _frozen(layer)
    kept = {name: tensor for name, tensor in layer.state_dict().items() if name not in frozen}
    state = {f"{_WEIGHT}{name}": tensor.detach() for name, tensor in kept.items()}
    if optimizer is not None:
        for name, parameter in layer.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                state[f"{_OPTIMIZER}{name}:{key}"] = torch.as_tensor(value).detach()
    return {name: tensor.cpu().contiguous().clone() for name, tensor in state.items()}


def _frozen(layer: nn.Module) -> set[str]:
    """Return the names of weights that stay as they were built."""
    return {name for name, parameter in layer.named_parameters() if not parameter.requires_grad}


def weights_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights in what was read of a layer, by their names in the layer."""
    return {name.removeprefix(_WEIGHT): tensor for name, tensor in state.items() if name.startswith(_WEIGHT)}


def load_layer_state(
    layer: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Tensor], source: str
) -> None:
    """Put a layer's weights and optimizer state back; raise CheckpointError where names or shapes differ."""
    frozen = _frozen(layer)
    unchanged = {name: tensor for name, tensor in layer.state_dict().items() if name in frozen}
    try:
        layer.load_state_dict(unchanged | weights_of(state))
    except RuntimeError as caught:
        first = str(caught).splitlines()[-1].strip()
        raise CheckpointError(f"{source} does not fit the model ({first}); use the run file it was made with") from None
    if optimizer is None:
        return
    for name, parameter in layer.named_parameters():
        prefix = f"{_OPTIMIZER}{name}:"
        kept = {
            key.removeprefix(prefix): tensor.clone() if tensor.dim() == 0 else tensor.to(parameter.device, copy=True)
            for key, tensor in state.items()
            if key.startswith(prefix)
        }
        if kept:
            optimizer.state[parameter] = kept


def write_file(path: Path, data: bytes) -> str:
    """Write aside, flush to disk, rename; return the checksum. A full disk is a CheckpointError, and leaves nothing."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as caught:
        aside.unlink(missing_ok=True)
        remedy = "free some space" if caught.errno == errno.ENOSPC else "check the folder"
        raise CheckpointError(f"can't write {path} ({caught.strerror}); {remedy}") from None
    return _digest(data)


def ranks_on_disk(folder: Path, rank: int, gather: Callable[[object], list[Any]]) -> list[int]:
    """Return the ranks that see the same `folder` as this one, itself among them: each leaves a mark, all look."""
    token = gather(secrets.token_hex(8))[0]
    marks = folder / f".marks-{token}"
    try:
        marks.mkdir(parents=True, exist_ok=True)
        (marks / str(rank)).touch()
    except OSError as caught:
        raise CheckpointError(f"can't write to {folder} ({caught.strerror}); check the folder") from None
    gather("marked")
    seen = sorted(int(mark.name) for mark in marks.iterdir())
    gather("looked")
    if rank == min(seen):
        shutil.rmtree(marks, ignore_errors=True)
    return seen


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, path: str | Path, keep: int = 3) -> None:
        self.path = Path(path)
        self._keep = keep

    def _final(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def _partial(self, step: int) -> Path:
        return self.path / f"step-{step:08d}.partial"

    def path_of(self, step: int) -> Path:
        """Return the folder of a finished checkpoint."""
        return self._final(step)

    def steps(self) -> list[int]:
        """Return the steps of finished checkpoints, newest first."""
        return saved_steps(self.path)

    def begin(self, step: int) -> Path:
        """Return the folder in which a checkpoint's files are written until it is finished; make it if need be."""
        folder = self._partial(step)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as caught:
            raise CheckpointError(f"can't make {folder} ({caught.strerror}); check the folder") from None
        return folder

    def write_layers(
        self, step: int, layers: Mapping[int, nn.Module], optimizer: torch.optim.Optimizer | None
    ) -> dict[str, str]:
        """Write some layers of a checkpoint that is not finished yet; return their files' checksums."""
        folder = self.begin(step)
        sums = {}
        for index, layer in layers.items():
            sums[layer_file(index)] = write_file(
                folder / layer_file(index), save_tensors(layer_state(layer, optimizer))
            )
        return sums

    def finish(self, manifest: Manifest) -> Path:
        """Write the manifest of a checkpoint whose layers are all written, give it its name, drop old ones."""
        partial, final = self._partial(manifest.step), self._final(manifest.step)
        write_file(partial / "manifest.json", manifest.model_dump_json(indent=1).encode())
        try:
            if final.exists():
                shutil.rmtree(final)
            os.replace(partial, final)
            _flush_folder(self.path)
        except OSError as caught:
            raise CheckpointError(f"can't finish {final} ({caught.strerror}); check the folder") from None
        for step in self.steps()[self._keep :]:
            shutil.rmtree(self._final(step), ignore_errors=True)
        return final

    def drop_after(self, step: int) -> None:
        """Remove what a run that goes on from `step` will write again: later checkpoints, and unfinished ones."""
        for later in (one for one in self.steps() if one > step):
            shutil.rmtree(self._final(later), ignore_errors=True)
        for partial in self.path.glob("step-*.partial"):
            shutil.rmtree(partial, ignore_errors=True)

    def abandon(self, step: int) -> None:
        """Remove what was written of an unfinished checkpoint."""
        shutil.rmtree(self._partial(step), ignore_errors=True)

    def manifest(self, step: int) -> Manifest:
        """Read a checkpoint's manifest."""
        return read_manifest(self._final(step))

    def problem(self, step: int, layers: Iterable[int]) -> str:
        """Say what is wrong with these layers of a checkpoint; empty if nothing is."""
        try:
            manifest = self.manifest(step)
            for index in layers:
                read_layer(self._final(step), manifest, index)
        except CheckpointError as caught:
            return str(caught)
        return ""

    def load_layers(
        self, step: int, layers: Mapping[int, nn.Module], optimizer: torch.optim.Optimizer | None
    ) -> Manifest:
        """Load some layers and their optimizer state from a finished checkpoint."""
        manifest, folder = self.manifest(step), self._final(step)
        for index, layer in layers.items():
            load_layer_state(layer, optimizer, read_layer(folder, manifest, index), str(folder / layer_file(index)))
        return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint folder."""
    path = folder / "manifest.json"
    return Manifest.parse(read_json(path, CheckpointError), CheckpointError, str(path))


def read_layer(folder: Path, manifest: Manifest, index: int) -> dict[str, Tensor]:
    """Read one layer's file and hold it against its checksum."""
    if layer_file(index) not in manifest.files:
        raise CheckpointError(f"{folder} has no layer {index} (it has {manifest.num_layers}); check the model")
    return load_tensors(read_file(folder, manifest, layer_file(index)))


def read_file(folder: Path, manifest: Manifest, name: str) -> bytes:
    """Read a checkpoint's file and hold it against its checksum."""
    path = folder / name
    try:
        data = path.read_bytes()
    except OSError as caught:
        raise CheckpointError(f"can't read {path} ({caught.strerror}); copy it from the worker that wrote it") from None
    if _digest(data) != manifest.files.get(name):
        raise CheckpointError(f"{path} is damaged (its checksum differs); remove the checkpoint")
    return data


def load_whole(folder: str | Path, layers: Sequence[nn.Module]) -> Manifest:
    """Load every layer's weights of one checkpoint folder into one process."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    for index, layer in enumerate(layers):
        load_layer_state(layer, None, read_layer(folder, manifest, index), str(folder / layer_file(index)))
    return manifest


def find(path: str | Path) -> Path:
    """Return the checkpoint folder that `path` means: itself, or the newest one of a run directory."""
    path = Path(path)
    if (path / "manifest.json").exists():
        return path
    folder = CheckpointFolder(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    steps = folder.steps() if folder.path.is_dir() else []
    if not steps:
        raise CheckpointError(f"no checkpoint in {path}; give a run directory or a step-… folder")
    return folder.path / f"step-{steps[0]:08d}"


def export(folder: str | Path, target: str | Path) -> None:
    """Write the whole model of a checkpoint as one safetensors file: `layers.N.NAME` for every weight."""
    folder, target = Path(folder), Path(target)
    manifest = read_manifest(folder)
    tensors = {}
    for index in range(manifest.num_layers):
        for name, tensor in weights_of(read_layer(folder, manifest, index)).items():
            tensors[f"layers.{index}.{name}"] = tensor
    write_file(target, save_tensors(tensors, metadata={"step": str(manifest.step), "format": "pt"}))


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
