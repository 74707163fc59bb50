"""Real workers meet over localhost; what is measured is another test's matter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from networks import free_port

from wantrain.errors import ChannelError, ConfigError, WantrainError
from wantrain.probe import session
from wantrain.probe.control import Message, Workers
from wantrain.probe.measurement import Participant
from wantrain.probe.session import Place, measure_network, worker_name


class PingOnly:
    """Stands for the prober: rank 0 pings the others, and that is all."""

    def __init__(self, workers: Workers, participants: Sequence[Participant], progress: Callable[[str], None]) -> None:
        self._workers, self._participants = workers, participants

    def run(self) -> Any:
        ranks = list(range(1, len(self._participants)))
        reply = self._workers.ask({0: {"do": "ping", "ranks": ranks, "count": 3}})[0]
        return self._participants, reply["round_trips_s"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, dict[int, str]]]:
    """Let some workers take part, each in its thread; return what rank 0 got, and every rank's error."""

    def run(
        own: Sequence[Participant], compute: Callable[[], Message] | None = None, absent: int | None = None
    ) -> tuple[Any, dict[int, str]]:
        monkeypatch.setattr(session, "Prober", PingOnly)
        port, got, errors = free_port(), {}, {}

        def take_part(rank: int) -> None:
            try:
                got[rank] = measure_network(
                    own[rank], Place(rank, len(own), "127.0.0.1", port), 5.0, lambda _: None, compute
                )
            except WantrainError as caught:
                errors[rank] = str(caught)

        threads = [threading.Thread(target=take_part, args=(rank,)) for rank in range(len(own)) if rank != absent]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return got.get(0), errors

    return run


def people(*names: str) -> list[Participant]:
    return [Participant(name, memory_bytes=9 * 10**9) for name in names]


def test_all_are_introduced_and_reach_each_other(measured: Any) -> None:
    (participants, times), errors = measured(people("a", "b", "c"))
    assert errors == {}
    assert [(one.name, one.address) for one in participants] == [(name, "127.0.0.1") for name in "abc"]
    assert [len(one) for one in times] == [3, 3]


def test_workers_of_one_machine_share_its_memory(measured: Any) -> None:
    own = [*people("a", "b", "c"), Participant("gpu", device="cuda", memory_bytes=10**9)]
    (participants, _), _ = measured(own)
    assert [one.memory_bytes for one in participants] == [3 * 10**9] * 3 + [10**9]


def test_workers_of_one_machine_compute_one_after_the_other(measured: Any) -> None:
    at_work: list[int] = []
    most: list[int] = []

    def compute() -> Message:
        at_work.append(1)
        most.append(len(at_work))
        at_work.pop()
        return {"flops_per_s": 5e9, "codec_values_per_s": 4e8, "memory_bytes": 6 * 10**9}

    (participants, _), errors = measured(people("a", "b"), compute)
    assert (errors, most) == ({}, [1, 1])
    assert {(one.flops_per_s, one.codec_values_per_s, one.memory_bytes) for one in participants} == {
        (5e9, 4e8, 3 * 10**9)
    }


def test_one_who_does_not_come_is_everybodys_error(measured: Any) -> None:
    _, errors = measured(people("a", "b", "c"), absent=2)
    assert set(errors.values()) == {"not all workers came within 5 s (rank 2 did not); are all running?"}
    assert set(errors) == {0, 1}


def test_namesakes_are_refused(measured: Any) -> None:
    _, errors = measured(people("a", "a"))
    assert errors[0] == "two workers are called 'a'; give each its own --worker"
    assert errors[1] == "the measurement has ended: two workers are called 'a'; give each its own --worker"


def test_a_worker_that_cannot_measure_itself_is_named(measured: Any) -> None:
    def compute() -> Message:
        raise ConfigError("no such device")

    _, errors = measured(people("a", "b"), compute)
    assert errors[0] == "worker 'a' can't measure itself (no such device)"


def test_torchrun_says_who_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert Place.from_environment() == Place(1, 4, "10.0.0.1", 29501)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match="links need two workers at least"):
        Place.from_environment()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="WORLD_SIZE must be a number"):
        Place.from_environment()
    monkeypatch.delenv("RANK")
    with pytest.raises(ConfigError, match=r"the environment lacks RANK; start every worker with torchrun"):
        Place.from_environment()


def test_a_worker_is_called_as_emulated_or_by_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.socket, "gethostname", lambda: "_lab one.example")
    for name in ("WANTRAIN_WORKER", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert worker_name() == "lab-one.example"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert worker_name() == "lab-one.example-3"
    monkeypatch.setenv("WANTRAIN_WORKER", "oslo-0")
    assert worker_name() == "oslo-0"


def test_an_absent_rank_0_is_said() -> None:
    with pytest.raises(ChannelError, match="is rank 0 running"):
        measure_network(people("b")[0], Place(1, 2, "127.0.0.1", free_port()), 0.1, lambda _: None)
