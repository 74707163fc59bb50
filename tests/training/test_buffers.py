import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from tests.codecs.buffers import SLOT, Visitor, batches_of, buffer_with, steps_of
from wantrain.codecs.message_buffer import Known, MessageBuffer
from wantrain.errors import CheckpointError
from wantrain.training.buffers import keep_claims, load_buffers, save_buffers
from wantrain.training.checkpoint import CheckpointFolder, Manifest

ROOT = Path(__file__).resolve().parents[2]


class Run:
    """A run directory, its checkpoints, and the buffers that are opened in it."""

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path, self.slots = path, path / "buffers"
        self.checkpoints = CheckpointFolder(path / "checkpoints", keep)

    def save(self, step: int, *buffers: MessageBuffer, plan: str = "a") -> None:
        sums = save_buffers(buffers, self.checkpoints.begin(step), step, plan)
        self.checkpoints.finish(Manifest(step=step, num_layers=1, seed=0, model={}, tokenizer="bytes", files=sums))
        keep_claims(buffers, self.checkpoints)

    def load(self, buffer: MessageBuffer, plan: str = "a", lane: int | None = None) -> list[str]:
        step = self.checkpoints.steps()[0]
        is_seen = (lambda _: True) if lane is None else (lambda sample: sample % 2 == lane)
        return load_buffers([buffer], self.checkpoints, step, plan, self.slots, is_seen)

    def copied(self, to: Path) -> "Run":
        shutil.copytree(self.path, to)
        return Run(to)

    @contextmanager
    def buffers(self, *names: str, ram: int = 3, file: int = 60) -> Iterator[list[MessageBuffer]]:
        with ExitStack() as stack:
            made = [buffer_with(ram, file, self.slots, name=name, on_problem=print) for name in names]
            yield [stack.enter_context(closing(buffer)) for buffer in made]


def held(buffer: MessageBuffer, num_samples: int) -> list[Known | None]:
    """Return what a buffer holds of each sample, a few at a time; each is looked at and put back."""
    found: list[Known | None] = []
    for sample in range(num_samples):
        found += buffer.known([sample])
        if found[-1] is None:
            buffer.forget([sample])
        else:
            buffer.take(sample)
            buffer.done(sample, *found[-1])
    return found


@pytest.mark.parametrize(("ram", "file"), [(3, 60), (40, 0), (9, 0), (3, 20), (8, 14), (3, 9)])
def test_a_resumed_run_sends_the_same_first_visits_as_the_uninterrupted_one(
    ram: int, file: int, tmp_path: Path
) -> None:
    run, batches = Run(tmp_path / "run"), list(pairwise(batches_of(num_samples=24, batch_size=2, num_steps=120)))
    with run.buffers("sender-0", ram=ram, file=file) as (buffer,):
        visitor = Visitor(buffer)
        for step, (samples, ahead) in enumerate(batches[:70]):
            visitor.visit(samples, ahead)
            if step % 7 == 6:
                run.save(step, buffer)
        copy, truth, salt = run.copied(tmp_path / "copy"), dict(visitor.truth), visitor.salt
        uninterrupted = [visitor.visit(samples, ahead) for samples, ahead in batches[70:]]
    with copy.buffers("sender-0", ram=ram, file=file) as (buffer,):
        assert copy.load(buffer) == []
        again = Visitor(buffer, salt)
        again.truth = truth
        assert [again.visit(samples, ahead) for samples, ahead in batches[70:]] == uninterrupted
    assert again.truth == visitor.truth


def test_what_changed_after_a_save_does_not_disturb_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.buffers("sender-0") as (buffer,):
        visitor = Visitor(buffer)
        for step, (samples, ahead) in enumerate(steps_of(num_samples=12, batch_size=3, num_steps=40)):
            visitor.visit(samples, ahead)
            if step == 30:
                run.save(step, buffer)
                then = dict(visitor.truth)
        assert visitor.truth != then
    with run.buffers("sender-0") as (buffer,):
        assert run.load(buffer) == []
        again = Visitor(buffer)
        again.truth = then
        for first in range(0, 12, 3):
            assert None not in again.visit(range(first, first + 3))


def test_an_older_checkpoint_is_whole_too_while_there_is_room(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=3)
    sequences: dict[int, list[int]] = {}
    with run.buffers("sender-0") as (buffer,):
        visitor = Visitor(buffer)
        for step, (samples, ahead) in enumerate(steps_of(num_samples=12, batch_size=3, num_steps=40)):
            visitor.visit(samples, ahead)
            if step % 10 == 9:
                run.save(step, buffer)
                sequences[step] = [visitor.truth[sample][0] for sample in range(12)]
    assert run.checkpoints.steps() == [39, 29, 19]
    run.checkpoints.drop_after(19)
    with run.buffers("sender-0") as (buffer,):
        assert run.load(buffer) == []
        assert [known and known.sequence for known in held(buffer, 12)] == sequences[19]


def test_a_save_writes_what_has_changed_and_no_more(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.buffers("sender-0", ram=40) as (buffer,):
        visitor = Visitor(buffer)
        visitor.visit(range(20))
        assert buffer.stats.bytes_written == 0
        run.save(1, buffer)
        assert buffer.stats.bytes_written == 20 * SLOT
        visitor.visit([3, 4])
        run.save(2, buffer)
        assert buffer.stats.bytes_written == 22 * SLOT
        run.save(3, buffer)
        assert buffer.stats.bytes_written == 22 * SLOT


def test_without_a_file_every_entry_is_written_beside_the_index(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.buffers("sender-0", ram=40, file=0) as (buffer,):
        Visitor(buffer).visit(range(20))
        run.save(1, buffer)
        run.save(2, buffer)
        assert buffer.stats.bytes_written == 40 * SLOT
    assert (run.checkpoints.path_of(2) / "buffer-0004-sender-0.entries").stat().st_size == 20 * SLOT
    assert not run.slots.exists()


def test_under_another_plan_a_buffer_gets_what_any_of_its_boundary_held_of_its_lanes(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.buffers("sender-0", "receiver-0", "sender-1") as old:
        for buffer, samples in zip(old, ([0, 2, 4], [0, 2, 6], [1, 3, 2]), strict=True):
            Visitor(buffer).visit(samples)
        Visitor(old[0]).visit([8])
        for _ in range(3):
            known = old[2].known([2])
            old[2].take(2).fill_(7)
            old[2].done(2, 1 + (known[0].sequence if known[0] else 0), 77)
        run.save(1, *old)
    for name in ("sender-1", "sender-7"):
        copy = run.copied(tmp_path.parent / f"{tmp_path.name}-{name}")
        with copy.buffers(name) as (buffer,):
            assert copy.load(buffer, plan="b", lane=0) == []
            found = held(buffer, 10)
            assert [sample for sample, one in enumerate(found) if one is not None] == [0, 2, 4, 6, 8]
            assert found[2] == Known(4, 77)
            assert set(buffer.take(2).tolist()) == {7}


def test_under_the_same_plan_a_buffer_gets_its_own_and_no_other(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.buffers("sender-0", "receiver-0") as old:
        for buffer, samples in zip(old, ([0, 1], [1, 2]), strict=True):
            Visitor(buffer).visit(samples)
        run.save(1, *old)
    with run.buffers("sender-0") as (buffer,):
        assert run.load(buffer) == []
        assert [one is not None for one in held(buffer, 3)] == [True, True, False]


def saved(run: Run, ram: int = 3, file: int = 60) -> None:
    with run.buffers("sender-0", ram=ram, file=file) as (buffer,):
        Visitor(buffer).visit(range(ram))
        run.save(1, buffer)


@pytest.mark.parametrize("is_there", [True, False])
def test_an_index_that_is_damaged_or_missing_is_a_line_and_no_error(is_there: bool, tmp_path: Path) -> None:
    run = Run(tmp_path)
    saved(run)
    index = run.checkpoints.path_of(1) / "buffer-0004-sender-0.json"
    index.write_text("{}") if is_there else index.unlink()
    with run.buffers("sender-0") as (buffer,):
        assert run.load(buffer) == [
            "the checkpoint's files hold no entries of buffer-0004-sender-0; those samples are sent anew"
        ]
        assert len(buffer) == 0


def test_entries_of_another_size_are_left_alone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    saved(run)
    with closing(MessageBuffer(4, 4999, ram_bytes=3 * SLOT, folder=run.slots, file_bytes=9 * SLOT)) as buffer:
        assert "hold no entries" in run.load(buffer)[0]


def test_a_damaged_entry_is_found_before_it_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path)
    saved(run)
    with (run.slots / "buffer-0004-sender-0.slots").open("r+b") as file:
        file.seek(SLOT + 17)
        file.write(b"damage")
    with run.buffers("sender-0") as (buffer,):
        assert run.load(buffer) == []
        assert [one is not None for one in held(buffer, 3)] == [True, False, True]
    assert capsys.readouterr().out.startswith("sample 1 is damaged or missing in buffer-0004-sender-0.slots")


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_entries_beside_the_index_that_are_damaged_or_gone_are_counted(damage: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    saved(run, ram=4, file=0)
    entries = run.checkpoints.path_of(1) / "buffer-0004-sender-0.entries"
    os.truncate(entries, 3 * SLOT) if damage == "cut" else entries.unlink()
    lost = 1 if damage == "cut" else 4
    with run.buffers("sender-0", ram=4, file=0) as (buffer,):
        assert run.load(buffer) == [
            f"the checkpoint's files lack or damage {lost} of 4 entries of buffer-0004-sender-0;"
            " those samples are sent anew"
        ]
        assert len(buffer) == 4 - lost


def test_a_disk_that_fills_up_is_one_line_and_leaves_the_previous_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, parts: list[memoryview], at: int) -> int:
        raise OSError(28, os.strerror(28))

    run = Run(tmp_path)
    with run.buffers("sender-0", ram=40) as (buffer,):  # so much that nothing is written before a save
        visitor = Visitor(buffer)
        visitor.visit(range(12))
        run.save(1, buffer)
        then = dict(visitor.truth)
        visitor.visit(range(12))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", full)
            with pytest.raises(CheckpointError, match=r"can't save .*sender-0 \(No space left on device\); free some"):
                run.save(2, buffer)
        run.checkpoints.abandon(2)
        visitor.visit(range(12))
    with run.buffers("sender-0", ram=40) as (buffer,):
        assert run.load(buffer) == []
        again = Visitor(buffer)
        again.truth = then
        assert None not in again.visit(range(12))


TRAINING = """
import random, sys
from pathlib import Path
from tests.codecs.buffers import Visitor, batches_of
from tests.training.test_buffers import Run
run = Run(Path(sys.argv[1]))
with run.buffers("sender-0", ram=4, file=30) as (buffer,):
    visitor = Visitor(buffer)
    for step, samples in enumerate(batches_of(12, 3, 10**4)):
        visitor.visit(samples)
        if step % 5 == 4:
            run.save(step, buffer)
            print(step, flush=True)
"""


@pytest.mark.parametrize("num_saves", [1, 4, 9, 17])
def test_a_run_killed_at_any_moment_goes_on_from_its_checkpoint(num_saves: int, tmp_path: Path) -> None:
    job = subprocess.Popen([sys.executable, "-c", TRAINING, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert job.stdout is not None
    for _ in range(num_saves):
        assert job.stdout.readline()
    job.send_signal(signal.SIGKILL)
    job.wait()
    job.stdout.close()
    run = Run(tmp_path)
    (step,) = run.checkpoints.steps()[:1]
    with run.buffers("sender-0", ram=4, file=30) as (buffer,):
        assert run.load(buffer) == []
        resumed, replayed = Visitor(buffer), replay(step)
        resumed.truth = replayed.truth
        assert [one and one.sequence for one in held(buffer, 12)] == [replayed.truth[one][0] for one in range(12)]
        for samples in batches_of(12, 3, 20, seed=1):
            assert None not in resumed.visit(samples)


def replay(last_step: int) -> Visitor:
    """Return what the killed run's entries were after a step."""
    with closing(buffer_with(12)) as buffer:
        visitor = Visitor(buffer)
        for samples in batches_of(12, 3, 10**4)[: last_step + 1]:
            visitor.visit(samples)
    return visitor
