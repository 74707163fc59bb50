"""The weights of some layers, out of a model's safetensors files, and what transformers calls them.

Only the files that hold a wanted weight are opened, and of a name on the hub only those are fetched: a worker that has
blocks 8 to 15 needs no room on its disk for the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wantrain.errors import CheckpointError
from wantrain.fact import read_json
from wantrain.hf_model import HuggingFaceModel, find_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

_GPT2 = {
    "table": "transformer.wte",
    "places": "transformer.wpe",
    "block": "transformer.h.{}",
    "norm": "transformer.ln_f",
}
_OTHERS = {"table": "model.embed_tokens", "block": "model.layers.{}", "norm": "model.norm"}


def full_name(model: HuggingFaceModel, layer: int, name: str) -> str:
    """Return what transformers calls a layer's weight: "block.mlp.up_proj.weight" → "model.layers.3.mlp.up_proj.…"."""
    part, _, rest = name.partition(".")
    places = _GPT2 if model.shape.family == "gpt2" else _OTHERS
    return f"{places.get(part, part).format(layer - 1)}.{rest}"


def is_tied_copy(model: HuggingFaceModel, layer: int) -> bool:
    """Say whether a layer is a head whose matrix is the embedding's, and in no file."""
    return model.shape.tied and layer == model.num_layers_total - 1


def load_weights(model: HuggingFaceModel, layers: Mapping[int, nn.Module]) -> None:
    """Give layers on the meta device their weights, in fp32; raise CheckpointError where one is missing or misfits."""
    files = _Files(model)
    for number, layer in layers.items():
        places = {name: full_name(model, number, name) for name in layer.state_dict()}
        if is_tied_copy(model, number):
            places["lm_head.weight"] = full_name(model, 0, "table.weight")
        found = files.read(places.values())
        try:
            layer.load_state_dict({name: found[full] for name, full in places.items()}, assign=True)
        except RuntimeError as caught:
            first = str(caught).splitlines()[-1].strip()
            raise CheckpointError(f"the weights in {model.hf} don't fit its config.json ({first})") from None
        left = [name for name, tensor in (*layer.named_parameters(), *layer.named_buffers()) if tensor.is_meta]
        assert not left, f"this version of transformers keeps {left} outside its files"


class _Files:
    """A model's safetensors files, and which weight is in which."""

    def __init__(self, model: HuggingFaceModel) -> None:
        self._source = model.hf
        index = find_file(model.hf, INDEX)
        self._files: dict[str, str] = {}
        if index is not None:
            self._files = dict(read_json(index, CheckpointError)["weight_map"])
        elif (single := find_file(model.hf, WEIGHTS, is_needed=True)) is not None:
            with _opened(single) as file:
                self._files = dict.fromkeys(file.keys(), WEIGHTS)
        else:
            raise CheckpointError(f"model '{model.hf}' has no {WEIGHTS}; load it with transformers and save it anew")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return weights by their full names, in fp32; files of the backbone alone lack the first part of a name."""
        keys = {name: name if name in self._files else name.partition(".")[2] for name in names}
        for name, key in keys.items():
            if key not in self._files:
                raise CheckpointError(f"model '{self._source}' lacks the weight '{name}'; get it anew")
        found = {}
        for file_name in {self._files[key] for key in keys.values()}:
            with _opened(self._path(file_name)) as file:
                for name, key in keys.items():
                    if self._files[key] == file_name:
                        found[name] = file.get_tensor(key).to(torch.float32)
        return found

    def _path(self, name: str) -> Path:
        path = find_file(self._source, name, is_needed=True)
        if path is None:
            raise CheckpointError(f"model '{self._source}' lacks the file {name}, which this worker's layers are in")
        return path


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as caught:
        raise CheckpointError(f"can't read {path} ({caught}); get it anew") from None
