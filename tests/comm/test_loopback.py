"""What only the loopback channel promises."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from wantrain.comm.loopback import LoopbackJob, loopback_pair
from wantrain.comm.sender import Sender
from wantrain.comm.torch_channel import Opening
from wantrain.errors import ChannelError


def test_a_payload_is_done_when_send_returns() -> None:
    a, b = loopback_pair("a", "b")
    assert a.send(torch.ones(9, dtype=torch.uint8)).done
    assert b.ready()


def test_each_end_names_the_other() -> None:
    a, b = loopback_pair("oregon", "virginia")
    assert (a.peer, b.peer) == ("virginia", "oregon")


def test_members_of_a_job_exchange_and_open_channels_by_name() -> None:
    job = LoopbackJob(2)

    def live(rank: int) -> tuple[list[list[float]], int]:
        member = job.member(rank)
        found = member.all_exchange([float(rank), 5.0], 20)
        (channel,) = member.open_channels([Opening("line", 1 - rank, "ba"[rank], Sender())], 20)
        channel.send(torch.full((3 + rank,), 1, dtype=torch.uint8))
        received = channel.recv(20, "x").numel()
        channel.close(20)
        member.leave(20)
        return found, received

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(live, (0, 1))) == [([[0.0, 5.0], [1.0, 5.0]], 4), ([[0.0, 5.0], [1.0, 5.0]], 3)]


def test_member_that_says_nothing_is_named() -> None:
    with pytest.raises(ChannelError, match=r"rank 1 did not answer within 0\.01 s"):
        LoopbackJob(2).member(0).gather("here", 0.01)
