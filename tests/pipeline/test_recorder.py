import time

import pytest

from wantrain.pipeline.recorder import Recorder


@pytest.mark.alone
def test_times_count_from_the_steps_begin() -> None:
    recorder = Recorder(3)
    time.sleep(0.02)
    recorder.begin_step()
    with recorder.span("forward", 5):
        time.sleep(0.02)
    (event,) = recorder.events()
    assert (event.rank, event.kind, event.microbatch) == (3, "forward", 5)
    assert event.start_s < 0.01
    assert event.duration_s == pytest.approx(0.02, abs=0.02)
    assert recorder.seconds("forward") == event.duration_s


def test_dilated_times_are_divided_again() -> None:
    recorder = Recorder(0, dilation=10)
    start_s = time.monotonic()
    recorder.add("wait", start_s, start_s + 1.0, peer="b")
    recorder.add("wait", start_s, start_s + 0.5, peer="b")
    assert recorder.waited_s() == {"b": pytest.approx(0.15)}


def test_a_new_step_forgets_the_old_one() -> None:
    recorder = Recorder(0)
    recorder.add("send", 0.0, 1.0)
    recorder.begin_step()
    assert recorder.events() == ()
