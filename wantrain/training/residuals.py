"""What compressed gradients still owe, in checkpoints: a file for every layer and replica, beside the layer's own.

Each worker owes something else, so every replica writes its own residuals, parameter by parameter, each with its place:
what a residual means depends on who owns that piece of the bucket. In a job with other buckets or replicas the places
differ, and the residuals are dropped, on all workers at once: what was owed is lost then, as much as a step or two of a
lossy codec without feedback loses. Nothing else depends on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from wantrain.errors import CheckpointError
from wantrain.pipeline.gradients import GradientBuckets
from wantrain.training.checkpoint import CheckpointFolder, read_file, write_file


def residual_file(layer: int, replica: int) -> str:
    return f"layer-{layer:04d}.residual-{replica}.safetensors"


def save_residuals(
    checkpoints: CheckpointFolder,
    step: int,
    layers: Mapping[int, nn.Module],
    buckets: Sequence[GradientBuckets],
    replica: int,
) -> dict[str, str]:
    """Write this rank's residuals, if it has any, into a checkpoint that is not finished; return their checksums."""
    sums = {}
    for index, owed in _by_layer(layers, buckets):
        tensors = {f"residual:{key}": values.clone() for key, (values, _) in owed.items()}
        tensors |= {f"place:{key}": place for key, (_, place) in owed.items()}
        path = checkpoints.begin(step) / residual_file(index, replica)
        sums[path.name] = write_file(path, save_tensors(tensors))
    return sums


def load_residuals(
    checkpoints: CheckpointFolder,
    step: int,
    layers: Mapping[int, nn.Module],
    buckets: Sequence[GradientBuckets],
    replica: int,
) -> str:
    """Fill this rank's residuals from a finished checkpoint; say what hinders, empty if nothing does."""
    for index, owed in _by_layer(layers, buckets):
        try:
            _fill(owed, _read(checkpoints, step, residual_file(index, replica)))
        except CheckpointError as caught:
            return str(caught)
    return ""


def _read(checkpoints: CheckpointFolder, step: int, name: str) -> dict[str, Tensor]:
    manifest = checkpoints.manifest(step)
    if name not in manifest.files:
        raise CheckpointError(f"the checkpoint has no {name}")
    return load_tensors(read_file(checkpoints.path_of(step), manifest, name))


def _fill(owed: Mapping[str, tuple[Tensor, Tensor]], saved: Mapping[str, Tensor]) -> None:
    for key, (values, place) in owed.items():
        found = saved.get(f"place:{key}")
        if found is None or not torch.equal(found, place):
            raise CheckpointError(f"the residual of {key} was saved for other buckets or replicas")
        values.copy_(saved[f"residual:{key}"])


def _by_layer(
    layers: Mapping[int, nn.Module], buckets: Sequence[GradientBuckets]
) -> Iterator[tuple[int, dict[str, tuple[Tensor, Tensor]]]]:
    """Yield the layers with residuals: views and places, by parameter and number of the sum."""
    kept = [one.residuals() for one in buckets]
    for index, layer in layers.items():
        owed = {
            f"{name}:{number}": (values, torch.tensor(place))
            for name, parameter in layer.named_parameters()
            for one in kept
            for number, (values, place) in enumerate(one.get(parameter, ()))
        }
        if owed:
            yield index, owed
