"""What a model costs, layer by layer: floating point operations and bytes. The planner and the simulator start here.

Counted, so that a plan can be made on a machine that has neither torch nor the memory for the model; or measured by
`wantrain profile`, or derived from published figures of a device: `source` says which. What was measured in seconds is
kept as operations, seconds × `reference_flops_per_s`: so the profile gives the very seconds back on a worker that is
said to sustain the reference's speed, and scales on others.

A matrix product of [n, a] with [a, b] is 2·n·a·b operations forward and twice that backward (one product for the
gradient of each operand). Norms, activations and rotations are left out: they cost time but hardly any operations,
and a worker's `flops_per_s` is the sustained rate that already pays for them.

Stored bytes are what autograd keeps between a layer's forward and its backward, for one microbatch, in fp32; the test
counts them with saved-tensor hooks. Per token, in elements, with hidden size h, mlp ratio r, vocabulary v:

    embedding    2                  the tokens, int64
    block        11 h + 2 r h       input and its norm (2), q k v (3), q and k rotated (2), attention's output by head
                                    and by token (2), the sum with the input and its norm (2), the mlp before and
                                    after its activation (2 r)
    head         2 h + v + 2        input and its norm, the loss's log-probabilities, the targets
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from wantrain.errors import ConfigError
from wantrain.fact import Fact, read_json, write_text
from wantrain.hf_model import Model
from wantrain.model_config import ModelConfig

BYTES_PER_ELEMENT = 4
"""Parameters and stored activations are counted in fp32."""


class LayerProfile(Fact):
    """What one layer costs for one microbatch."""

    name: str
    forward_flops: float = Field(ge=0)
    backward_flops: float = Field(ge=0)
    weight_flops: float = Field(default=0.0, ge=0)
    """Of the backward's, those for gradients of weights that a schedule may leave for later."""
    parameter_bytes: int = Field(ge=0)
    """Weights that are trained."""
    frozen_bytes: int = Field(default=0, ge=0)
    """Weights that stay as they are: they take their own memory, but no gradient and no optimizer state."""
    activation_elements: int = Field(ge=0)
    """Elements of its output, which cross the wire where a stage ends here."""
    stored_bytes: int = Field(ge=0)
    """What is kept between forward and backward."""
    recomputed_bytes: int = Field(default=0, ge=0)
    """What is made anew for the backward, and dropped with it, where activations are recomputed."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.weight_flops > self.backward_flops:
            raise ValueError(
                f"weight_flops are part of backward_flops (got {self.weight_flops:g} of {self.backward_flops:g})"
            )
        return self

    @property
    def backward_bytes(self) -> int:
        """What its backward finds of its forward, kept or made anew."""
        return self.stored_bytes + self.recomputed_bytes

    def forward_s(self, flops_per_s: float) -> float:
        """Return the seconds of a forward on a worker that sustains `flops_per_s`."""
        return self.forward_flops / flops_per_s

    def backward_s(self, flops_per_s: float) -> float:
        """Return the seconds of a backward on a worker that sustains `flops_per_s`."""
        return self.backward_flops / flops_per_s

    def weights_s(self, flops_per_s: float) -> float:
        """Return the seconds of the gradients of weights, a part of a backward's."""
        return self.weight_flops / flops_per_s


class CodecSpeed(Fact):
    """Values per second through encode and decode, of direct quantization and of the difference to a kept message."""

    direct_encode: float = Field(gt=0)
    direct_decode: float = Field(gt=0)
    delta_encode: float = Field(gt=0)
    delta_decode: float = Field(gt=0)

    @property
    def values_per_s(self) -> float:
        """The one figure that a topology holds: what an encode or a decode gets through on the average of these."""
        return statistics.harmonic_mean((self.direct_encode, self.direct_decode, self.delta_encode, self.delta_decode))


class ModelProfile(Fact):
    """What every layer of a model costs, at one microbatch size."""

    microbatch_size: int = Field(ge=1)
    """Samples in the microbatch that the layers' figures are for."""
    layers: tuple[LayerProfile, ...] = Field(min_length=1)
    model: ModelConfig | None = None
    """Whose layers they are; None for layers that are no GPT's."""
    source: str = "counted"
    """Where the figures come from: "counted", "measured on …", "derived from …"."""
    reference_flops_per_s: float | None = Field(default=None, gt=0)
    """What the machine sustains that was measured, or that the figures are for: the speed to put into a topology."""
    optimizer_flops_per_parameter: float | None = Field(default=None, ge=0)
    """AdamW's step, likewise seconds × speed; None: counted."""
    codec_speed: CodecSpeed | None = None
    """Of the machine that was measured."""
    memory_bytes: int | None = Field(default=None, ge=0)
    """What was free on the machine that was measured, the model not yet in it."""

    @property
    def num_layers(self) -> int:
        """Layers that a plan hands out."""
        return len(self.layers)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all weights that are trained."""
        return sum(layer.parameter_bytes for layer in self.layers)

    def compute_s(self, first: int, end: int, flops_per_s: float) -> float:
        """Return the seconds of a forward and a backward through layers [first, end) for one microbatch."""
        return sum(layer.forward_s(flops_per_s) + layer.backward_s(flops_per_s) for layer in self.layers[first:end])

    def with_recomputing(self) -> Self:
        """Return what layers cost where only their inputs are kept, and their backwards run the forward once more.

        The model's first and last layers stay as they are: see `TorchStage`.
        """
        inner = range(1, self.num_layers - 1)
        layers = [
            _recomputed(layer, self.layers[i - 1]) if i in inner else layer for i, layer in enumerate(self.layers)
        ]
        return self.model_copy(update={"layers": tuple(layers)})

    def require(self, model: Model) -> None:
        """Raise ConfigError where the profile is of another model; dropout and tied weights change next to nothing."""
        own = self.model
        if own is not None and not isinstance(model, ModelConfig):
            raise _another("model", "a GPT", f"'{model.hf}'")
        if own is None or not isinstance(model, ModelConfig):
            if self.num_layers != model.num_layers_total:
                raise _another("layers", self.num_layers, model.num_layers_total)
            return
        for name in ("num_layers", "hidden", "num_heads", "seq_len", "vocab_size", "mlp_ratio"):
            if getattr(own, name) != getattr(model, name):
                raise _another(name, getattr(own, name), getattr(model, name))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a profile from a JSON file."""
        return cls.parse(read_json(path, ConfigError), ConfigError, str(path))

    def save(self, path: str | Path) -> None:
        """Write the profile as a JSON file."""
        write_text(path, self.model_dump_json(indent=2) + "\n")


def _recomputed(layer: LayerProfile, before: LayerProfile) -> LayerProfile:
    kept = min(layer.stored_bytes, before.activation_elements * BYTES_PER_ELEMENT)
    return layer.model_copy(
        update={
            "backward_flops": layer.backward_flops + layer.forward_flops,
            "stored_bytes": kept,
            "recomputed_bytes": layer.stored_bytes - kept,
        }
    )


def _another(what: str, got: object, expected: object) -> ConfigError:
    return ConfigError(
        f"the profile is of another model ({what}: got {got}, expected {expected}); make one with 'wantrain profile'"
    )


def gpt_profile(config: ModelConfig, microbatch_size: int) -> ModelProfile:
    """Count what each layer of a GPT costs for a microbatch of so many samples of `config.seq_len` tokens."""
    tokens = microbatch_size * config.seq_len
    block = _block(config, tokens)
    blocks = [block.model_copy(update={"name": f"block {layer}"}) for layer in range(1, config.num_layers + 1)]
    layers = (_embedding(config, tokens), *blocks, _head(config, tokens))
    return ModelProfile(microbatch_size=microbatch_size, layers=layers, model=config)


def _embedding(config: ModelConfig, tokens: int) -> LayerProfile:
    return LayerProfile(
        name="embedding",
        forward_flops=0.0,
        backward_flops=0.0,
        parameter_bytes=config.vocab_size * config.hidden * BYTES_PER_ELEMENT,
        activation_elements=tokens * config.hidden,
        stored_bytes=tokens * (2 * BYTES_PER_ELEMENT + _mask_bytes(config, 1)),
    )


def _block(config: ModelConfig, tokens: int) -> LayerProfile:
    hidden = config.hidden
    weights = (4 + 2 * config.mlp_ratio) * hidden**2
    scores = 2 * config.seq_len * hidden  # every pair of places, for the scores and for the mixing of values
    forward = 2.0 * tokens * (weights + scores)
    return LayerProfile(
        name="block",
        forward_flops=forward,
        backward_flops=2 * forward,
        weight_flops=2.0 * tokens * weights,
        parameter_bytes=(weights + 2 * hidden) * BYTES_PER_ELEMENT,
        activation_elements=tokens * hidden,
        stored_bytes=tokens * ((11 + 2 * config.mlp_ratio) * hidden * BYTES_PER_ELEMENT + _mask_bytes(config, 2)),
    )


def _head(config: ModelConfig, tokens: int) -> LayerProfile:
    weights = config.vocab_size * config.hidden
    forward = 2.0 * tokens * weights
    return LayerProfile(
        name="head",
        forward_flops=forward,
        backward_flops=2 * forward,
        weight_flops=forward,
        parameter_bytes=(weights + config.hidden) * BYTES_PER_ELEMENT,
        activation_elements=tokens * config.vocab_size,
        stored_bytes=tokens * (2 * config.hidden + config.vocab_size + 2) * BYTES_PER_ELEMENT,
    )


def _mask_bytes(config: ModelConfig, num_masks: int) -> int:
    """Return what dropout keeps per token: one byte per element and mask."""
    return num_masks * config.hidden if config.dropout else 0
