"""What a message buffer costs whose file is four times its memory: a run with it beside one in which all fits.

    python benchmarks/bench_buffer.py                    throughput, and the wait per visit at several paces
    python benchmarks/bench_buffer.py --memory-limit     the same in a memory cgroup, so that no page cache helps (root)

A step is played as the pipeline plays it: `batch` visits in a row, each with its share of the forward's seconds (slept,
as on a device) and a change in place of the entry; then the codec's thread asks for the next step's entries while the
backward, twice as long, goes on. What the buffer makes a step longer than that is its wait. The two buffers take turns,
a few steps each, so that what else the machine does hits both.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from harness import append_result, spread
from wantrain.codecs.buffer_file import slot_bytes
from wantrain.codecs.message_buffer import MessageBuffer
from wantrain.units import format_bytes, format_time

RATIO = 4
"""Times the memory tier that the samples take."""

CGROUPS = Path("/sys/fs/cgroup")
BESIDE_BYTES = 128 << 20
"""Memory that the limited process may use beside the buffer's: Python's and torch's working memory."""


class Shape(NamedTuple):
    """What is remembered of one sample, and how often one comes."""

    name: str
    entry_bytes: int
    paces_s: tuple[float, ...]


SHAPES = (
    Shape("GPT-2 XL, 1024 x 1600, bf16", 1024 * 1600 * 2, (0.0, 0.01, 0.02, 0.075)),
    Shape("small GPT, 512 x 800, bf16", 512 * 800 * 2, (0.0, 0.002, 0.005, 0.02)),
)
"""The first is the published shape: 32 samples in a step of 2.4 s, 75 ms each. The others show where it ends."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where the file lies (default: here)")
    parser.add_argument("--slots", type=int, default=128, help="entries in memory")
    parser.add_argument("--batch", type=int, default=32, help="samples per step")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each")
    parser.add_argument("--turns", type=int, default=5, help="in which they are measured")
    parser.add_argument("--memory-limit", action="store_true", help="run in a memory cgroup of the tier's size")
    parser.add_argument("--smoke", action="store_true", help="small and quick, for tests")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    return parser.parse_args()


def batches(num_samples: int, batch: int) -> Iterator[list[int]]:
    """Yield steps' samples for ever, every epoch in an order of its own."""
    source, order = random.Random(0), list[int]()
    while True:
        while len(order) < batch:
            order += source.sample(range(num_samples), num_samples)
        yield order[:batch]
        del order[:batch]


def play_step(
    buffer: MessageBuffer, known: list[Any], samples: list[int], ahead: list[int], pace_s: float
) -> list[Any]:
    """Play one step, and return what is known of the next one's samples."""
    for sample, held in zip(samples, known, strict=True):
        time.sleep(pace_s / 3)
        memory = buffer.new(sample) if held is None else buffer.take(sample)
        memory[:4096].add_(1)
        buffer.done(sample, 1 if held is None else held.sequence + 1, 0)
    upcoming: list[Any] = []
    asking = threading.Thread(target=lambda: upcoming.extend(buffer.known(ahead)))
    asking.start()
    time.sleep(pace_s * 2 / 3 * len(samples))
    asking.join()
    return upcoming


class Player:
    """Plays steps with one buffer, and notes how long they take."""

    def __init__(self, buffer: MessageBuffer, num_samples: int, batch: int) -> None:
        """Visit every sample once, at full speed."""
        self.buffer, self._batch, self._steps = buffer, batch, pairwise(batches(num_samples, batch))
        self._known: list[Any] = [None] * batch
        self.visit_s: list[float] = []
        self.play(-(-num_samples // batch), 0.0)
        self.visit_s.clear()
        self._before = replace(buffer.stats)

    def play(self, num_steps: int, pace_s: float) -> None:
        started_s = time.monotonic()
        for samples, ahead in islice(self._steps, num_steps):
            self._known = play_step(self.buffer, self._known, samples, ahead, pace_s)
        self.visit_s.append((time.monotonic() - started_s) / (num_steps * self._batch))

    def moved_bytes(self, num_visits: int) -> float:
        """Return what was read and written per visit."""
        before, now = self._before, self.buffer.stats
        assert now.num_forgotten == now.num_damaged == 0, "every sample has room"
        return (now.bytes_read - before.bytes_read + now.bytes_written - before.bytes_written) / num_visits


def compare(shape: Shape, pace_s: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a run whose samples take RATIO times the memory tier, and one of as many in which all fits."""
    num_samples, slot = arguments.slots * RATIO, slot_bytes(shape.entry_bytes)
    ram_bytes, turn, batch = arguments.slots * slot, arguments.steps // arguments.turns, arguments.batch
    with ExitStack() as stack:
        whole = stack.enter_context(closing(MessageBuffer(1, shape.entry_bytes, ram_bytes=num_samples * slot)))
        fits = Player(whole, num_samples, batch)
        stack.enter_context(memory_limit(ram_bytes + BESIDE_BYTES if arguments.memory_limit else None))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder)))
        part = MessageBuffer(1, shape.entry_bytes, ram_bytes=ram_bytes, folder=folder, file_bytes=num_samples * slot)
        streams = Player(stack.enter_context(closing(part)), num_samples, batch)
        for _ in range(arguments.turns):
            fits.play(turn, pace_s)
            streams.play(turn, pace_s)
        return {
            "shape": shape.name,
            "entry_bytes": shape.entry_bytes,
            "pace_s": pace_s,
            "fits_s": spread(fits.visit_s),
            "streams_s": spread(streams.visit_s),
            "moved_bytes": streams.moved_bytes(arguments.turns * turn * batch),
            "is_direct": part.reads_past_the_page_cache,
            "speed": median(fits.visit_s) / median(streams.visit_s),
        }


@contextmanager
def memory_limit(num_bytes: int | None) -> Iterator[None]:
    """Run in a memory cgroup: what is allocated or cached from here on counts."""
    if num_bytes is None:
        yield
        return
    is_v1 = (CGROUPS / "memory").is_dir()
    top = CGROUPS / "memory" if is_v1 else CGROUPS
    group = top / f"wantrain-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if is_v1 else "memory.max")).write_text(str(num_bytes))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (top / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def line(found: dict[str, Any]) -> str:
    fits_s, streams_s, moved_bytes = found["fits_s"]["median"], found["streams_s"]["median"], found["moved_bytes"]
    columns = (
        f"pace {format_time(found['pace_s']):>7}",
        f"fits {format_time(fits_s):>8} a visit",
        f"streams {format_time(streams_s):>8}",
        f"waits {format_time(max(0.0, streams_s - fits_s)):>8}",
        f"moves {format_bytes(moved_bytes):>8}, {moved_bytes / streams_s / 1e9:.2f} GB/s",
        f"speed {found['speed']:.1%}",
    )
    return "  " + "   ".join(columns)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    shapes: tuple[Shape, ...] = SHAPES
    if arguments.smoke:
        arguments.slots, arguments.batch, arguments.steps, arguments.turns = 8, 4, 4, 2
        shapes = (Shape("smoke", 10_000, (0.0, 0.002)),)
    for shape in shapes:
        print(f"{shape.name}: {format_bytes(shape.entry_bytes)} each, {arguments.slots} of {RATIO} x as many in memory")
        for pace_s in shape.paces_s:
            found = compare(shape, pace_s, arguments)
            print(line(found), flush=True)
            if arguments.save:
                options = {"slots": arguments.slots, "batch": arguments.batch, "limited": arguments.memory_limit}
                append_result("buffer", found | options)


if __name__ == "__main__":
    main()
