"""A causal language model of transformers as a list of layers that can be cut anywhere.

    tokens ─► 0 embedding ─► 1 block ─► … ─► L block ─► L+1 norm, head ─► logits
              int64 [n, s]   └────── [n, s, hidden] ──────┘              [n, s, vocabulary]

The modules are transformers' own, and each is called with what the model would call it with: the mask, the positions
and the rotations that follow from the length alone. So the layers in a row give the logits of the whole model, bit for
bit. The whole model is only ever built on the meta device, where it takes no memory; a layer that is asked for gets its
weights from the files.

Dropout draws from torch's generator, inside modules and kernels that know of no samples. A layer in training therefore
runs under a seed of its own, which follows from the run's seed, the step, the microbatch's samples and the layer: where
the model is cut changes no number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from wantrain.errors import ConfigError, PlanError
from wantrain.hf_model import HuggingFaceModel
from wantrain.integrations.huggingface.lora import add_adapters
from wantrain.integrations.huggingface.weights import load_weights


def build_layers(model: HuggingFaceModel, first: int, end: int, seed: int = 0) -> list[nn.Module]:
    """Build layers [first, end) with the model's weights, in fp32 on the CPU; nothing else of it is read.

    `seed` and a layer's number decide what its adapters begin with. With a tied head the weight is one parameter where
    both ends are here, else each end owns a copy (see `tied_parameters`). Raises ConfigError without transformers,
    CheckpointError where weights are missing or don't fit.
    """
    total = model.num_layers_total
    if not 0 <= first < end <= total:
        raise PlanError(
            f"a stage has layers {first} to {end} of a model with {total}; give it at least one of 0 to {total}"
        )
    whole = _skeleton(model)
    shared = _Shared(whole)
    layers = [_build_layer(model, whole, shared, number) for number in range(first, end)]
    load_weights(model, dict(zip(range(first, end), layers, strict=True)))
    if model.shape.tied and first == 0 and end == total:
        layers[-1].lm_head.weight = layers[0].table.weight  # type: ignore[union-attr]
    for layer in layers:
        if model.lora is not None:
            block = layer.block if isinstance(layer, Block) else None
            add_adapters(model, layer, block, _hash("lora", seed, layer.number))
        layer.train()
    return list(layers)


def tied_parameters(layers: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Return this process's copies of the tied weight: none, or the one whose gradients the two ends must add up."""
    ends = [layer for layer in layers if isinstance(layer, Embedding | Head) and layer.is_tied]
    modules = [layer.table if isinstance(layer, Embedding) else layer.lm_head for layer in ends]
    copies = [nn.Module.get_parameter(module, "weight") for module in modules]
    return [copy for copy in copies if copy.requires_grad] if len(copies) == 1 else []


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy in nats per token, in fp32; targets of −100 don't count, as in transformers."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def set_dropout_keys(layers: Sequence[nn.Module], seed: int, step: int, sample_ids: Sequence[int]) -> None:
    """Say which samples the next forward sees; needed where dropout is on, and costs nothing where it is off."""
    for layer in layers:
        if isinstance(layer, _Layer) and layer.has_dropout:
            layer.dropout_key = _hash(seed, step, *sample_ids, layer.number)


class _Shared:
    """What a model computes once for all of its layers, and each stage once for all of its own."""

    def __init__(self, whole: nn.Module) -> None:
        backbone: Any = whole.base_model
        self.config: Any = backbone.config
        rotary = getattr(backbone, "rotary_emb", None)
        self._rotary = None if rotary is None else type(rotary)(config=self.config)
        self._found: dict[Any, dict[str, Any]] = {}

    def positions(self, x: Tensor) -> Tensor:
        """Return the places of a sequence: int64 [1, seq]."""
        return torch.arange(x.shape[1], device=x.device)[None]

    def arguments(self, x: Tensor, kind: str) -> dict[str, Any]:
        """Return what a block of a kind is called with beside `x` [n, s, hidden]."""
        key = (kind, x.shape[0], x.shape[1], x.dtype, x.device)
        if key not in self._found:
            with torch.no_grad(), torch.inference_mode(mode=False):
                self._found[key] = self._arguments(x, kind)
        return self._found[key]

    def _arguments(self, x: Tensor, kind: str) -> dict[str, Any]:
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        make_mask = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
        places = self.positions(x)
        mask = make_mask(
            config=self.config, inputs_embeds=x.detach(), attention_mask=None, cache=None, position_ids=places
        )
        found = {"attention_mask": mask, "position_ids": places, "use_cache": False}
        if self._rotary is not None:
            found["position_embeddings"] = self._rotary.to(x.device)(x.detach(), position_ids=places)
        return found


class _Layer(nn.Module):
    """A layer with its number, and dropout by key."""

    number: int

    def __init__(self, number: int, shared: _Shared) -> None:
        super().__init__()
        self.number = number
        self.dropout_key: int | None = None
        self._shared = shared

    @property
    def has_dropout(self) -> bool:
        """Whether anything in here drops values when training."""
        modules = any(isinstance(one, nn.Dropout) and one.p > 0 for one in self.modules())
        return modules or (isinstance(self, Block) and bool(getattr(self._shared.config, "attention_dropout", 0)))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.has_dropout:
            return self.run(x)
        if self.dropout_key is None:
            raise ConfigError(
                "dropout doesn't know its samples; give the trainer before_forward = a call of set_dropout_keys"
            )
        with seeded(self.dropout_key, x.device):
            return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """Compute the layer."""
        raise NotImplementedError


class Embedding(_Layer):
    """Layer 0: int64 [n, s] → [n, s, hidden]; GPT-2 adds what it learned of places."""

    def __init__(self, backbone: Any, shared: _Shared, is_tied: bool) -> None:
        super().__init__(0, shared)
        self.is_tied = is_tied
        self.table: nn.Embedding = backbone.get_input_embeddings()
        self.places: nn.Embedding | None = getattr(backbone, "wpe", None)
        self.drop: nn.Module | None = getattr(backbone, "drop", None)

    def run(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.table(x)
        if self.places is not None:
            hidden = hidden + self.places(self._shared.positions(x))
        return hidden if self.drop is None else self.drop(hidden)


class Block(_Layer):
    """Layers 1 … L: [n, s, hidden] → [n, s, hidden]."""

    def __init__(self, block: nn.Module, number: int, shared: _Shared) -> None:
        super().__init__(number, shared)
        self.block = block
        self._kind = _attention_kind(shared.config, number - 1)

    def run(self, x: Tensor) -> Tensor:
        output: Tensor = self.block(x, **self._shared.arguments(x, self._kind))
        return output


class Head(_Layer):
    """Layer L+1: [n, s, hidden] → logits [n, s, vocabulary]."""

    def __init__(self, norm: nn.Module, lm_head: nn.Linear, number: int, shared: _Shared, is_tied: bool) -> None:
        super().__init__(number, shared)
        self.is_tied = is_tied
        self.norm, self.lm_head = norm, lm_head

    def run(self, x: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


@contextmanager
def seeded(key: int, device: torch.device) -> Iterator[None]:
    """Let the block draw from a generator of its own; torch's is as it was afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(key)
        yield


def _skeleton(model: HuggingFaceModel) -> Any:
    """Return the whole model on the meta device."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ConfigError(
            f"model '{model.hf}' needs the package 'transformers', which is not installed; pip install 'wantrain[hf]'"
        ) from None
    config = AutoConfig.from_pretrained(model.hf)
    with torch.device("meta"):
        load: Any = AutoModelForCausalLM.from_config
        return load(config, attn_implementation=model.attention, dtype=torch.float32)


def _build_layer(model: HuggingFaceModel, whole: Any, shared: _Shared, number: int) -> Embedding | Block | Head:
    """Return a layer whose weights are still on the meta device."""
    backbone, is_tied = whole.base_model, model.shape.tied
    if number == 0:
        return Embedding(backbone, shared, is_tied)
    is_gpt2 = model.shape.family == "gpt2"
    if number <= model.num_layers:
        return Block((backbone.h if is_gpt2 else backbone.layers)[number - 1], number, shared)
    head = whole.lm_head
    if is_tied:  # a weight of its own, so that a stage without the embedding has one
        head = nn.Linear(model.hidden, model.vocab_size, bias=False, device="meta")
    return Head(backbone.ln_f if is_gpt2 else backbone.norm, head, number, shared, is_tied)


def _attention_kind(config: Any, block: int) -> str:
    """Return "full_attention" or "sliding_attention", as the model itself decides it for a block."""
    if config.model_type in ("qwen2", "qwen3"):
        return str(config.layer_types[block])
    is_sliding = config.model_type == "mistral" and config.sliding_window is not None
    return "sliding_attention" if is_sliding else "full_attention"


def _hash(*parts: int | str) -> int:
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode()) >> 1
