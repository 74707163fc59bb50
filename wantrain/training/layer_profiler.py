"""Measure what a model's layers cost on this machine: seconds forward and backward, bytes kept, bytes of weights.

The embedding, a few blocks and the head stand for the whole model, since all its blocks are alike; they are run as a
chain, forwards and then backwards, because a layer that is run again and again by itself finds its weights in the
cache, and a real stage does not. Each layer is a `TorchStage`, so what is timed is what the executor runs.

    embedding F ─► block F ─► block F ─► head F
    embedding B ◄─ block B ◄─ block B ◄─ head B        once around is one sample of every layer's two times

A few more rounds split the backward, and say what part of it the gradients of weights are, which a schedule may leave
for later. The blocks of all rounds share one median. Bytes are those of the storages that autograd keeps, the weights
left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wantrain.hf_model import Model
from wantrain.hf_profile import counted_profile
from wantrain.pipeline.stage import TorchStage
from wantrain.profile import LayerProfile, ModelProfile
from wantrain.training.architecture import architecture_of

NUM_BLOCKS = 3
"""Chosen: enough that no block's weights stay in a cache, few enough that a large model's fit anywhere."""

_LEAST_ROUNDS, _MOST_ROUNDS, _ENOUGH_S = 5, 50, 4.0
"""Chosen: a median of five at least; small models get more, within a few seconds."""

_OPTIMIZER_STEPS = 5


@dataclass
class LayerTimes:
    """The seconds of one kind of layer, all that were measured."""

    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)
    weights_s: list[float] = field(default_factory=list)
    """Of a backward that was split."""

    @property
    def spread(self) -> float:
        """Half of the range that holds the middle half of forward + backward, by their median."""
        both = [f + b for f, b in zip(self.forward_s, self.backward_s, strict=True)]
        low, middle, high = statistics.quantiles(both, n=4)
        return (high - low) / 2 / middle


@dataclass(frozen=True)
class LayerMeasurement:
    """What was measured of a model, by kind of layer, and the profile that follows."""

    profile: ModelProfile
    times: dict[str, LayerTimes]
    num_rounds: int


def measure_layers(
    config: Model,
    microbatch_size: int,
    *,
    device: torch.device,
    source: str,
    dtype: str = "fp32",
    dilation: float = 1.0,
    progress: Callable[[str], None] = lambda _: None,
) -> LayerMeasurement:
    """Measure a model's layers on a device with the threads that torch now has; raise OutOfMemoryError as torch does.

    With a dilation, the pauses of a dilated job follow each pass: a processor that has rested finds its caches cold.
    """
    chain = _Chain(config, microbatch_size, device, dtype, dilation)
    counted = counted_profile(config, microbatch_size)
    sizes = {kind: chain.sizes(kind) for kind in chain.kinds}
    began = time.monotonic()
    chain.run_round({kind: LayerTimes() for kind in chain.kinds})  # the first allocates; its times don't count
    times = {kind: LayerTimes() for kind in chain.kinds}
    num_rounds = 0
    while num_rounds < _LEAST_ROUNDS or (num_rounds < _MOST_ROUNDS and time.monotonic() - began < _ENOUGH_S):
        progress(f"layers, round {num_rounds + 1}")
        chain.run_round(times)
        num_rounds += 1
    for _ in range(_LEAST_ROUNDS):
        chain.run_split_round(times)
    progress("optimizer")
    profile = _profile(counted, times, sizes, chain.optimizer_s_per_parameter())
    return LayerMeasurement(profile.model_copy(update={"source": source}), times, num_rounds)


def _profile(
    counted: ModelProfile, times: dict[str, LayerTimes], sizes: dict[str, dict[str, int]], optimizer_s: float
) -> ModelProfile:
    """Turn seconds into operations at the speed that the model as a whole sustained."""
    kinds = [_kind(i, counted.num_layers) for i in range(counted.num_layers)]
    forward_s = {kind: statistics.median(one.forward_s) for kind, one in times.items()}
    backward_s = {kind: statistics.median(one.backward_s) for kind, one in times.items()}
    weights_s = {kind: min(statistics.median(one.weights_s), backward_s[kind]) for kind, one in times.items()}
    total_s = sum(forward_s[kind] + backward_s[kind] for kind in kinds)
    speed = sum(layer.forward_flops + layer.backward_flops for layer in counted.layers) / total_s

    def measured(layer: LayerProfile, kind: str) -> LayerProfile:
        seconds = {"forward": forward_s[kind], "backward": backward_s[kind], "weight": weights_s[kind]}
        flops = {f"{part}_flops": one * speed for part, one in seconds.items()}
        return layer.model_copy(update=flops | sizes[kind])

    layers = tuple(measured(layer, kind) for layer, kind in zip(counted.layers, kinds, strict=True))
    update = {"layers": layers, "reference_flops_per_s": speed, "optimizer_flops_per_parameter": optimizer_s * speed}
    return counted.model_copy(update=update)


def _kind(layer: int, num_layers: int) -> str:
    return {0: "embedding", num_layers - 1: "head"}.get(layer, "block")


class _Chain:
    """Embedding, blocks and head in a row, and what goes through them."""

    def __init__(self, config: Model, microbatch_size: int, device: torch.device, dtype: str, dilation: float) -> None:
        total = config.num_layers_total
        own = [0, *range(1, 1 + min(NUM_BLOCKS, config.num_layers)), total - 1]
        self.kinds = [_kind(layer, total) for layer in own]
        self._device, self._dtype, self._dilation = device, dtype, dilation
        model = architecture_of(config)
        self._loss = model.loss
        self._layers = [model.build_layers(config, layer, layer + 1, 0)[0].to(device) for layer in own]
        model.set_dropout_keys(self._layers, 0, 0, range(microbatch_size))
        self._stages, self._split_stages = (
            [
                TorchStage(
                    [layer], loss=self._loss if kind == "head" else None, autocast=self._autocast, is_split=split
                )
                for layer, kind in zip(self._layers, self.kinds, strict=True)
            ]
            for split in (False, True)
        )
        shape = (microbatch_size, config.seq_len)
        self._tokens = torch.randint(config.vocab_size, shape, device=device)
        self._hidden = torch.randn(*shape, config.hidden, device=device)

    def run_round(self, times: dict[str, LayerTimes]) -> None:
        """Run the chain forwards and backwards; add each layer's seconds to its kind's."""
        hidden, last = self._tokens, len(self._stages) - 1
        with self._rest():
            for i, (stage, kind) in enumerate(zip(self._stages, self.kinds, strict=True)):
                began = self._now_s()
                hidden = stage.forward(0, hidden, self._tokens if i == last else None)
                times[kind].forward_s.append(self._now_s() - began)
        grad: Tensor | None = None
        with self._rest():
            for stage, kind in zip(self._stages[::-1], self.kinds[::-1], strict=True):
                began = self._now_s()
                grad = stage.backward(0, grad)
                times[kind].backward_s.append(self._now_s() - began)

    def run_split_round(self, times: dict[str, LayerTimes]) -> None:
        """Run the chain forwards and backwards, split; add the seconds of each layer's gradients of weights."""
        hidden, last = self._tokens, len(self._split_stages) - 1
        for i, stage in enumerate(self._split_stages):
            hidden = stage.forward(0, hidden, self._tokens if i == last else None)
        grad: Tensor | None = None
        for stage in self._split_stages[::-1]:
            grad = stage.backward(0, grad)
        for stage, kind in zip(self._split_stages[::-1], self.kinds[::-1], strict=True):
            began = self._now_s()
            stage.weights(0)
            times[kind].weights_s.append(self._now_s() - began)

    @contextmanager
    def _rest(self) -> Iterator[None]:
        """Pause after the block as a dilated job does after a stage's layers."""
        began = self._now_s()
        yield
        time.sleep((self._dilation - 1) * (self._now_s() - began))

    def sizes(self, kind: str) -> dict[str, int]:
        """Return bytes of weights, elements of the output, and bytes that are kept for the backward."""
        layer = self._layers[self.kinds.index(kind)]
        inputs = self._tokens if kind == "embedding" else self._hidden.clone().requires_grad_()
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), self._autocast():
            output = layer(inputs)
            result = self._loss(output, self._tokens) if kind == "head" else output
        own = {one.untyped_storage().data_ptr() for one in (*layer.parameters(), *layer.buffers())}
        del result
        return {
            "parameter_bytes": sum(one.nbytes for one in layer.parameters() if one.requires_grad),
            "frozen_bytes": sum(one.nbytes for one in layer.parameters() if not one.requires_grad),
            "activation_elements": output.numel(),
            "stored_bytes": sum(one.untyped_storage().nbytes() for place, one in kept.items() if place not in own),
        }

    def optimizer_s_per_parameter(self) -> float:
        """Return the seconds of an AdamW step by the number of parameters; the gradients are those of the rounds."""
        parameters = [one for layer in self._layers for one in layer.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(parameters, fused=True)
        optimizer.step()  # allocates its state
        times = []
        for _ in range(_OPTIMIZER_STEPS):
            began = self._now_s()
            optimizer.step()
            times.append(self._now_s() - began)
        return statistics.median(times) / sum(parameter.numel() for parameter in parameters)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, torch.bfloat16) if self._dtype == "bf16" else nullcontext()

    def _now_s(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
