import math
from collections import Counter

import numpy as np
import pytest

from wantrain import trigram
from wantrain.data import Samples
from wantrain.tokenizer import Tokens
from wantrain.trigram import STRENGTHS, trigram_loss

VOCABULARY = 5


def random_text(length: int, seed: int) -> Tokens:
    """Return tokens each of which depends on the two before it."""
    generator, text = np.random.default_rng(seed), [0, 1]
    for _ in range(length - 2):
        favourite = (text[-1] * 2 + text[-2]) % VOCABULARY
        text.append(favourite if generator.random() < 0.7 else int(generator.integers(VOCABULARY)))
    return np.array(text, dtype=np.uint8)


def split(text: Tokens, num_training: int, seq_len: int = 10) -> tuple[Samples, Samples]:
    return Samples(text, 0, num_training, seq_len), Samples(text, num_training, len(text), seq_len)


def counted_by_hand(training: Samples, held_out: Samples) -> float:
    """Return the same loss from dictionaries and the formulas as they are printed."""
    text = training.tokens.tolist()
    kept = text[: training.end]
    counts = [Counter(tuple(kept[i : i + n]) for i in range(len(kept) - n + 1)) for n in (1, 2, 3)]
    places = held_out.target_places(range(len(held_out))).ravel()

    def joint_and_context(place: int, order: int) -> tuple[int, int]:
        gram = tuple(text[place - order + 1 : place + 1])
        return counts[order - 1][gram], counts[order - 2][gram[:-1]]

    estimates = [(counts[0][(text[place],)] + 1) / (len(kept) + VOCABULARY) for place in places]
    for order in (2, 3):
        pairs = [joint_and_context(place, order) for place in places]
        estimates = max(
            ([(n + a * p) / (c + a) for (n, c), p in zip(pairs, estimates, strict=True)] for a in STRENGTHS),
            key=lambda ps: sum(map(math.log, ps)),
        )
    return -sum(map(math.log, estimates)) / len(estimates)


@pytest.mark.parametrize("piece", [7, 64, 1 << 20])
def test_loss_is_the_formula_whatever_the_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trigram, "PIECE_TOKENS", piece)
    training, held_out = split(random_text(600, 0), 450)
    assert trigram_loss(training, held_out, VOCABULARY) == pytest.approx(counted_by_hand(training, held_out), rel=1e-12)


def test_loss_is_near_the_entropy_of_text_made_by_a_trigram() -> None:
    training, held_out = split(random_text(60_000, 1), 50_000)
    likely, unlikely = 0.7 + 0.3 / VOCABULARY, 0.3 / VOCABULARY
    entropy = -likely * math.log(likely) - (VOCABULARY - 1) * unlikely * math.log(unlikely)
    assert trigram_loss(training, held_out, VOCABULARY) == pytest.approx(entropy, abs=0.03)


def test_unseen_tokens_are_improbable_not_impossible() -> None:
    text = np.array([0, 1] * 100 + [4] * 50, dtype=np.uint8)
    loss = trigram_loss(*split(text, 200), VOCABULARY)
    assert math.log(VOCABULARY) < loss < math.inf


def test_only_the_given_samples_are_judged() -> None:
    text = np.concatenate((random_text(2000, 2), np.zeros(500, dtype=np.uint8)))
    training, held_out = split(text, 1900)
    assert trigram_loss(training, held_out.first(8), VOCABULARY) != trigram_loss(training, held_out, VOCABULARY)


def test_a_large_vocabulary_takes_no_table_of_its_cube() -> None:
    text = np.random.default_rng(3).integers(0, 100_000, 3000).astype(np.uint32)
    loss = trigram_loss(*split(text, 2500), 100_000)
    assert loss == pytest.approx(math.log(100_000), abs=1.0)
