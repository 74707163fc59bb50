"""Message buffers in checkpoints: an index of each beside the layers, the entries in the buffers' own files.

Under the plan that it was saved under a buffer comes back as exactly what it was, so that the run goes on with the very
losses. Under another plan a boundary's buffers are filled with what any buffer of that boundary held, of the samples
that this rank will see: sender's and receiver's entries are equal, and the next agreement compares them anyway. What
can't be loaded is never an error: those samples are sent anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from wantrain.codecs.buffer_file import SlotFile
from wantrain.codecs.buffer_index import BufferIndex, Record
from wantrain.codecs.message_buffer import MessageBuffer
from wantrain.errors import CheckpointError
from wantrain.training.checkpoint import CheckpointFolder, read_file, read_manifest, write_file


class _Found(NamedTuple):
    """An entry, and the buffer that saved it."""

    record: Record
    key: str


def save_buffers(buffers: Iterable[MessageBuffer], folder: Path, step: int, plan: str) -> dict[str, str]:
    """Write what has changed, and an index of each buffer into the checkpoint folder; return their checksums.

    `plan` is the plan's digest. Raise CheckpointError where that fails; what earlier checkpoints name is untouched.
    """
    sums = {}
    for buffer in buffers:
        index = buffer.save(folder, step, plan)
        sums[_index_file(buffer.key)] = write_file(folder / _index_file(buffer.key), index.model_dump_json().encode())
    return sums


def keep_claims(buffers: Iterable[MessageBuffer], checkpoints: CheckpointFolder) -> None:
    """Let go of what only checkpoints name that are not kept any more."""
    for buffer in buffers:
        buffer.keep_claims(checkpoints.steps())


def load_buffers(
    buffers: Iterable[MessageBuffer],
    checkpoints: CheckpointFolder,
    step: int,
    plan: str,
    slots: Path,
    is_seen: Callable[[int], bool] = lambda sample: True,
) -> list[str]:
    """Fill empty buffers from the checkpoint of `step`; return a line for each that is not whole.

    `slots` is the folder of the buffers' files, `is_seen` says whether this rank will see a sample.
    """
    lines = []
    for buffer in buffers:
        for kept in sorted(one for one in checkpoints.steps() if one <= step):
            own = _read_index(checkpoints.path_of(kept), buffer.key)
            if own is not None:
                buffer.claim(kept, own)
        folder = checkpoints.path_of(step)
        found = _entries(_indexes(folder, buffer, plan), buffer.key, is_seen)
        num_lost = _fill(buffer, found, folder, slots)
        if num_lost or not found:
            held = f"{num_lost} of {len(found)} entries" if found else "no entries"
            what = "lack or damage" if found else "hold"
            lines.append(f"the checkpoint's files {what} {held} of {buffer.key}; those samples are sent anew")
    return lines


def _index_file(key: str) -> str:
    return f"{key}.json"


def _indexes(folder: Path, buffer: MessageBuffer, plan: str) -> list[BufferIndex]:
    """Return the indexes to fill a buffer from: its own, and the others of its boundary if the plan is another."""
    own = _read_index(folder, buffer.key)
    if own is not None and own.plan == plan:
        return [own] if own.entry_bytes == buffer.entry_bytes else []
    prefix = f"buffer-{buffer.layer:04d}-"
    names = sorted(path.stem for path in folder.glob(f"{prefix}*.json") if path.stem != buffer.key)
    found = [own, *(_read_index(folder, name) for name in names)]
    return [index for index in found if index is not None and index.entry_bytes == buffer.entry_bytes]


def _read_index(folder: Path, key: str) -> BufferIndex | None:
    """Read an index; None where there is none that is whole."""
    try:
        return BufferIndex.model_validate_json(read_file(folder, read_manifest(folder), _index_file(key)))
    except (CheckpointError, ValidationError):
        return None


def _entries(indexes: Sequence[BufferIndex], own_key: str, is_seen: Callable[[int], bool]) -> dict[int, _Found]:
    """Return by sample the entry that was sent most often, the first index's among equals."""
    found: dict[int, _Found] = {}
    for index in indexes:
        for record in index.records():
            so_far = found.get(record.sample)
            if is_seen(record.sample) and (so_far is None or record.sequence > so_far.record.sequence):
                found[record.sample] = _Found(record, index.key)
    return found


def _fill(buffer: MessageBuffer, found: dict[int, _Found], folder: Path, slots: Path) -> int:
    """Put entries into a buffer: those in its own file stay where they are. Return how many can't be had."""
    num_lost = 0
    with ExitStack() as stack:
        files: dict[Path, SlotFile | None] = {}
        for record, key in found.values():
            is_own, is_beside = key == buffer.key, record.place < 0
            if is_own and not is_beside:
                num_lost += not buffer.adopt(record)
                continue
            path = folder / f"{key}.entries" if is_beside else slots / f"{key}.slots"
            if path not in files:
                files[path] = _open(path, buffer.entry_bytes, stack)
            file, slot = files[path], -1 - record.place if is_beside else record.place
            num_lost += file is None or not buffer.copy(record, file, slot, has_home=not is_own)
    return num_lost


def _open(path: Path, entry_bytes: int, stack: ExitStack) -> SlotFile | None:
    try:
        return stack.enter_context(closing(SlotFile(path, entry_bytes, is_read_only=True)))
    except OSError:
        return None
