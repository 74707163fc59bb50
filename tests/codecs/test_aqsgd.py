"""AQ-SGD's two ends: equal after every agreement, whatever happened to either."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

import wantrain_kernels as kernels
from wantrain import wire
from wantrain.codec_spec import parse_codec
from wantrain.codecs.aqsgd import AqsgdCodec, entry_bytes_of
from wantrain.codecs.message_buffer import MessageBuffer
from wantrain.errors import ChannelError, CodecError

SHAPE = (4, 96)


def make_buffer(spec_name: str, entries: int, folder: Path | None = None, name: str = "end") -> MessageBuffer:
    size = entry_bytes_of(parse_codec(spec_name), SHAPE)
    slot = -(-size // 4096) * 4096
    file_bytes = 0 if folder is None else 3 * entries * slot
    return MessageBuffer(1, size, ram_bytes=entries * slot, folder=folder, file_bytes=file_bytes, name=name)


def make_ends(name: str, entries: int = 64) -> tuple[AqsgdCodec, AqsgdCodec]:
    """Return sender and receiver with a buffer each."""
    spec = parse_codec(name)
    return AqsgdCodec(spec, make_buffer(name, entries)), AqsgdCodec(spec, make_buffer(name, entries))


def settle(sender: AqsgdCodec, receiver: AqsgdCodec, ids: list[int]) -> None:
    """Agree as the two ends of a boundary do."""
    views = sender.view(ids), receiver.view(ids)
    sender.agree(ids, *views)
    receiver.agree(ids, *views[::-1])


def visit(sender: AqsgdCodec, receiver: AqsgdCodec, ids: list[int], tensor: Tensor) -> tuple[Tensor, int]:
    """Agree, send and receive a microbatch; return what arrives and the payload's size."""
    settle(sender, receiver, ids)
    payload = sender.encode(tensor, ids)
    num_bytes = payload.numel()
    return receiver.decode(payload, ids), num_bytes


def test_the_first_visit_is_exact_and_later_ones_send_the_difference() -> None:
    name = "aqsgd:4,group=32"
    sender, receiver = make_ends(name)
    x = torch.randn(2, *SHAPE)
    found, num_bytes = visit(sender, receiver, [10, 11], x)
    assert torch.equal(found, x)
    assert num_bytes == wire.payload_bytes(name, (2, *SHAPE), num_first=2)
    moved = x + 0.01 * torch.randn_like(x)
    found, num_bytes = visit(sender, receiver, [10, 11], moved)
    assert num_bytes == wire.payload_bytes(name, (2, *SHAPE))
    assert float((found - moved).norm() / moved.norm()) < 0.01


@pytest.mark.parametrize("base", ["bf16", "fp16", "q8", "q4"])
def test_the_error_follows_how_far_a_sample_moved(base: str) -> None:
    sender, receiver = make_ends(f"aqsgd:4,group=32,base={base}")
    x = torch.randn(1, *SHAPE)
    visit(sender, receiver, [0], x)
    errors = []
    for step in (0.5, 0.1, 0.02):
        x = x + step * torch.randn_like(x)
        for _ in range(3):  # what the base's own rounding has left behind is caught up with
            found, _ = visit(sender, receiver, [0], x)
        errors.append(float((found - x).norm() / x.norm()))
    assert errors[-1] < 0.02


def test_one_batch_may_hold_first_and_later_visits() -> None:
    sender, receiver = make_ends("aqsgd:3,group=32,first=hadamard:8")
    x = torch.randn(3, *SHAPE)
    visit(sender, receiver, [0], x[1:2])
    found, num_bytes = visit(sender, receiver, [5, 0, 6], x)
    assert num_bytes == wire.payload_bytes("aqsgd:3,group=32,first=hadamard:8", (3, *SHAPE), num_first=2)
    assert float((found - x).norm() / x.norm()) < 0.02


def test_a_sample_twice_in_a_batch_is_a_first_visit_the_second_time() -> None:
    sender, receiver = make_ends("aqsgd:4")
    x = torch.randn(1, *SHAPE)
    visit(sender, receiver, [3], x)
    ids = [3, 3]
    settle(sender, receiver, ids)
    assert sender.measure(torch.cat([x, 2 * x]), ids) is not None
    found = receiver.decode(sender.encode(torch.cat([x, 2 * x]), ids), ids)
    assert torch.equal(found[1], 2 * x[0])
    assert base_of(sender, 3).equal(base_of(receiver, 3))


def test_data_without_identity_is_exact_and_leaves_no_trace() -> None:
    sender, receiver = make_ends("aqsgd:4")
    x = torch.randn(2, *SHAPE)
    assert torch.equal(receiver.decode(sender.encode(x)), x)
    assert len(sender.buffer) == len(receiver.buffer) == 0


def test_what_was_not_agreed_on_is_found() -> None:
    sender, receiver = make_ends("aqsgd:4")
    x = torch.randn(1, *SHAPE)
    visit(sender, receiver, [1], x)
    views = sender.view([1]), receiver.view([1])
    sender.agree([1], *views)
    with pytest.raises(ChannelError, match="another set of first visits"):
        receiver.decode(sender.encode(x, [1]), [1])
    with pytest.raises(ChannelError, match="looks at other samples"):
        receiver.agree([1, 2], receiver.view([1, 2]), views[0])


def test_non_finite_values_are_refused_and_first_ones_not_kept() -> None:
    sender, receiver = make_ends("aqsgd:4")
    x = torch.randn(1, *SHAPE)
    bad = x.clone()
    bad[0, 1, 2] = float("nan")
    found, _ = visit(sender, receiver, [0], bad)
    assert torch.equal(found.isnan(), bad.isnan())
    assert len(sender.buffer) == len(receiver.buffer) == 0
    visit(sender, receiver, [1], x)
    settle(sender, receiver, [1])
    with pytest.raises(CodecError, match="met NaN or infinity in 1 of 4 groups"):
        sender.encode(bad, [1])


def test_measure_says_what_a_later_visit_loses_and_changes_nothing() -> None:
    sender, receiver = make_ends("aqsgd:2,group=32,base=fp16")
    x = torch.randn(1, *SHAPE)
    settle(sender, receiver, [4])
    assert sender.measure(x, [4]) is None
    receiver.decode(sender.encode(x, [4]), [4])
    moved = x + 0.1 * torch.randn_like(x)
    settle(sender, receiver, [4])
    loss = sender.measure(moved, [4])
    found = receiver.decode(sender.encode(moved, [4]), [4])
    assert loss is not None
    assert float((found - moved).norm() / moved.norm()) == pytest.approx(loss.relative_error, rel=1e-3)


def test_more_samples_than_a_header_has_bits_are_refused() -> None:
    sender, _ = make_ends("aqsgd:4")
    with pytest.raises(CodecError, match="can't encode 65 samples at once"):
        sender.encode(torch.zeros(65, *SHAPE))


def base_of(codec: AqsgdCodec, sample: int) -> Tensor:
    """Return a copy of what an end holds of a sample."""
    (known,) = codec.buffer.known([sample])
    assert known is not None
    base = codec.buffer.take(sample)
    copy = base.clone()
    codec.buffer.done(sample, known.sequence, known.digest)
    return copy


@pytest.mark.parametrize("num_visits", [600, pytest.param(5_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("base", ["bf16", "q4"])
def test_visits_with_every_misfortune_leave_both_ends_equal(base: str, num_visits: int, tmp_path: Path) -> None:
    """Crashes between the two ends, evictions, lost entries, changed bits and order: nothing differs in silence."""
    name = f"aqsgd:3,group=32,base={base},first=quantized:8"
    spec, chance = parse_codec(name), random.Random(base)
    generator = torch.Generator().manual_seed(1)
    buffers = [make_buffer(name, entries, tmp_path, f"end-{entries}") for entries in (24, 17)]
    ends = [AqsgdCodec(spec, buffer, seed=9) for buffer in buffers]
    samples = torch.randn(90, *SHAPE, generator=generator)
    num_done = num_later = 0
    while num_done < num_visits:
        ids = chance.sample(range(90), chance.randint(1, 6))
        if chance.random() < 0.1:
            buffers[chance.randint(0, 1)].forget(chance.sample(range(90), 5))
        if chance.random() < 0.05:
            ends[chance.randint(0, 1)].wanted_bits = chance.choice([3, 4, 6])
        settle(*ends, ids)
        assert ends[0].bits == ends[1].bits
        agreed = dict(ends[0]._agreed)
        assert agreed == ends[1]._agreed
        x = samples[ids] + 0.1 * torch.randn(len(ids), *SHAPE, generator=generator)
        payload = ends[0].encode(x, ids)
        num_first = len(ids) - len(agreed)
        assert payload.numel() == wire.payload_bytes(name, tuple(x.shape), num_first, ends[0].bits)
        if chance.random() < 0.05:  # the receiver never sees it, and both begin anew with what they hold
            ends = [AqsgdCodec(spec, buffer, seed=9) for buffer in buffers]
            continue
        found = ends[1].decode(payload, ids)
        held = [list(buffer.known(ids)) for buffer in buffers]
        for i, sample in enumerate(ids):
            here, there = held[0][i], held[1][i]
            if here is not None and here == there:
                values = [kernels.base_load(base_of(end, sample), SHAPE, torch.float32, 32, base)[0] for end in ends]
                assert torch.equal(*values)
        error = float((found - x).norm() / x.norm())
        assert error < 0.6
        num_done += len(ids)
        num_later += len(agreed)
    assert num_later > num_visits / 10
    for buffer in buffers:
        buffer.close()
