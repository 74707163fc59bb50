"""Whose layers a run trains: wantrain's own GPT, or a model that an integration brings.

All of them come as a list of layers and a few functions about it, which `models/gpt.py` shows. An integration lies
above this room and is found by name when a run file asks for it, as the command line finds its handlers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from wantrain.errors import CheckpointError
from wantrain.hf_model import HuggingFaceModel, Model
from wantrain.model_config import ModelConfig
from wantrain.models import gpt
from wantrain.pipeline.stage import LossFunction
from wantrain.training.checkpoint import export

_HUGGING_FACE = "wantrain.integrations.huggingface"


class Architecture(NamedTuple):
    """What there is to know of a kind of model beyond its layers."""

    build_layers: Callable[[Any, int, int, int], list[nn.Module]]
    """Layers [first, end) of a model, by a seed."""
    loss: LossFunction
    tied_parameters: Callable[[Sequence[nn.Module]], Sequence[nn.Parameter]]
    set_dropout_keys: Callable[[Sequence[nn.Module], int, int, Sequence[int]], None]
    export: Callable[[str | Path, str | Path], None]
    """Write a checkpoint folder's model where the second path says."""


def architecture_of(model: Model) -> Architecture:
    """Return what a model's layers come from."""
    module: Any = gpt
    if isinstance(model, HuggingFaceModel):
        module = import_module(_HUGGING_FACE)
    return Architecture(
        module.build_layers,
        module.loss,
        module.tied_parameters,
        module.set_dropout_keys,
        export if module is gpt else module.export,
    )


def parse_model(data: Mapping[str, Any], source: str) -> Model:
    """Return the model that a checkpoint's manifest describes; raise CheckpointError where it is none."""
    kind: type[ModelConfig] | type[HuggingFaceModel] = HuggingFaceModel if "hf" in data else ModelConfig
    return kind.parse(data, CheckpointError, source)
