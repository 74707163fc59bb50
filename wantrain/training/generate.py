"""Text from a trained model, in one process: token by token, each drawn from the model's own prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from wantrain.errors import ConfigError


def generate(
    layers: Sequence[nn.Module],
    prompt_tokens: Sequence[int],
    num_tokens: int,
    *,
    seq_len: int,
    temperature: float = 0.8,
    top_k: int | None = 40,
    seed: int = 0,
) -> list[int]:
    """Return `num_tokens` tokens that follow the prompt (see `stream`)."""
    chosen = stream(layers, prompt_tokens, seq_len=seq_len, temperature=temperature, top_k=top_k, seed=seed)
    return [token for _, token in zip(range(num_tokens), chosen, strict=False)]


@torch.inference_mode()
def stream(
    layers: Sequence[nn.Module],
    prompt_tokens: Sequence[int],
    *,
    seq_len: int,
    temperature: float = 0.8,
    top_k: int | None = 40,
    seed: int = 0,
) -> Iterator[int]:
    """Yield token after token without end; `layers` is the whole model, and the last `seq_len` tokens are its context.

    Temperature 0 takes the most probable token. `top_k` draws among the k most probable only; None among all. Dropout
    is off while it runs. Raises ConfigError for an empty prompt or a setting that makes no sense.
    """
    _check(prompt_tokens, temperature, top_k)
    device = next(layers[0].parameters()).device
    generator = torch.Generator().manual_seed(seed)
    modules = nn.Sequential(*layers).eval()
    context = list(prompt_tokens)[-seq_len:]
    while True:
        logits = modules(torch.tensor([context], device=device))[0, -1].float().cpu()
        token = _draw(logits, temperature, top_k, generator)
        context = [*context, token][-seq_len:]
        yield token


def _check(prompt_tokens: Sequence[int], temperature: float, top_k: int | None) -> None:
    if not prompt_tokens:
        raise ConfigError("the prompt is empty (got 0 tokens, expected at least 1); give some text")
    if temperature < 0:
        raise ConfigError(f"temperature must not be negative (got {temperature}); 0 takes the most probable token")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k must be at least 1 (got {top_k}); leave it out to draw among all tokens")


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    values, tokens = logits.topk(min(top_k or len(logits), len(logits)))
    probabilities = torch.softmax(values / temperature, dim=0)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
