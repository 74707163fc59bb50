import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from wantrain.errors import ConfigError
from wantrain.model_config import ModelConfig
from wantrain.models import gpt
from wantrain.training.generate import generate, stream

CONFIG = ModelConfig(num_layers=1, hidden=16, num_heads=2, seq_len=8, vocab_size=32)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread: for models this small, handing work out costs more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def counting(one_thread: None) -> list[nn.Module]:
    """A model that has learned to count: each token is the one before it plus one."""
    layers = gpt.build_layers(CONFIG, 0, 3, 0)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = (torch.arange(32)[:, None] + torch.arange(8)) % 32
    for _ in range(150):
        optimizer.zero_grad()
        gpt.loss(model(inputs), (inputs + 1) % 32).backward()
        optimizer.step()
    return layers


def test_what_was_learned_goes_on_past_the_context(counting: list[nn.Module]) -> None:
    expected = [(5 + i) % 32 for i in range(40)]
    assert generate(counting, [3, 4], 40, seq_len=8, temperature=0) == expected


def test_a_seed_gives_one_text_and_another_seed_another() -> None:
    layers = gpt.build_layers(CONFIG, 0, 3, 0)
    texts = [generate(layers, [1], 30, seq_len=8, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_top_1_is_the_most_probable_token(counting: list[nn.Module]) -> None:
    greedy = generate(counting, [9], 12, seq_len=8, temperature=0)
    assert generate(counting, [9], 12, seq_len=8, temperature=5.0, top_k=1) == greedy


def test_high_temperature_without_top_k_reaches_most_tokens() -> None:
    layers = gpt.build_layers(CONFIG, 0, 3, 0)
    drawn = generate(layers, [1], 300, seq_len=8, temperature=100.0, top_k=None)
    assert len(set(drawn)) > 28


def test_a_stream_needs_no_length(counting: list[nn.Module]) -> None:
    tokens = stream(counting, [0], seq_len=8, temperature=0)
    assert list(itertools.islice(tokens, 3)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "temperature", "top_k", "message"),
    [
        ([], 1.0, 5, "prompt is empty"),
        ([1], -1.0, 5, "temperature must not be negative"),
        ([1], 1.0, 0, "top_k must be at least 1"),
    ],
)
def test_settings_without_sense_are_one_line(prompt: list[int], temperature: float, top_k: int, message: str) -> None:
    layers = gpt.build_layers(CONFIG, 0, 3, 0)
    with pytest.raises(ConfigError, match=message):
        generate(layers, prompt, 1, seq_len=8, temperature=temperature, top_k=top_k)
