"""A stand-in for the codec: visits samples as training does, and knows what each buffer's entries must be."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import xxhash

from wantrain.codecs.buffer_file import slot_bytes
from wantrain.codecs.message_buffer import Known, MessageBuffer

ENTRY_BYTES = 5000
"""Not a multiple of the slots' alignment."""

SLOT = slot_bytes(ENTRY_BYTES)


def digest_of(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


def content(sample: int, sequence: int, salt: int) -> bytes:
    return random.Random(f"{sample}/{sequence}/{salt}").randbytes(ENTRY_BYTES)


class Visitor:
    """Uses a buffer, and checks that what it says and gives is what was last put there."""

    def __init__(self, buffer: MessageBuffer, salt: int = 0) -> None:
        self.buffer = buffer
        self.truth: dict[int, tuple[int, bytes]] = {}
        self.first_visits: list[int] = []
        self.salt = salt

    def visit(self, sample_ids: Sequence[int], ahead: Sequence[int] = ()) -> list[Known | None]:
        """Carry out a step; the next one's samples are announced when it begins. Return what was known."""
        known = self.buffer.known(sample_ids)
        self.buffer.announce([*sample_ids, *ahead])
        for sample, held in zip(sample_ids, known, strict=True):
            self._use(sample, held)
        return known

    def _use(self, sample: int, held: Known | None) -> None:
        if held is None:
            memory, sequence = self.buffer.new(sample), 1
            self.first_visits.append(sample)
        else:
            sequence, data = self.truth[sample]
            assert held == Known(sequence, digest_of(data))
            memory = self.buffer.take(sample)
            assert bytes(memory.numpy()) == data
            sequence += 1
        self.salt += 1
        data = content(sample, sequence, self.salt)
        memory.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self.truth[sample] = sequence, data
        self.buffer.done(sample, sequence, digest_of(data))


def batches_of(num_samples: int, batch_size: int, num_steps: int, seed: int = 0) -> list[list[int]]:
    """Return so many steps' samples and one more, every epoch in an order of its own."""
    order: list[int] = []
    epoch = 0
    while len(order) < (num_steps + 1) * batch_size:
        order += random.Random(f"{seed}/{epoch}").sample(range(num_samples), num_samples)
        epoch += 1
    return [order[at : at + batch_size] for at in range(0, (num_steps + 1) * batch_size, batch_size)]


def steps_of(num_samples: int, batch_size: int, num_steps: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield each step's samples and the next one's."""
    yield from pairwise(batches_of(num_samples, batch_size, num_steps))


def buffer_with(ram: int, file: int = 0, folder: Path | None = None, **options: Any) -> MessageBuffer:
    """Return a buffer with so many slots in memory and in the file."""
    return MessageBuffer(4, ENTRY_BYTES, ram_bytes=ram * SLOT, file_bytes=file * SLOT, folder=folder, **options)
