"""Low-rank adapters by peft: they alone are trained, and what peft loads is what they are written as.

peft puts its own modules into a block's. Adapters begin with what follows from a key, and with a product of zero: a
model with fresh adapters computes what it did without.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from wantrain.errors import ConfigError
from wantrain.hf_model import HuggingFaceModel

ADAPTER = "default"

_OWN, _TRAINED = ".base_layer.", f".{ADAPTER}."
"""What peft puts into the names of the model's own weights, and of adapters."""


def add_adapters(model: HuggingFaceModel, layer: nn.Module, block: nn.Module | None, key: int) -> None:
    """Freeze a layer's own weights, and give its block, if it is one, adapters. Raises ConfigError without peft."""
    layer.requires_grad_(False)
    if block is None:
        return
    config = peft_config(model)
    from peft import inject_adapter_in_model

    with torch.random.fork_rng([]):
        inject_adapter_in_model(config, block, ADAPTER)
    generator = torch.Generator().manual_seed(key)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(_TRAINED in name)
        if ".lora_A." in name:  # as peft begins them, but from a generator that no other thread draws from
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)


def peft_config(model: HuggingFaceModel) -> Any:
    """Return peft's own description of the adapters."""
    assert model.lora is not None, "a model with adapters says which"
    try:
        from peft import LoraConfig
    except ImportError:
        raise ConfigError("LoRA needs the package 'peft', which is not installed; pip install 'wantrain[hf]'") from None
    return LoraConfig(
        r=model.lora.rank,
        lora_alpha=model.lora.alpha,
        lora_dropout=model.lora.dropout,
        target_modules=sorted(model.lora_targets),
        fan_in_fan_out=model.shape.family == "gpt2",  # its matrices are stored the other way round
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.hf,
    )


def adapter_name(full: str) -> str | None:
    """Return what an adapter's file calls a weight of a model with adapters; None for the model's own weights."""
    return f"base_model.model.{full.replace(_TRAINED, '.')}" if _TRAINED in full else None
