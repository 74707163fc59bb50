"""A `datasets` data set and a tokenizer, as samples with stable ids: what `wt.Trainer` takes its batches from.

Texts follow one another in the data set's order, each ended by an end-of-text token where there is one, and are cut
into windows as the text of a run file is (`data.py`). So any data set that gives the same texts gives the same samples,
loaded or streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from wantrain.data import Samples
from wantrain.errors import ConfigError, DataError
from wantrain.fact import unwritable

_AT_ONCE = 1000
"""Chosen: texts that are tokenized together; the library spreads them over its threads."""

Dataset = Iterable[Mapping[str, Any]]


def samples(
    dataset: Dataset, tokenizer: Any, seq_len: int, *, column: str = "text", end_of_text: str | None = None
) -> Samples:
    """Return a data set's texts as samples of `seq_len` tokens and their targets.

    `dataset` is one of `datasets`, streamed ones too, or any iterable of rows; `tokenizer` one of `transformers` or of
    `tokenizers`. `end_of_text` is the token that ends a text (default: what a tokenizer of transformers says, or
    none). Raises ConfigError for a column that isn't there or a token that is none, DataError for too little text.
    """
    encode, end = _encoder(tokenizer, end_of_text)
    found = [np.asarray([*ids, *end], dtype=np.uint32) for ids in _encoded(_texts(dataset, column), encode)]
    tokens = np.concatenate(found) if found else np.zeros(0, dtype=np.uint32)
    if len(tokens) <= seq_len:
        raise DataError(
            f"the data set is shorter than a sample (got {len(tokens)} tokens, expected at least {seq_len + 1});"
            " give more text or lower seq_len"
        )
    return Samples(tokens, 0, len(tokens), seq_len)


def write_texts(dataset: Dataset, path: str | Path, *, column: str = "text") -> int:
    """Write a data set's texts as one file, a blank line between, for a run file's [data] source; return how many."""
    path, count = Path(path), 0
    try:
        with path.open("w", encoding="utf-8") as file:
            for text in _texts(dataset, column):
                file.write(text.rstrip("\n") + "\n\n")
                count += 1
    except OSError as caught:
        raise unwritable(path, caught) from None
    return count


def _texts(dataset: Dataset, column: str) -> Iterator[str]:
    for row in dataset:
        if column not in row:
            raise ConfigError(f"the data set has no column '{column}' (it has {', '.join(row)}); name another")
        yield row[column]


def _encoded(texts: Iterator[str], encode: Callable[[list[str]], list[list[int]]]) -> Iterator[list[int]]:
    while some := list(islice(texts, _AT_ONCE)):
        yield from encode(some)


def _encoder(tokenizer: Any, end_of_text: str | None) -> tuple[Callable[[list[str]], list[list[int]]], list[int]]:
    """Return what turns texts into tokens, and what ends a text."""
    if hasattr(tokenizer, "encode_batch"):
        known = tokenizer.get_vocab()
        end = _end(end_of_text, known)
        return lambda texts: [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)], end
    if hasattr(tokenizer, "eos_token"):
        end = _end(end_of_text or tokenizer.eos_token, tokenizer.get_vocab())
        return lambda texts: list(tokenizer(texts, add_special_tokens=False)["input_ids"]), end
    raise ConfigError(
        f"expected a tokenizer of transformers or of tokenizers (got {type(tokenizer).__name__}); give one of them"
    )


def _end(token: str | None, vocabulary: Mapping[str, int]) -> list[int]:
    if token is None:
        return []
    if token not in vocabulary:
        raise ConfigError(f"the tokenizer has no token '{token}' to end texts with; name another")
    return [vocabulary[token]]
