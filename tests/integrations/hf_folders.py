"""Tiny models of every family with random weights, as folders that save_pretrained wrote, and a tiny tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

VOCABULARY, SEQ_LEN, NUM_BLOCKS = 300, 24, 3

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

TEXT = "\n".join(f"the {n} workers of site {n % 7} hold {n * n % 13} stages each, and send them on" for n in range(400))


def config_of(family: str, **changes: Any) -> Any:
    """Return a tiny configuration: some tied, some with windows shorter than a sample, heads of odd width."""
    if family == "gpt2":
        given = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": NUM_BLOCKS, "n_head": 4, "n_positions": 64}
        tokens = {"bos_token_id": 0, "eos_token_id": 0}
        dropout = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
        return transformers.GPT2Config(**given | tokens | dropout | changes)
    if family == "llama":
        return transformers.LlamaConfig(**_SIZES | changes)
    if family == "qwen2":
        return transformers.Qwen2Config(**_SIZES | {"tie_word_embeddings": True} | changes)
    if family == "qwen3":
        windows = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
        return transformers.Qwen3Config(**_SIZES | {"head_dim": 16} | windows | changes)
    return transformers.MistralConfig(**_SIZES | {"sliding_window": 6} | changes)


FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "mistral")


def write_model(folder: Path, family: str, shard_size: str = "5GB", **changes: Any) -> Path:
    """Write a model with random weights."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, **changes))
    for parameter in model.parameters():  # larger than new ones, so that every part has a say
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def write_tokenizer(folder: Path) -> Any:
    """Train a byte-level BPE tokenizer on a little text, and write it into a model's folder."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXT.splitlines(), vocab_size=VOCABULARY, special_tokens=["<end>"], show_progress=False)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>")
    wrapped.save_pretrained(folder)
    return wrapped


def whole(folder: Path, attention: str = "sdpa") -> Any:
    """Return the model as transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found
