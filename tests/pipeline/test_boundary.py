import time

import pytest
import torch

from tests.jobs import TIMEOUT_S
from wantrain.codecs.codec import make_codec
from wantrain.comm.loopback import loopback_pair
from wantrain.errors import ChannelError, CodecError
from wantrain.pipeline.boundary import Inbox, Item, Outbox, SendLog
from wantrain.pipeline.recorder import Recorder


def make_boxes(codec: str = "raw:fp32", timeout_s: float = TIMEOUT_S) -> tuple[Outbox, Inbox, Recorder]:
    recorder = Recorder(0)
    log = SendLog(recorder, "b")
    a, b = loopback_pair("a", "b", log)
    return Outbox(a, make_codec(codec), recorder, log), Inbox(b, make_codec(codec), recorder, timeout_s), recorder


def test_what_is_put_is_taken_in_any_order_and_noted() -> None:
    outbox, inbox, recorder = make_boxes()
    inbox.expect([Item(m, [m]) for m in range(3)], "0F{} of step 7")
    tensors = [torch.randn(2, 3) for _ in range(3)]
    for m, tensor in enumerate(tensors):
        outbox.put(tensor, Item(m, [m]))
    for m in (2, 0, 1):
        assert torch.equal(inbox.take(m), tensors[m])
    outbox.close()
    inbox.close()
    kinds = [(event.kind, event.microbatch) for event in recorder.events()]
    assert all((kind, m) in kinds for kind in ("encode", "send", "decode") for m in range(3))
    assert outbox.raw_bytes == 3 * 24


def test_a_wait_is_noted_with_whom_was_waited_for() -> None:
    outbox, inbox, recorder = make_boxes()
    inbox.expect([Item(0, [0])], "0F{} of step 7")
    import threading

    threading.Timer(0.05, lambda: outbox.put(torch.ones(1), Item(0, [0]))).start()
    inbox.take(0)
    assert recorder.waited_s()["a"] == pytest.approx(0.05, abs=0.04)


def test_what_does_not_come_is_named() -> None:
    _, inbox, _ = make_boxes(timeout_s=0.05)
    inbox.expect([Item(3, [0])], "0F{} of step 7")
    with pytest.raises(ChannelError, match=r"no payload from 'a' within 0\.05 s; awaited 0F3 of step 7"):
        inbox.take(3)


def test_an_error_while_encoding_ends_the_outbox_at_the_next_put() -> None:
    outbox, _, _ = make_boxes("raw:fp16")
    outbox.put(torch.full((1,), 1e30), Item(0, [0]))
    deadline = time.monotonic() + TIMEOUT_S
    with pytest.raises(CodecError, match="65504"):  # noqa: PT012  the thread needs a moment
        while time.monotonic() < deadline:
            outbox.put(torch.ones(1), Item(1, [1]))
            time.sleep(0.01)
