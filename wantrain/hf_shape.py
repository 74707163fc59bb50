"""The shape of a Hugging Face model: what its config.json says of sizes, read as the plain JSON that it is.

So planning needs neither transformers nor torch. Names differ by family; what a file leaves out is the family's
default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self, get_args

from pydantic import Field

from wantrain.errors import ConfigError
from wantrain.fact import Fact

Family = Literal["gpt2", "llama", "qwen2", "qwen3", "mistral"]

_KEYS = {
    "num_layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
    "num_heads": ("num_attention_heads", "n_head"),
    "max_positions": ("max_position_embeddings", "n_positions"),
    "inner": ("intermediate_size", "n_inner"),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_size": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "attention_bias": ("attention_bias",),
    "mlp_bias": ("mlp_bias",),
    "attention_dropout": ("attention_dropout", "attn_pdrop"),
    "block_dropout": ("resid_pdrop",),
    "embedding_dropout": ("embd_pdrop",),
    "tied": ("tie_word_embeddings",),
}
"""What a config.json calls each part of the shape; the second name is GPT-2's."""


class Linear(NamedTuple):
    """A matrix product of a block: the module's path in the block, and its sizes."""

    path: str
    inputs: int
    outputs: int
    has_bias: bool

    @property
    def name(self) -> str:
        """The last part of the path, by which LoRA's targets are named."""
        return self.path.rpartition(".")[2]


class HuggingFaceShape(Fact):
    """What a config.json says of a model's size."""

    family: Family
    num_layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_size: int = Field(ge=1)
    inner: int = Field(ge=1)
    """Width of a block's MLP."""
    vocab_size: int = Field(ge=2)
    max_positions: int = Field(ge=2)
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    """Places that attention reaches back in blocks that don't reach all; null: all do."""
    attention_dropout: float = Field(ge=0, lt=1)
    block_dropout: float = Field(ge=0, lt=1)
    """Of what attention and MLP add."""
    embedding_dropout: float = Field(ge=0, lt=1)

    @classmethod
    def of(cls, config: Mapping[str, Any], source: str) -> Self:
        """Read a config.json; raise ConfigError for a family or a feature that can't be cut."""
        family = config.get("model_type")
        if family not in get_args(Family):
            raise ConfigError(
                f"can't cut a model of type '{family}' ({source}); expected one of {', '.join(get_args(Family))}"
            )
        for key in ("quantization_config", "add_cross_attention"):
            if config.get(key):
                raise ConfigError(f"can't train a model with {key} ({source}); give one without it")
        found = {
            part: next((config[key] for key in keys if config.get(key) is not None), None)
            for part, keys in _KEYS.items()
        }
        known = {part: value for part, value in found.items() if value is not None}
        window = _sliding_window(str(family), config)
        return cls.parse(
            {"family": family, "sliding_window": window} | _defaults(str(family), known) | known, ConfigError, source
        )

    @property
    def linears(self) -> tuple[Linear, ...]:
        """A block's matrix products."""
        hidden, inner = self.hidden, self.inner
        query, key = self.num_heads * self.head_size, self.num_key_value_heads * self.head_size
        if self.family == "gpt2":
            sizes = (
                ("attn.c_attn", hidden, 3 * hidden),
                ("attn.c_proj", hidden, hidden),
                ("mlp.c_fc", hidden, inner),
                ("mlp.c_proj", inner, hidden),
            )
            return tuple(Linear(*one, has_bias=True) for one in sizes)
        projections = (("q_proj", query), ("k_proj", key), ("v_proj", key))
        has_bias = self.attention_bias or self.family == "qwen2"
        return (
            *(Linear(f"self_attn.{name}", hidden, outputs, has_bias) for name, outputs in projections),
            Linear("self_attn.o_proj", query, hidden, self.attention_bias),
            Linear("mlp.gate_proj", hidden, inner, self.mlp_bias),
            Linear("mlp.up_proj", hidden, inner, self.mlp_bias),
            Linear("mlp.down_proj", inner, hidden, self.mlp_bias),
        )


def _defaults(family: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a family's configuration is where its file says nothing."""
    hidden, heads = int(known.get("hidden", 0)), int(known.get("num_heads", 1))
    defaults: dict[str, Any] = dict.fromkeys(("attention_dropout", "block_dropout", "embedding_dropout"), 0.0)
    defaults |= {"num_key_value_heads": heads, "attention_bias": False, "mlp_bias": False, "tied": False}
    defaults["head_size"] = 128 if family == "qwen3" else hidden // max(1, heads)
    if family == "gpt2":
        defaults |= dict.fromkeys(("attention_dropout", "block_dropout", "embedding_dropout"), 0.1)
        defaults |= {"tied": True, "inner": 4 * hidden}
    return defaults


def _sliding_window(family: str, config: Mapping[str, Any]) -> int | None:
    """Return the window of the blocks that have one; null in a file is not the same as nothing in it."""
    if family == "mistral":
        window: int | None = config.get("sliding_window", 4096)
        return window
    return config.get("sliding_window") if config.get("use_sliding_window") else None
