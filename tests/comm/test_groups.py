"""Joining a job: real processes that meet over a real port."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.queues import Queue
from typing import Any

import pytest
from torch.distributed import HashStore

from wantrain.comm.groups import TorchMembership, join
from wantrain.errors import ChannelError, ConfigError, PlanError, WantrainError

Both = Callable[..., tuple[object, object]]
TIMEOUT_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def worker(env_rank: int, world_size: int, plan: tuple[int, int], port: int, results: Any) -> None:
    """Be one process of torchrun's: join with (world size, rank) of the plan, exchange twice, leave."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(env_rank)}
    os.environ |= {"WORLD_SIZE": str(world_size)}
    try:
        member = join(plan[0], plan[1], TIMEOUT_S)
        found = [member.all_exchange([float(plan[1]), 10.0 * i], TIMEOUT_S) for i in range(2)]
        said = member.gather({"rank": plan[1]}, TIMEOUT_S)
        member.leave(TIMEOUT_S)
        results.put((env_rank, (found, said)))
    except WantrainError as error:
        results.put((env_rank, f"{type(error).__name__}: {error}"))


def run(plans: list[tuple[int, int]], num_results: int) -> dict[int, Any]:
    context = multiprocessing.get_context("spawn")
    results: Queue[Any] = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=worker, args=(rank, len(plans), plan, port, results), daemon=True)
        for rank, plan in enumerate(plans)
    ]
    for process in processes:
        process.start()
    try:
        return dict(results.get(timeout=TIMEOUT_S) for _ in range(num_results))
    finally:
        for process in processes:
            process.kill() if num_results < len(plans) else process.join(TIMEOUT_S)


def test_ranks_come_from_the_plan_and_values_from_everybody() -> None:
    found = run([(3, 2), (3, 0), (3, 1)], 3)
    expected = ([[[float(rank), 10.0 * i] for rank in range(3)] for i in range(2)], [{"rank": i} for i in range(3)])
    assert found == {0: expected, 1: expected, 2: expected}


def test_one_rank_claimed_twice_is_refused() -> None:
    (error,) = run([(2, 1), (2, 1)], 1).values()
    assert error == "PlanError: two processes claim rank 1 of the plan; give each its own --worker"


def set_environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "0", "WORLD_SIZE": "2"} | values
    for name, value in given.items():
        monkeypatch.setenv(name, value)


def test_world_size_that_is_not_the_plans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch)
    with pytest.raises(PlanError, match=r"the plan is for 4 processes \(got 2\)"):
        join(4, 0, 1.0)


def test_start_without_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"lacks.*RANK.*torchrun"):
        join(1, 0, 1.0)


def test_taken_port_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        set_environment(monkeypatch, MASTER_PORT=str(taken.getsockname()[1]))
        with pytest.raises(ConfigError, match=r"port taken \(127.0.0.1:\d+\); choose another MASTER_PORT$"):
            join(2, 0, 5.0)


def test_an_exchange_that_was_expected_is_the_same_and_must_be_of_that_size(both: Both) -> None:
    store = HashStore()
    members = both(*[lambda rank=rank: TorchMembership(store, rank, 2, "127.0.0.1", TIMEOUT_S) for rank in range(2)])

    def told(member: Any) -> list[list[float]]:
        member.expect_exchange(1)
        first = member.all_exchange([1.0 + member.rank], TIMEOUT_S)
        return [*first, *member.all_exchange([5.0, 6.0 + member.rank], TIMEOUT_S)]

    for found in both(*[lambda member=member: told(member) for member in members]):
        assert found == [[1.0], [2.0], [5.0, 6.0], [5.0, 7.0]]
    members[0].expect_exchange(1)  # type: ignore[attr-defined]
    with pytest.raises(ChannelError, match="2 step times are exchanged where 1 were expected"):
        members[0].all_exchange([1.0, 2.0], TIMEOUT_S, "step times")  # type: ignore[attr-defined]


def test_silent_rank_is_named(both: Both) -> None:
    store = HashStore()
    members = both(*[lambda rank=rank: TorchMembership(store, rank, 2, "127.0.0.1", TIMEOUT_S) for rank in range(2)])
    assert isinstance(members[0], TorchMembership)
    with pytest.raises(ChannelError, match=r"lost rank 1 .*awaited step times, for up to 0.2 s"):
        members[0].all_exchange([1.0], 0.2, "step times")


def test_a_rank_that_does_not_answer_is_named(both: Both) -> None:
    store, names = HashStore(), ["paris-0", "tokyo-0"]
    one, _ = both(
        *[lambda rank=rank: TorchMembership(store, rank, 2, "127.0.0.1", TIMEOUT_S, names) for rank in range(2)]
    )
    with pytest.raises(ChannelError, match=r"worker 'tokyo-0' did not answer within 0\.2 s"):
        one.gather("here", 0.2)  # type: ignore[attr-defined]


def test_alone_needs_nobody() -> None:
    member = TorchMembership(HashStore(), 0, 1, None, TIMEOUT_S)
    assert member.all_exchange([3.0], TIMEOUT_S) == [[3.0]]
    member.leave(TIMEOUT_S)
