"""Text to tokens and back: plain bytes, or any JSON file of the `tokenizers` library.

A tokenizer works on bytes, because that is what files hold: text that is not UTF-8 is data too, and a byte tokenizer
never has to decide what it means.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from wantrain.errors import ConfigError

Tokens = NDArray[np.unsignedinteger[Any]]

BYTES = "bytes"
"""The name of the built-in tokenizer."""


class Tokenizer(Protocol):
    """Turns bytes into token numbers below `vocab_size`, and back into text."""

    @property
    def vocab_size(self) -> int:
        """One more than the greatest token."""

    @property
    def identity(self) -> str:
        """What tells this tokenizer from every other; part of the key under which tokens are cached."""

    def encode(self, data: bytes) -> Tokens:
        """Return the tokens of a piece of a document."""

    def decode(self, tokens: list[int]) -> str:
        """Return the text of some tokens; what is not text comes out as U+FFFD."""


class ByteTokenizer:
    """A token is a byte."""

    vocab_size = 256
    identity = BYTES

    def encode(self, data: bytes) -> Tokens:
        """Return the bytes themselves, without a copy."""
        return np.frombuffer(data, dtype=np.uint8)

    def decode(self, tokens: list[int]) -> str:
        """Return the text; half a character at either end comes out as U+FFFD."""
        return bytes(tokens).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A tokenizer file of the `tokenizers` library; no special tokens are added."""

    def __init__(self, path: Path) -> None:
        text = _read_json(path)
        try:
            import tokenizers
        except ImportError:
            raise ConfigError(
                f"tokenizer {path} needs the package 'tokenizers', which is not installed; "
                f"pip install 'wantrain[tokenizers]', or use tokenizer = \"{BYTES}\""
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as caught:  # noqa: BLE001 - the library raises the bare class
            raise ConfigError(f"tokenizer {path} is not a file of the tokenizers library ({caught})") from None
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0) + 1
        self.identity = xxhash.xxh3_64_hexdigest(text.encode())

    def encode(self, data: bytes) -> Tokens:
        """Return the tokens of UTF-8 text; bytes that are not UTF-8 become U+FFFD."""
        ids = self._tokenizer.encode(data.decode("utf-8", errors="replace"), add_special_tokens=False).ids
        return np.asarray(ids, dtype=np.uint32)

    def decode(self, tokens: list[int]) -> str:
        """Return the text, special tokens left out."""
        return str(self._tokenizer.decode(tokens))


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer called "bytes", or the one in a JSON file; raise ConfigError where there is none."""
    return ByteTokenizer() if name == BYTES else JsonTokenizer(Path(name))


def _read_json(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except OSError as caught:
        raise ConfigError(
            f'can\'t read tokenizer {path} ({caught.strerror}, expected "{BYTES}" or a JSON file); check the path'
        ) from None
    except ValueError:
        raise ConfigError(
            f"tokenizer {path} is not JSON (expected a file that the tokenizers library saved); check the path"
        ) from None
    return text
