"""What the layers of a DeepSpeed pipeline cost, counted on this machine, so that a plan can be made for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wantrain.errors import PlanError
from wantrain.integrations.deepspeed.layers import Source
from wantrain.profile import LayerProfile, ModelProfile


def profile(module: Any, inputs: Tensor) -> ModelProfile:
    """Count a PipelineModule's layers, or those of the list that is given to one, for a microbatch of `inputs`.

    `inputs` [samples, …] is what the first layer takes. Layers are built one at a time and run forward once, on the
    CPU. Operations are those of products; a backward counts twice. Raises PlanError for a layer that gives no tensor.
    """
    source = Source.of(module)
    layers = []
    with torch.random.fork_rng(devices=()):
        for i, spec in enumerate(source.specs):
            counted, inputs = _count(source.layer(i), inputs, f"{i} {getattr(spec, 'typename', type(spec)).__name__}")
            layers.append(counted)
    return ModelProfile(microbatch_size=len(inputs), layers=tuple(layers))


def _count(layer: nn.Module, inputs: Tensor, name: str) -> tuple[LayerProfile, Tensor]:
    """Return a layer's profile and what it gives."""
    if inputs.is_floating_point():
        inputs.requires_grad_()
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        output = layer(inputs)
    if not isinstance(output, Tensor):
        raise PlanError(
            f"layer {name} gives {type(output).__name__} (expected a tensor); a job can't be planned for it"
        )
    own = {one.untyped_storage().data_ptr() for one in (*layer.parameters(), *layer.buffers())}
    flops = float(counter.get_total_flops())
    found = LayerProfile(
        name=name,
        forward_flops=flops,
        backward_flops=2 * flops,
        parameter_bytes=sum(parameter.nbytes for parameter in layer.parameters()),
        activation_elements=output.numel(),
        stored_bytes=sum(one.untyped_storage().nbytes() for place, one in kept.items() if place not in own),
    )
    return found, output.detach()
