"""The trigram model that a trained model must beat: counted on the training tokens, judged on the held-out ones.

Probabilities are hierarchical Dirichlet estimates (MacKay and Peto, "A hierarchical Dirichlet language model", 1995):

    p(c | a b) = (n(a b c) + α₃ p(c | b)) / (n(a b) + α₃)
    p(c | b)   = (n(b c)   + α₂ p(c))     / (n(b)   + α₂)
    p(c)       = (n(c)     + 1)           / (n      + vocabulary)

The strengths α₂, α₃ are those of a grid that suit the held-out tokens best, which favours the trigram: nobody can say
that the opponent was made weak.

Only n-grams that occur in the held-out tokens are counted, so memory follows the held-out part and the vocabulary
may be of any size; the training tokens are read once, piece by piece.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wantrain.data import Samples
from wantrain.tokenizer import Tokens

STRENGTHS = tuple(2.0**exponent for exponent in range(-1, 10))
"""Measured: α₃ = 32 suits the standard library's source, 64 tinyshakespeare; α₂ changes the third digit at most."""

PIECE_TOKENS = 1 << 20
"""Chosen: training tokens counted at a time."""

Numbers = NDArray[np.float64]


def trigram_loss(training: Samples, held_out: Samples, vocab_size: int) -> float:
    """Return the trigram's nats per token on the held-out samples' targets, the very ones a model is judged on."""
    places = held_out.target_places(range(len(held_out))).ravel()
    assert places.min() >= 2, "held-out samples come after training ones"
    either = np.concatenate((places, places - 1))  # where an n-gram ends, and where its context ends
    uni, bi = (_Counts(held_out.tokens, either, order, vocab_size) for order in (1, 2))
    tri = _Counts(held_out.tokens, places, 3, vocab_size)
    for start in range(training.start, training.end, PIECE_TOKENS):
        for counts in (uni, bi, tri):
            counts.add(training.tokens[start : min(start + PIECE_TOKENS + counts.order - 1, training.end)])
    (of_c, of_b), (of_bc, of_ab), (of_abc,) = (
        np.split(one.at_places(), parts) for one, parts in ((uni, 2), (bi, 2), (tri, 1))
    )
    p1 = (of_c + 1) / (training.end - training.start + vocab_size)
    p2 = _best(of_bc, of_b, p1)
    p3 = _best(of_abc, of_ab, p2)
    return float(-np.log(p3).mean())


def _best(joint: Numbers, context: Numbers, lower: Numbers) -> Numbers:
    """Return the estimates of one order, from the counts of n-gram and context, at the best strength."""
    estimates = ((joint + strength * lower) / (context + strength) for strength in STRENGTHS)
    return max(estimates, key=lambda p: float(np.log(p).sum()))


class _Counts:
    """How often the n-grams that end at some places of the text occur in the training tokens."""

    def __init__(self, tokens: Tokens, places: NDArray[np.int64], order: int, vocab_size: int) -> None:
        self.order, self._vocab_size = order, vocab_size
        keys = self._number([tokens[places - back] for back in reversed(range(order))])
        self._known, self._index = np.unique(keys, return_inverse=True)
        self._counts = np.zeros(len(self._known), dtype=np.int64)

    def add(self, training: Tokens) -> None:
        count = max(len(training) - self.order + 1, 0)
        keys, counts = np.unique(
            self._number([training[place : place + count] for place in range(self.order)]), return_counts=True
        )
        _, known, found = np.intersect1d(self._known, keys, assume_unique=True, return_indices=True)
        self._counts[known] += counts[found]

    def at_places(self) -> Numbers:
        return self._counts[self._index].astype(np.float64)

    def _number(self, columns: list[Tokens]) -> NDArray[np.int64]:
        """Number n-grams, given as one array per place, in base vocab_size."""
        keys = np.zeros(len(columns[0]), dtype=np.int64)
        for column in columns:
            keys = keys * self._vocab_size + column
        return keys
