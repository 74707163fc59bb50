"""What a model is, without building it.

A frozen fact, so that planning, simulation and a run file can speak of a model without importing torch. The model's
layers are numbered as they are cut: 0 is the embedding, 1 … `num_layers` are the blocks, and the last one is the
final norm with the head. So a model of 4 blocks has 6 layers to hand out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from wantrain.errors import ConfigError
from wantrain.fact import Fact, read_toml


class ModelConfig(Fact):
    """The shape of a GPT."""

    num_layers: int = Field(ge=1)
    """Blocks, the embedding and the head not counted."""
    hidden: int = Field(ge=2)
    """Width of the activations between blocks."""
    num_heads: int = Field(ge=1)
    """Attention heads of a block; must divide hidden into even sizes."""
    seq_len: int = Field(ge=2)
    """Tokens of a training sample, and the longest context of generation."""
    vocab_size: int = Field(default=256, ge=2)
    """Tokens that the tokenizer knows; 256 for bytes."""
    tied: bool = False
    """Whether the head's weight is the embedding's."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of activations that is dropped in training."""
    mlp_ratio: int = Field(default=4, ge=1)
    """Width of a block's inner layer, in hidden sizes."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden % (2 * self.num_heads):
            raise ValueError(
                f"hidden must divide into heads of even size "
                f"(got hidden = {self.hidden}, num_heads = {self.num_heads}); change one of them"
            )
        return self

    @property
    def num_layers_total(self) -> int:
        """Layers that a plan hands out: the embedding, the blocks, the head."""
        return self.num_layers + 2

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.num_heads

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a model's shape from a TOML file."""
        return cls.parse(read_toml(path, ConfigError), ConfigError, str(path))
