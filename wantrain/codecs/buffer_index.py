"""What a checkpoint says about one message buffer: which entries it held, and where their bytes are.

    checkpoints/step-00000100/buffer-0004-sender-0.json       the index
    checkpoints/step-00000100/buffer-0004-sender-0.entries    entries that had no place in the buffer's file
    buffers/buffer-0004-sender-0.slots                        the buffer's file, which goes on changing: but not in
                                                              slots that a kept index names

The manifest holds the index's checksum, the index that of every entry.
"""

from __future__ import annotations

from typing import NamedTuple, Self

from pydantic import Field, model_validator

from wantrain.fact import Fact


class Record(NamedTuple):
    """One entry of an index. `place`: its slot in the buffer's file, or -1 - i for the i-th beside the index."""

    sample: int
    sequence: int
    digest: int
    checksum: int
    place: int


def buffer_key(layer: int, name: str) -> str:
    """Return what the files of a buffer are called: of the boundary before `layer`, with the name of its side."""
    return f"buffer-{layer:04d}-{name}"


class BufferIndex(Fact):
    """The entries of one message buffer at one step, the one used longest ago first."""

    version: int = Field(default=1, ge=1, le=1)
    layer: int
    name: str
    plan: str
    """Digest of the plan it was made under: a buffer that comes back under the same one is exactly what it was."""
    entry_bytes: int
    samples: list[int]
    sequences: list[int]
    digests: list[int]
    checksums: list[int]
    places: list[int]

    @classmethod
    def of(cls, layer: int, name: str, plan: str, entry_bytes: int, records: list[Record]) -> Self:
        """Return the index of some entries."""
        columns = zip(*records, strict=True) if records else ((), (), (), (), ())
        samples, sequences, digests, checksums, places = (list(column) for column in columns)
        return cls(
            layer=layer,
            name=name,
            plan=plan,
            entry_bytes=entry_bytes,
            samples=samples,
            sequences=sequences,
            digests=digests,
            checksums=checksums,
            places=places,
        )

    @model_validator(mode="after")
    def _columns_fit(self) -> Self:
        lengths = {len(one) for one in (self.samples, self.sequences, self.digests, self.checksums, self.places)}
        if len(lengths) > 1:
            raise ValueError(f"the columns of the index differ in length (got {sorted(lengths)})")
        return self

    @property
    def key(self) -> str:
        """What the buffer's files are called."""
        return buffer_key(self.layer, self.name)

    def records(self) -> list[Record]:
        columns = (self.samples, self.sequences, self.digests, self.checksums, self.places)
        return [Record(*row) for row in zip(*columns, strict=True)]
