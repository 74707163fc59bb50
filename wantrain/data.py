"""Training text as samples with stable ids, for text of any size.

    text ─► documents, ordered by a hash of their names ─► tokenizer ─► token file, memory-mapped
    token file = [ 64-byte header | training tokens ……………… | held-out tail ]
    sample i   = tokens [i·seq, i·seq + seq], one more than seq: inputs and the targets one place on

The order by hash makes the tail a random sample of documents rather than whatever the alphabet puts last. The token
file is built in one streaming pass, written aside and renamed: a second process that builds it at the same moment ends
with the same bytes. Its digest lets ranks check that they hold the same data.

A sample belongs to one of `num_lanes` lanes for good, and a batch is a fixed draw from every lane. Which replica takes
which lanes is the plan's business and changes no number. The shuffle is a permutation that is computed, not stored (a
Feistel network with cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002), so the
step number alone says what is drawn: nothing to keep in memory, nothing to restore on resume.
"""

from __future__ import annotations

import os
import struct
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from wantrain.config import DataConfig
from wantrain.errors import ConfigError, DataError
from wantrain.hf_model import Model
from wantrain.model_config import ModelConfig
from wantrain.tokenizer import Tokenizer, Tokens, load_tokenizer

STDLIB = "stdlib"
"""The source that every machine has: the Python files of the running Python's standard library, its tests left out."""

PIECE_BYTES = 1 << 20
"""Chosen: text read and tokenized at a time; large enough for numpy, small enough for any memory."""

_HEADER = struct.Struct("<8sQQQQ24x")
_MAGIC = b"wantok01"
_NOT_TEXT_OF_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """A text file of the source."""

    name: str
    """Its path within the source; it decides the order, so that moving the source changes nothing."""
    path: Path


def find_documents(source: str) -> list[Document]:
    """List the source's text files in the order of a hash of their names; binary and hidden files are left out."""
    is_stdlib = source == STDLIB
    root = Path(sysconfig.get_path("stdlib")) if is_stdlib else Path(source).expanduser()
    if root.is_file():
        return [Document(root.name, root)]
    if not root.is_dir():
        raise DataError(f'data {source!r} doesn\'t exist (expected "{STDLIB}", a file or a folder); check the path')
    paths = _walk(root, _NOT_TEXT_OF_STDLIB if is_stdlib else frozenset())
    found = [
        Document(path.relative_to(root).as_posix(), path) for path in paths if path.suffix == ".py" or not is_stdlib
    ]
    return sorted(found, key=lambda one: (xxhash.xxh3_64_intdigest(_name_bytes(one.name)), one.name))


def _walk(root: Path, left_out: frozenset[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        paths = (Path(folder, name) for name in files if not name.startswith("."))
        yield from (path for path in paths if path.is_file())  # no pipes, no links to nowhere


def _name_bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def read_pieces(document: Document) -> Iterator[bytes]:
    """Yield a text file piece by piece, cut after a line's end where there is one; yield nothing for a binary file."""
    try:
        with document.path.open("rb") as file:
            rest = b""
            while piece := file.read(PIECE_BYTES):
                if not rest and file.tell() == len(piece) and b"\0" in piece[:8192]:
                    return
                whole, newline, rest = (rest + piece).rpartition(b"\n")
                yield from (part for part in (whole + newline,) if part)
                if len(rest) >= PIECE_BYTES:
                    yield rest
                    rest = b""
            if rest:
                yield rest
    except OSError as caught:
        raise DataError(f"can't read {document.path} ({caught.strerror}); make it readable or take it out") from None


class TokenFile:
    """The tokens of a text, memory-mapped; built once per text and tokenizer, then found in the cache folder."""

    def __init__(self, path: Path, validation_fraction: float) -> None:
        """Map the token file at `path`; raise DataError where it is not a whole one."""
        with path.open("rb") as file:
            fields = file.read(_HEADER.size).ljust(_HEADER.size)
        magic, item_bytes, self.vocab_size, num_tokens, digest = _HEADER.unpack(fields)
        if magic != _MAGIC or path.stat().st_size != _HEADER.size + item_bytes * num_tokens:
            raise DataError(f"{path} is not a whole token file; delete it")
        self.digest = f"{digest:016x}"
        """xxh3 of the tokens: equal on every rank that holds the same data."""
        self.tokens: Tokens = np.memmap(path, dtype=f"<u{item_bytes}", mode="r", offset=_HEADER.size)
        self._num_training = num_tokens - round(num_tokens * validation_fraction)

    @classmethod
    def open(cls, config: DataConfig, cache: Path) -> Self:
        """Return the token file of a text, built in the folder `cache` if it is not there yet."""
        tokenizer = load_tokenizer(config.tokenizer)
        documents = find_documents(config.source)
        path = cache / f"{_key(documents, tokenizer)}.tokens"
        if not path.exists():
            build_token_file(documents, tokenizer, path, config.source)
        return cls(path, config.validation_fraction)

    def training(self, config: Model) -> Samples:
        """Return the samples to train on; raise an error where the text doesn't suit the model."""
        return self._samples(0, self._num_training, config, "training text")

    def validation(self, config: Model) -> Samples:
        """Return the held-out samples; raise an error where the text doesn't suit the model."""
        return self._samples(self._num_training, len(self.tokens), config, "held-out tail of the text")

    def _samples(self, start: int, end: int, config: Model, what: str) -> Samples:
        if self.vocab_size > config.vocab_size:
            is_gpt = isinstance(config, ModelConfig)
            remedy = f"set model.vocab_size = {self.vocab_size}" if is_gpt else "use the model's own tokenizer"
            raise ConfigError(
                f"the tokenizer has more tokens than the model (got {self.vocab_size}, "
                f"expected at most {config.vocab_size}); {remedy}"
            )
        if end - start <= config.seq_len:
            raise DataError(
                f"the {what} is shorter than a sample (got {end - start} tokens, expected at least "
                f"{config.seq_len + 1}); give more text or lower model.seq_len"
            )
        return Samples(self.tokens, start, end, config.seq_len)


@dataclass(frozen=True)
class Samples:
    """Windows of seq_len + 1 tokens over tokens [start, end): sample i is always the same tokens.

    They begin `stride` times seq_len apart: 1 for all of the text, more for a part spread evenly over it.
    """

    tokens: Tokens
    start: int
    end: int
    seq_len: int
    stride: int = 1

    def __len__(self) -> int:
        return ((self.end - self.start - 1) // self.seq_len - 1) // self.stride + 1

    def batch(self, sample_ids: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return inputs and targets, int64 [samples, seq]; the caller owns both."""
        places = self.target_places(sample_ids)
        return self.tokens[places - 1].astype(np.int64), self.tokens[places].astype(np.int64)

    def target_places(self, sample_ids: Sequence[int]) -> NDArray[np.int64]:
        """Return where in the token file the targets are, [samples, seq]."""
        starts = self.start + np.asarray(sample_ids, dtype=np.int64)[:, None] * (self.seq_len * self.stride)
        return starts + np.arange(1, self.seq_len + 1)

    def spread(self, num_samples: int) -> Samples:
        """Return at most so many of the samples, spread evenly over the text; the same ones every time."""
        stride = max(1, len(self) // num_samples)
        spread = replace(self, stride=self.stride * stride)
        return replace(spread, end=spread.start + _span(spread, min(num_samples, len(spread))))

    def first(self, num_samples: int) -> Samples:
        """Return the first samples only."""
        return replace(self, end=self.start + _span(self, min(num_samples, len(self))))


def _span(samples: Samples, count: int) -> int:
    """Return how many tokens the first `count` samples reach over."""
    return ((count - 1) * samples.stride + 1) * samples.seq_len + 1


def _key(documents: Sequence[Document], tokenizer: Tokenizer) -> str:
    """Return a name that changes with any document's name, size or time of change, and with the tokenizer."""
    state = xxhash.xxh3_128(_MAGIC + tokenizer.identity.encode())
    for document in documents:
        stat = document.path.stat()
        state.update(_name_bytes(f"{document.path}\0{stat.st_size}\0{stat.st_mtime_ns}\n"))
    return state.hexdigest()


def build_token_file(documents: Sequence[Document], tokenizer: Tokenizer, path: Path, source: str) -> None:
    """Tokenize the documents into a token file, in one pass; it appears at `path` whole or not at all."""
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            aside = Path(file.name)
            if not _write(file, documents, tokenizer):
                raise DataError(
                    f"data {source!r} holds no text ({len(documents)} files, none with text); check the path"
                )
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as caught:
        raise DataError(
            f"can't write the token file {path} ({caught.strerror}); free space or choose another"
        ) from None
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)


def _write(file: IO[bytes], documents: Sequence[Document], tokenizer: Tokenizer) -> int:
    """Write header and tokens; return the number of tokens."""
    item_bytes = next(size for size in (1, 2, 4) if tokenizer.vocab_size <= 256**size)
    file.write(bytes(_HEADER.size))
    num_tokens, digest = 0, xxhash.xxh3_64()
    for document in documents:
        for piece in read_pieces(document):
            data = tokenizer.encode(piece).astype(f"<u{item_bytes}").tobytes()
            digest.update(data)
            file.write(data)
            num_tokens += len(data) // item_bytes
    file.seek(0)
    file.write(_HEADER.pack(_MAGIC, item_bytes, tokenizer.vocab_size, num_tokens, digest.intdigest()))
    return num_tokens


class Lanes:
    """Which samples each step draws, lane by lane, from the step number alone.

    Sample s is in lane s mod num_lanes. Each lane goes through its samples in an order of its own, a new one every
    epoch, and every sample once per epoch.
    """

    def __init__(self, num_samples: int, num_lanes: int, seed: int) -> None:
        if num_samples < num_lanes:
            raise DataError(
                f"the text has too few samples for its lanes (got {num_samples}, expected {num_lanes} or more)"
            )
        self.num_samples, self.num_lanes, self.seed = num_samples, num_lanes, seed

    def draw(self, step: int, batch_size: int) -> list[list[int]]:
        """Return the sample ids of a step (from 0), batch_size / num_lanes for each lane."""
        if batch_size % self.num_lanes:
            raise ConfigError(f"batch_size must be a multiple of num_lanes (got {batch_size} and {self.num_lanes})")
        share = batch_size // self.num_lanes
        turns = range(step * share, (step + 1) * share)
        return [[self._sample(lane, turn) for turn in turns] for lane in range(self.num_lanes)]

    def _sample(self, lane: int, turn: int) -> int:
        size = (self.num_samples - lane - 1) // self.num_lanes + 1
        epoch, place = divmod(turn, size)
        key = xxhash.xxh3_64_intdigest(f"{self.seed}/{lane}/{epoch}".encode())
        return lane + self.num_lanes * permute(place, size, key)


FEISTEL_ROUNDS = 4
"""Chosen: four rounds make a strong pseudo-random permutation of a good round function (Luby and Rackoff, 1988)."""


def permute(place: int, size: int, key: int) -> int:
    """Return where a pseudo-random permutation of range(size) takes `place`, in constant time and memory.

    The network permutes a power of four ≥ size, less than 4·size; walking on until the result is in range keeps it a
    permutation.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = place >> half_bits, place & mask
        for round_number in range(FEISTEL_ROUNDS):
            mixed = xxhash.xxh3_64_intdigest(right.to_bytes(8, "little"), key + round_number & 2**64 - 1)
            left, right = right, left ^ (mixed & mask)
        place = left << half_bits | right
        if place < size:
            return place
