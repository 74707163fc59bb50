"""`profile --links` from torchrun's environment to the measured network.

Every process says who it is and serves; rank 0 coordinates besides. So it needs no job, no plan and no topology: only
the five variables that torchrun and `wantrain emulate` set.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

from wantrain.errors import ChannelError, ConfigError
from wantrain.probe.control import INTERRUPTED, Meeting, Message, Workers, dismiss, hear, meet
from wantrain.probe.machine import host_id
from wantrain.probe.measurement import Measurement, Participant
from wantrain.probe.port import Port
from wantrain.probe.prober import Prober
from wantrain.probe.service import Service

_ENVIRONMENT = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
_END_WITHIN_S = 2.0
"""Chosen: what this process's own worker takes to close its connections."""

_COMPUTE_WITHIN_S = 1800.0
"""Chosen: the layers of a large model take minutes on a small machine."""


@dataclass(frozen=True)
class Place:
    """A process's place among the others, as torchrun says it."""

    rank: int
    world_size: int
    host: str
    port: int

    @classmethod
    def from_environment(cls) -> Self:
        """Read it; raise ConfigError for what is missing or no number, or where there is nobody to measure."""
        missing = [name for name in _ENVIRONMENT if name not in os.environ]
        if missing:
            raise ConfigError(
                f"the environment lacks {', '.join(missing)}; start every worker with torchrun, or all of them with"
                " 'wantrain emulate TOPOLOGY -- …'"
            )
        rank, world_size, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        if world_size < 2:
            raise ConfigError(f"links need two workers at least (got WORLD_SIZE = {world_size}); start more")
        return cls(rank, world_size, os.environ["MASTER_ADDR"], port + 1)


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise ConfigError(f"{name} must be a number (got {text!r}); start with torchrun")
    return int(text)


def worker_name() -> str:
    """Return what this worker is called unless told: as emulated, else by its host, numbered where that has several."""
    host = "".join(one if one.isalnum() or one in "-." else "-" for one in socket.gethostname()).lstrip("-.")
    several = os.environ.get("LOCAL_WORLD_SIZE", "1") != "1"
    own = f"{host or 'worker'}-{os.environ.get('LOCAL_RANK', '0')}" if several else host or "worker"
    return os.environ.get("WANTRAIN_WORKER") or own[:64]


def measure_network(
    own: Participant,
    place: Place,
    timeout_s: float,
    progress: Callable[[str], None],
    compute: Callable[[], Message] | None = None,
) -> Measurement | None:
    """Take part in the measurement of all links; return it at rank 0, None elsewhere.

    `compute` measures this worker's computing, on machines of several workers one after the other; all ranks give it,
    or none. Raise ChannelError where a worker is not there, can't be reached, or is late by `timeout_s`.
    """
    if place.rank > 0:
        _serve(own, place, timeout_s, compute)
        return None
    meeting = Meeting(place.port)
    serving = threading.Thread(target=_serve_quietly, args=(own, place, timeout_s, compute), daemon=True)
    try:
        serving.start()
        progress(f"waiting for {place.world_size} workers")
        with _introduced(meeting, place, timeout_s) as (workers, participants):
            if compute is not None:
                participants = _computed(workers, participants, progress)
            return Prober(workers, _with_shared_memory(participants), progress).run()
    finally:
        meeting.close()
        serving.join(_END_WITHIN_S)


@contextmanager
def _introduced(meeting: Meeting, place: Place, timeout_s: float) -> Iterator[tuple[Workers, Sequence[Participant]]]:
    """Gather all workers, tell each about the others, and at the end tell all how it ended."""
    came = meeting.gather(place.world_size, timeout_s)
    lines = [line for line, _ in came]
    participants = [Participant(**greeting["own"]) for _, greeting in came]
    workers = Workers(lines, [one.name for one in participants], timeout_s)
    try:
        _refuse_namesakes(workers.names)
        places = [[one.name, *greeting["place"]] for one, (_, greeting) in zip(participants, came, strict=True)]
        workers.ask({rank: {"do": "meet", "places": places} for rank in range(len(lines))})
        yield workers, participants
    except BaseException as caught:
        dismiss(lines, f"the measurement has ended: {caught}" if str(caught) else INTERRUPTED)
        raise
    dismiss(lines)


def _refuse_namesakes(names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two workers are called '{twice}'; give each its own --worker")


def _serve(own: Participant, place: Place, timeout_s: float, compute: Callable[[], Message] | None) -> None:
    line = meet(place.host, place.port, timeout_s)
    port = Port(line.own_host)
    try:
        me = dataclasses.replace(own, address=own.address or line.own_host, host=host_id())
        line.send({"rank": place.rank, "own": dataclasses.asdict(me), "place": port.place})
        peers = hear(line, 2 * timeout_s)
        assert peers is not None, "nobody is dismissed before the others are known"
        line.send({})
        known: Any = {rank: (name, (host, number)) for rank, (name, host, number) in enumerate(peers["places"])}
        Service(place.rank, port, known, timeout_s, compute or (lambda: {})).run(line)
    finally:
        port.close()
        line.close()


def _serve_quietly(own: Participant, place: Place, timeout_s: float, compute: Callable[[], Message] | None) -> None:
    with suppress(ChannelError):  # the coordinator, in this very process, says what went wrong
        _serve(own, place, timeout_s, compute)


def _computed(
    workers: Workers, participants: Sequence[Participant], progress: Callable[[str], None]
) -> list[Participant]:
    """Let every worker measure its computing; of those that share a machine one at a time."""
    found = list(participants)
    hosts: dict[str, list[int]] = {}
    for rank, one in enumerate(participants):
        hosts.setdefault(one.host, []).append(rank)
    for turn in range(max(map(len, hosts.values()))):
        ranks = [own[turn] for own in hosts.values() if turn < len(own)]
        progress(f"computing of {', '.join(workers.names[rank] for rank in ranks)}")
        for rank, reply in workers.ask({rank: {"do": "compute"} for rank in ranks}, _COMPUTE_WITHIN_S).items():
            found[rank] = dataclasses.replace(found[rank], **reply)
    return found


def _with_shared_memory(participants: Sequence[Participant]) -> list[Participant]:
    """Divide a machine's free memory among its workers; a GPU's is its own."""
    on_host = [one.host for one in participants if one.device == "cpu"]
    return [
        dataclasses.replace(one, memory_bytes=one.memory_bytes // on_host.count(one.host))
        if one.device == "cpu"
        else one
        for one in participants
    ]
