"""A Hugging Face causal language model as a run file names it: a folder or a name, and the shape that it has.

    [model]
    hf = "models/my-llama"   # a folder beside the run file, or a name that `from_pretrained` would find
    seq_len = 512
    [model.lora]             # leave it out to train all weights
    rank = 8

The shape comes from the model's config.json (`hf_shape.py`). It is cut like wantrain's own GPT: layer 0 embeds, layers
1 … L are the blocks, the last one is norm and head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from wantrain.errors import ConfigError, did_you_mean
from wantrain.fact import Fact, read_json, read_toml
from wantrain.hf_shape import HuggingFaceShape, Linear
from wantrain.model_config import ModelConfig
from wantrain.resources import find_config

MOST_DEFAULT_SEQ_LEN = 1024
"""Chosen: tokens of a sample where nobody says it, or as many as the model can take."""


class Lora(Fact):
    """Low-rank adapters (Hu et al., "LoRA", 2021): they are trained, and the model's own weights stay as they are."""

    rank: int = Field(default=8, ge=1)
    alpha: int = Field(default=16, ge=1)
    """What an adapter gives is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ()
    """Matrix products that get an adapter, by name; none: those of peft's own choice (c_attn; q_proj and v_proj)."""


class HuggingFaceModel(Fact):
    """A model of the Hugging Face families that wantrain can cut, and how it is to be trained."""

    hf: str
    """A folder that `from_pretrained` loads, or a model's name on the hub."""
    seq_len: int = Field(ge=2)
    """Tokens of a training sample, and the longest context of generation."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """transformers' implementation of it."""
    lora: Lora | None = None
    """Adapters to train instead of the weights."""
    shape: HuggingFaceShape
    """Read from the model's config.json."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.seq_len > self.shape.max_positions:
            raise ValueError(
                f"seq_len is more than the model can take (got {self.seq_len}, expected at most"
                f" {self.shape.max_positions}); lower it"
            )
        known = [one.name for one in self.shape.linears]
        for target in self.lora.targets if self.lora is not None else ():
            if target not in known:
                raise ValueError(
                    f"lora has no target '{target}' in {self.shape.family}{did_you_mean(target, known)};"
                    f" expected some of {', '.join(dict.fromkeys(known))}"
                )
        return self

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        seq_len: int | None = None,
        attention: Literal["sdpa", "eager"] = "sdpa",
        lora: Lora | None = None,
    ) -> Self:
        """Return the model in a folder, or of a name; no weight is read. Raises ConfigError where that can't be."""
        given = {"hf": str(source), "attention": attention, "lora": lora}
        return cls.parse(resolve_source(given | ({"seq_len": seq_len} if seq_len else {})), ConfigError, str(source))

    @property
    def num_layers(self) -> int:
        """Blocks, the embedding and the head not counted."""
        return self.shape.num_layers

    @property
    def num_layers_total(self) -> int:
        """Layers that a plan hands out: the embedding, the blocks, the head."""
        return self.shape.num_layers + 2

    @property
    def hidden(self) -> int:
        return self.shape.hidden

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab_size

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Return what gets an adapter, the default spelled out; empty without LoRA."""
        if self.lora is None:
            return ()
        return self.lora.targets or (("c_attn",) if self.shape.family == "gpt2" else ("q_proj", "v_proj"))


Model = ModelConfig | HuggingFaceModel
"""What a run file can train."""


def load_model(given: str) -> Model:
    """Return the model that the user means: a folder of a Hugging Face model, a TOML file, or a shipped one's name."""
    if Path(given, "config.json").is_file():
        return HuggingFaceModel.open(given)
    path = find_config("models", given, ConfigError)
    data = read_toml(path, ConfigError)
    if "hf" in data:
        return HuggingFaceModel.parse(resolve_source(data, path.parent), ConfigError, str(path))
    return ModelConfig.parse(data, ConfigError, str(path))


def resolve_source(model: Mapping[str, Any], beside: Path = Path()) -> dict[str, Any]:
    """Return a [model] table with the shape read, the folder's path absolute, and the length of samples chosen."""
    folder = beside / str(model["hf"])
    source = str(folder.resolve()) if folder.is_dir() else str(model["hf"])
    resolved = {**model, "hf": source}
    if "shape" not in model:
        resolved["shape"] = read_shape(source).model_dump()
    longest = min(MOST_DEFAULT_SEQ_LEN, int(resolved["shape"]["max_positions"]))
    return {"seq_len": longest} | resolved


def read_shape(source: str) -> HuggingFaceShape:
    """Read the config.json of a model; raise ConfigError where there is none, or for a model that can't be cut."""
    path = find_file(source, "config.json", is_needed=True)
    if path is None:
        raise ConfigError(f"model '{source}' has no config.json; give a folder that save_pretrained wrote")
    return HuggingFaceShape.of(read_json(path, ConfigError), str(path))


def find_file(source: str, name: str, is_needed: bool = False) -> Path | None:
    """Return a model's file, from its folder or, for a name, as `from_pretrained` gets it: from the cache, or the hub.

    None where the model has no such file. Raises ConfigError where a file that is needed can't be had: offline, what is
    not in the cache may be missing there, or nowhere.
    """
    if Path(source).is_dir():
        path = Path(source, name)
        return path if path.is_file() else None
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ConfigError(
            f"there is no folder '{source}', and names need the package 'transformers'; pip install 'wantrain[hf]'"
        ) from None
    try:
        return Path(huggingface_hub.hf_hub_download(source, name))
    except errors.LocalEntryNotFoundError as caught:  # itself an EntryNotFoundError
        if is_needed:
            raise _unknown(source, caught) from None
        return None
    except errors.EntryNotFoundError:
        return None
    except (OSError, ValueError) as caught:
        raise _unknown(source, caught) from None


def _unknown(source: str, caught: Exception) -> ConfigError:
    reason = next(iter(str(caught).strip().splitlines()), type(caught).__name__).rstrip(".")
    return ConfigError(
        f"there is no folder '{source}', and no model of that name could be had ({reason}); give a folder, or go online"
    )


def lora_parameters(model: HuggingFaceModel, linears: Iterable[Linear]) -> int:
    """Return how many values the adapters of these matrix products have."""
    rank = model.lora.rank if model.lora is not None else 0
    return sum(rank * (one.inputs + one.outputs) for one in linears if one.name in model.lora_targets)
