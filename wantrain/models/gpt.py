"""A GPT as a list of layers that can be cut anywhere.

Layer 0 embeds tokens, layers 1 … L are pre-norm blocks, layer L+1 is the final norm with the head. Each layer maps one
tensor to one tensor, so a stage is a slice of the list and what crosses a boundary is always [microbatch, seq, hidden].

    tokens ─► 0 embedding ─► 1 block ─► … ─► L block ─► L+1 norm, head ─► logits
              int64 [n, s]   └────── [n, s, hidden] ──────┘              [n, s, vocabulary]

Two things must not depend on where the list is cut. A layer's initial weights follow from (seed, layer) alone, and
dropout, where it is on, from (seed, step, sample, layer): its mask is a hash of those and of the element's place, so no
generator has a state that somebody must hand on.

Norms, rotations and the loss are computed in fp32 whatever the parameters are. Positions are rotary (Su et al.,
"RoFormer", 2021). There are no biases, so no key bias whose true gradient is zero and whose Adam update is noise.
Normalized queries and keys, and mixing the tokens before into each input, did not pay for their time in a short
run (tried over 200 steps of 1024 bytes, 4 blocks of 192).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wantrain.errors import PlanError
from wantrain.model_config import ModelConfig

INITIAL_STD = 0.02
"""Chosen: GPT-2's (Radford et al., 2019); the products that end in the residual stream start smaller by 1/√(2L)."""


def num_layers_total(config: ModelConfig) -> int:
    """Return how many layers a plan can hand out: the embedding, the blocks, the head."""
    return config.num_layers_total


def build_layers(config: ModelConfig, first: int, end: int, seed: int) -> list[nn.Module]:
    """Build layers [first, end) in fp32 on the CPU; a layer's weights depend on `seed` and its number only.

    With a tied head the weight is one parameter where both ends are here, else each end owns an equal copy
    (see `tied_parameters`).
    """
    total = config.num_layers_total
    if not 0 <= first < end <= total:
        raise PlanError(
            f"a stage has layers {first} to {end} of a model with {total}; give it at least one of 0 to {total}"
        )
    layers = [_build_layer(config, layer, seed) for layer in range(first, end)]
    if config.tied and first == 0 and end == total:
        ends = layers[0], layers[-1]
        assert isinstance(ends[0], TokenEmbedding)
        assert isinstance(ends[1], Head)
        ends[1].weight = ends[0].weight
    return layers


def tied_parameters(layers: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Return this process's copies of the tied weight: none, or the one whose gradients the two ends must add up.

    Where both ends are in `layers` autograd has already added them, so nothing is returned.
    """
    copies = [layer.weight for layer in layers if isinstance(layer, TokenEmbedding | Head) and layer.tied]
    return copies if len(copies) == 1 else []


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy in nats per token, computed in fp32: [n, s, vocabulary] against int64 [n, s]."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def set_dropout_keys(layers: Sequence[nn.Module], seed: int, step: int, sample_ids: Sequence[int]) -> None:
    """Say which samples the next forward sees; needed where dropout is on, and costs nothing where it is off."""
    active = [one for layer in layers for one in layer.modules() if isinstance(one, KeyedDropout) and one.probability]
    if active:
        keys = torch.tensor([_hash(seed, step, sample) for sample in sample_ids])
        for one in active:
            one.keys = keys


class TokenEmbedding(nn.Module):
    """Layer 0: int64 [n, s] → [n, s, hidden]."""

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.tied = config.tied
        self.weight = _normal((config.vocab_size, config.hidden), INITIAL_STD, generator)
        self.dropout = KeyedDropout(config.dropout, "embedding")

    def forward(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.dropout(F.embedding(tokens, self.weight))
        return embedded


class Block(nn.Module):
    """Layers 1 … L: [n, s, hidden] → [n, s, hidden], attention and then an MLP, each added to its input."""

    def __init__(self, config: ModelConfig, layer: int, generator: torch.Generator) -> None:
        super().__init__()
        self.attention_norm = Norm(config.hidden)
        self.attention = Attention(config, generator)
        self.attention_dropout = KeyedDropout(config.dropout, f"{layer} attention")
        self.mlp_norm = Norm(config.hidden)
        self.mlp = Mlp(config, generator)
        self.mlp_dropout = KeyedDropout(config.dropout, f"{layer} mlp")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention_dropout(self.attention(self.attention_norm(x)))
        added: Tensor = x + self.mlp_dropout(self.mlp(self.mlp_norm(x)))
        return added


class Head(nn.Module):
    """Layer L+1: [n, s, hidden] → logits [n, s, vocabulary]."""

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.tied = config.tied
        self.norm = Norm(config.hidden)
        self.weight = _normal((config.vocab_size, config.hidden), INITIAL_STD, generator)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.weight)


class Attention(nn.Module):
    """Causal attention over heads with rotary positions."""

    rotation: Tensor

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = _normal((3 * config.hidden, config.hidden), INITIAL_STD, generator)
        self.out = _normal((config.hidden, config.hidden), _residual_std(config), generator)
        self.register_buffer("rotation", _rotation(config.seq_len, config.head_size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        samples, length, hidden = x.shape
        split = F.linear(x, self.qkv).view(samples, length, 3, self.num_heads, hidden // self.num_heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        cosine, sine = self.rotation[:, :length]
        query, key = (_rotate(one, cosine, sine) for one in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return F.linear(mixed.transpose(1, 2).reshape(x.shape), self.out)


class Mlp(nn.Module):
    """Two products with a GELU between."""

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        inner = config.mlp_ratio * config.hidden
        self.up = _normal((inner, config.hidden), INITIAL_STD, generator)
        self.down = _normal((config.hidden, inner), _residual_std(config), generator)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, self.up)), self.down)


class Norm(nn.Module):
    """Layer norm with a gain and no bias, in fp32 and back.

    PyTorch's RMS norm is 2.5 times slower on a CPU (measured, 2048 × 256 forward and backward), being made of parts.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.gain.shape, self.gain.float()).to(x.dtype)


class KeyedDropout(nn.Module):
    """Dropout whose mask is a hash of (seed, step, sample) and of the element's place in the model.

    So a sample meets the same mask in whichever process and microbatch it is, on any device.
    """

    def __init__(self, probability: float, place: str) -> None:
        super().__init__()
        self.probability = probability
        self.keys: Tensor | None = None
        self._salt = _hash(place)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.probability:
            return x
        if self.keys is None or len(self.keys) != len(x):
            raise ValueError(f"dropout doesn't know its {len(x)} samples; call set_dropout_keys before the forward")
        kept = _keyed_uniform(self.keys.to(x.device) ^ self._salt, x[0].numel()) >= self.probability
        return x * kept.view(x.shape) / (1 - self.probability)


def _build_layer(config: ModelConfig, layer: int, seed: int) -> nn.Module:
    is_head = layer == config.num_layers_total - 1
    origin = 0 if is_head and config.tied else layer
    generator = torch.Generator().manual_seed(_hash(seed, origin) & (2**63 - 1))
    if layer == 0:
        return TokenEmbedding(config, generator)
    return Head(config, generator) if is_head else Block(config, layer, generator)


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).normal_(0.0, std, generator=generator))


def _residual_std(config: ModelConfig) -> float:
    """Return the spread that keeps the residual stream, a sum of 2L outputs, from growing with depth."""
    return float(INITIAL_STD * (2 * config.num_layers) ** -0.5)


def _rotation(seq_len: int, head_size: int) -> Tensor:
    """Return cosine and sine of position · 10000^(−2i/head_size): [2, seq, head_size / 2]."""
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequency)
    return torch.stack((angle.cos(), angle.sin()))


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cosine - right * sine, left * sine + right * cosine), dim=-1).to(x.dtype)


def _hash(*parts: int | str) -> int:
    """Return a signed 64-bit hash, the same in every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _keyed_uniform(keys: Tensor, num_elements: int) -> Tensor:
    """Return [n, num_elements] numbers in [0, 1) from int64 keys [n], by splitmix64 (Steele et al., OOPSLA 2014)."""
    place = torch.arange(num_elements, device=keys.device) * -7046029254386353131
    mixed = keys[:, None] + place
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ (mixed >> shift & (1 << 64 - shift) - 1)) * factor
    return (mixed >> 40 & 2**24 - 1).float() * 2.0**-24
