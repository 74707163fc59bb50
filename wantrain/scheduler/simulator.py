"""Play a plan in virtual time: the same actions that the executor plays, over links that are modelled.

Model. A rank does one action at a time, in the listed order, and waits only for the tensor that the next one needs. A
payload leaves when its tensor exists: it takes every *resource* on its way (the link itself, and the uplinks and
downlinks of worker and site) in first-come order, at the pace of the slowest, and arrives one latency later. So a
middle stage that sends both ways through one uplink pays for both. Gradient buckets leave as the last backward passes
their layers, one piece at a time, so that a pipeline payload never waits behind more than one piece.

    rank 1   ──[F0]──[F1]──.......──[B0]──        compute; dots: waiting for 2B0
    uplink        └─F0──┘└─F1──┘        └─B0──┘   one payload after another

Bound checked in the tests: Schedule play is never faster than the work-conserving bound of the same shape.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from wantrain.plan import Plan
from wantrain.schedule import KIND_NAMES, Action
from wantrain.timeline import Event, EventKind, Timeline, merge
from wantrain.topology import Topology


@dataclass(frozen=True)
class Workload:
    """What a plan costs, rank by rank: seconds of compute, bytes on each boundary, gradient buckets by stage.

    `forward_s[rank]`, `backward_s[rank]` per microbatch; `step_s[rank]` for the optimizer; `forward_bytes[stage]` is
    sent to the next stage and `backward_bytes[stage]` back to the one before, per microbatch; `bucket_bytes[stage]`
    lists the wire bytes of each gradient bucket in the order in which the backward finishes them.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    step_s: tuple[float, ...]
    forward_bytes: tuple[int, ...]
    backward_bytes: tuple[int, ...]
    bucket_bytes: tuple[tuple[int, ...], ...]


class _Network:
    """First-come resources: every link, and every shared uplink and downlink."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._free: dict[tuple[str, ...], float] = {}
        self._paths: dict[tuple[str, str], tuple[float, float, list[tuple[tuple[str, ...], float]]]] = {}

    def _path(self, source: str, target: str) -> tuple[float, float, list[tuple[tuple[str, ...], float]]]:
        if (source, target) not in self._paths:
            link = self._topology.link(source, target)
            resources: list[tuple[tuple[str, ...], float]] = [(("link", source, target), link.bandwidth_bytes_per_s)]
            resources += self._topology.shared_limits(source, target)
            self._paths[source, target] = (link.latency_s, min(rate for _, rate in resources), resources)
        return self._paths[source, target]

    def send(self, source: str, target: str, num_bytes: int, ready_s: float) -> tuple[float, float, float]:
        """Return when the transfer starts, when its last byte has left, and when that byte arrives."""
        latency_s, rate, resources = self._path(source, target)
        start_s = max([ready_s, *(self._free.get(key, 0.0) for key, _ in resources)])
        for key, own_rate in resources:
            self._free[key] = start_s + num_bytes / own_rate
        end_s = start_s + num_bytes / rate
        return start_s, end_s, end_s + latency_s


@dataclass
class _Rank:
    """Where one rank stands."""

    actions: tuple[Action, ...]
    position: int = 0
    waiting_since_s: float | None = 0.0
    arrived: set[tuple[str, int]] = field(default_factory=set)
    buckets_due: int = 0


class _Play:
    """One step in virtual time."""

    def __init__(self, plan: Plan, topology: Topology, workload: Workload) -> None:
        self.plan, self.workload = plan, workload
        self.network = _Network(topology)
        self.events: list[Event] = []
        self.queue: list[tuple[float, int, Callable[[float], None]]] = []
        self.num_queued = 0
        self.ranks: list[_Rank] = []
        for replica in range(len(plan.replicas)):
            self.ranks += [_Rank(actions) for actions in plan.actions(replica)]
        self.reduction = _Reduction(self)

    def at(self, time_s: float, do: Callable[[float], None]) -> None:
        heapq.heappush(self.queue, (time_s, self.num_queued, do))
        self.num_queued += 1

    def run(self) -> Timeline:
        for rank in range(len(self.ranks)):
            self.at(0.0, lambda now, rank=rank: self.advance(rank, now))  # type: ignore[misc]
        while self.queue:
            now, _, do = heapq.heappop(self.queue)
            do(now)
        stuck = [rank for rank, state in enumerate(self.ranks) if state.position < len(state.actions)]
        assert not stuck, f"ranks {stuck} wait for ever"
        return merge("predicted", self.plan.workers, 0, self.events)

    def needed(self, rank: int, action: Action) -> tuple[str, int] | None:
        """Return what must have arrived before the action, if anything."""
        if action.kind == "F" and action.stage > 0:
            return ("F", action.microbatch)
        if action.kind == "B" and action.stage < self.plan.num_stages - 1:
            return ("B", action.microbatch)
        return None

    def advance(self, rank: int, now: float) -> None:
        """Start the rank's next action if it is idle and what it needs is here."""
        state = self.ranks[rank]
        if state.waiting_since_s is None or state.position == len(state.actions):
            return
        action = state.actions[state.position]
        need = self.needed(rank, action)
        if (need is not None and need not in state.arrived) or (action.kind == "R" and state.buckets_due):
            return
        if now > state.waiting_since_s:
            self.record(rank, "wait", state.waiting_since_s, now, action.microbatch)
        state.waiting_since_s = None
        seconds = self.seconds(rank, action)
        if action.kind != "R":
            self.record(rank, KIND_NAMES[action.kind], now, now + seconds, action.microbatch)
        if action.kind == "B" and action.microbatch == self.last_microbatch(rank):
            self.reduction.begin(rank, now, seconds)
        self.at(now + seconds, lambda then: self.finish(rank, action, then))

    def last_microbatch(self, rank: int) -> int:
        return self.plan.replicas[self.plan.replica_of(rank)].num_microbatches - 1

    def seconds(self, rank: int, action: Action) -> float:
        costs = {"F": self.workload.forward_s, "B": self.workload.backward_s, "S": self.workload.step_s}
        return costs[action.kind][rank] if action.kind in costs else 0.0

    def finish(self, rank: int, action: Action, now: float) -> None:
        state = self.ranks[rank]
        state.position += 1
        state.waiting_since_s = now
        if action.kind == "F" and action.stage < self.plan.num_stages - 1:
            self.send(rank, rank + 1, "F", action.microbatch, self.workload.forward_bytes[action.stage], now)
        if action.kind == "B" and action.stage > 0:
            self.send(rank, rank - 1, "B", action.microbatch, self.workload.backward_bytes[action.stage], now)
        self.advance(rank, now)

    def send(self, source: int, target: int, kind: str, microbatch: int, num_bytes: int, now: float) -> None:
        arrival_s = self.transfer(source, target, num_bytes, now, microbatch)

        def arrive(then: float) -> None:
            self.ranks[target].arrived.add((kind, microbatch))
            self.advance(target, then)

        self.at(arrival_s, arrive)

    def transfer(self, source: int, target: int, num_bytes: int, now: float, microbatch: int = -1) -> float:
        """Put bytes on the wire; return when the last one arrives."""
        names = self.plan.workers
        start_s, end_s, arrival_s = self.network.send(names[source], names[target], num_bytes, now)
        self.record(source, "send", start_s, end_s, microbatch, names[target], num_bytes)
        return arrival_s

    def record(
        self, rank: int, kind: str, start_s: float, end_s: float, microbatch: int, peer: str = "", num_bytes: int = 0
    ) -> None:
        self.events.append(Event(rank, _event_kind(kind), start_s, end_s, microbatch, peer, num_bytes))


def _event_kind(kind: str) -> EventKind:
    return kind  # type: ignore[return-value]  # KIND_NAMES and the literals here are EventKinds


class _Reduction:
    """Gradient buckets on their way: reduce-scatter, then all-gather, straight between the members.

    Each member owns one piece of every bucket. It sends the others' pieces to them; once it has every member's copy of
    its own piece it sends the sum back to all.
    """

    def __init__(self, play: _Play) -> None:
        self.play = play
        self.counts: dict[tuple[int, int, str], int] = {}
        for rank, state in enumerate(play.ranks):
            if len(play.plan.replicas) > 1:
                state.buckets_due = len(play.workload.bucket_bytes[play.plan.stage_of(rank)])

    def begin(self, rank: int, now: float, seconds: float) -> None:
        """Hand in the rank's buckets, evenly over its last backward."""
        buckets = self.play.workload.bucket_bytes[self.play.plan.stage_of(rank)]
        if len(self.play.plan.replicas) == 1:
            return
        for i in range(len(buckets)):
            ready_s = now + seconds * (i + 1) / len(buckets)
            self.play.at(ready_s, lambda then, i=i: self.spread(rank, i, "scatter", then))  # type: ignore[misc]

    def spread(self, rank: int, bucket: int, phase: str, now: float) -> None:
        """Send this phase's pieces of a bucket to every other member."""
        members = self.play.plan.data_group(self.play.plan.stage_of(rank))
        piece = -(-self.play.workload.bucket_bytes[self.play.plan.stage_of(rank)][bucket] // len(members))
        for other in members:
            if other != rank:
                arrival_s = self.play.transfer(rank, other, piece, now)
                self.play.at(arrival_s, lambda then, to=other: self.arrive(to, bucket, phase, then))  # type: ignore[misc]
        self.arrive(rank, bucket, phase, now)

    def arrive(self, rank: int, bucket: int, phase: str, now: float) -> None:
        """Count a piece, the member's own among them; go on once all are there."""
        key = (rank, bucket, phase)
        self.counts[key] = self.counts.get(key, 0) + 1
        if self.counts[key] < len(self.play.plan.replicas):
            return
        if phase == "scatter":
            self.spread(rank, bucket, "gather", now)
        else:
            self.play.ranks[rank].buckets_due -= 1
            self.play.advance(rank, now)


def simulate(plan: Plan, topology: Topology, workload: Workload) -> Timeline:
    """Play one step of the plan in virtual time and return what happened when."""
    return _Play(plan, topology, workload).run()
