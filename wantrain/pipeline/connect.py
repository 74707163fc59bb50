"""Connect a rank to those it works with: the stages before and after it, and the other replicas of its stage.

    replica 0    rank 0 ═══ rank 1        ═══ pipeline: a channel for activations, one for their gradients
                   ║           ║           ║  data group: a channel for gradient buckets
    replica 1    rank 2 ═══ rank 3

Each channel has connections of its own, and everything a rank sends leaves through one Sender, pipeline
first. The order in which payloads travel on a line is fixed by the plan at both ends, so nothing can wait in a circle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from wantrain.codecs.codec import make_codec
from wantrain.comm.allreduce import Reducer
from wantrain.comm.channel import Channel
from wantrain.comm.groups import Membership
from wantrain.comm.sender import PIPELINE_PRIORITY, REDUCE_PRIORITY, Sender
from wantrain.errors import WantrainError
from wantrain.pipeline.boundary import Inbox, Outbox, SendLog
from wantrain.pipeline.executor import Neighbour
from wantrain.pipeline.recorder import Recorder
from wantrain.plan import Plan
from wantrain.run_directory import LinkTraffic
from wantrain.wire import Transport, wire_format

WAYS = ("forward", "backward")
"""A boundary's two channels. On one alone, what one end tells the other about room for more would queue behind its own
payloads."""

OpenChannel = Callable[["Line", SendLog], Channel]
"""Opens one end of a line; over gloo in a job, in memory in tests."""


@dataclass(frozen=True)
class Line:
    """One channel that the plan asks for between two ranks."""

    kind: str
    own_rank: int
    peer_rank: int
    peer: str
    transport: Transport
    priority: int

    @property
    def name(self) -> str:
        """What both ends call it."""
        low, high = sorted((self.own_rank, self.peer_rank))
        return f"{self.kind}/{low}-{high}"


def lines_of(plan: Plan, rank: int, is_tied: bool = False) -> list[Line]:
    """List the channels of one rank. `is_tied`: it shares a parameter with the other end of its pipeline."""
    stage, replica, last = plan.stage_of(rank), plan.replica_of(rank), plan.num_stages - 1
    lines = []

    def add(kind: str, peer: int, transport: Transport, priority: int) -> None:
        lines.append(Line(kind, rank, peer, plan.workers[peer], transport, priority))

    for way in WAYS:
        if stage > 0:
            add(way, rank - 1, plan.boundaries[stage - 1].transports[replica], PIPELINE_PRIORITY)
        if stage < last:
            add(way, rank + 1, plan.boundaries[stage].transports[replica], PIPELINE_PRIORITY)
    for other in plan.data_group(stage):
        if other != rank:
            add("data", other, plan.gradient_transport, REDUCE_PRIORITY)
    if is_tied and last > 0 and stage in (0, last):
        add("tied", plan.rank_at(replica, last - stage), plan.gradient_transport, REDUCE_PRIORITY)
    return lines


class Connections:
    """Everything that joins one rank to the others."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        recorder: Recorder,
        open_channel: OpenChannel,
        lines: Sequence[Line],
        timeout_s: float,
        device: torch.device | str = "cpu",
    ) -> None:
        """Open `lines`, all at once, and set up what works over them; activations arrive on `device`."""
        logs = {line: SendLog(recorder, line.peer) for line in lines}
        with ThreadPoolExecutor(max(1, len(lines))) as pool:
            opened = pool.map(open_channel, lines, logs.values())
            channels = self._channels = dict(zip(lines, opened, strict=True))
        self._outboxes: list[Outbox] = []
        self._inboxes: list[Inbox] = []
        self._before: dict[str, LinkTraffic] = {}
        self._dilation = recorder.dilation
        self._gradient_expansion = 32 / wire_format(plan.gradient_codec).bits
        stage = plan.stage_of(rank)

        def neighbour(peer_rank: int, boundary: int, sends: str, receives: str) -> Neighbour:
            ways = {line.kind: line for line in lines if line.kind in WAYS and line.peer_rank == peer_rank}
            out, back, chosen = ways[sends], ways[receives], plan.boundaries[boundary]
            codecs = {"forward": chosen.forward_codec, "backward": chosen.backward_codec}
            outbox = Outbox(channels[out], make_codec(codecs[sends]), recorder, logs[out], self._fail)
            inbox = Inbox(channels[back], make_codec(codecs[receives]), recorder, timeout_s, device)
            self._outboxes.append(outbox)
            self._inboxes.append(inbox)
            return Neighbour(inbox, outbox)

        self.upstream = neighbour(rank - 1, stage - 1, "backward", "forward") if stage > 0 else None
        self.downstream = neighbour(rank + 1, stage, "forward", "backward") if stage < plan.num_stages - 1 else None
        self.data_reducer = self._reducer("data", plan, rank, timeout_s)
        self.tied_reducer = self._reducer("tied", plan, rank, timeout_s)

    @classmethod
    def open(
        cls,
        plan: Plan,
        membership: Membership,
        recorder: Recorder,
        timeout_s: float,
        *,
        is_tied: bool = False,
        device: torch.device | str = "cpu",
    ) -> Connections:
        """Connect to all that this rank works with; raise ChannelError where one doesn't come."""
        rank = membership.rank
        sender = Sender(plan.under_way_bytes.get(plan.workers[rank]))

        def open_line(line: Line, log: SendLog) -> Channel:
            return membership.open_channel(
                line.name, line.peer_rank, line.peer, line.transport, sender, line.priority, timeout_s, log
            )

        return cls(plan, rank, recorder, open_line, lines_of(plan, rank, is_tied), timeout_s, device)

    def _reducer(self, kind: str, plan: Plan, rank: int, timeout_s: float) -> Reducer | None:
        """Return the reducer over this rank's channels of a kind; members are numbered by rank."""
        found = {line.peer_rank: channel for line, channel in self._channels.items() if line.kind == kind}
        if not found:
            return None
        members = sorted((rank, *found))
        make = partial(make_codec, plan.gradient_codec)
        return Reducer(members.index(rank), {members.index(peer): found[peer] for peer in found}, timeout_s, make, make)

    def _fail(self, error: WantrainError) -> None:
        """Let what waits on any neighbour hear of an error on the way to another."""
        for inbox in self._inboxes:
            inbox.fail(error)

    def raise_if_failed(self) -> None:
        """Raise the error that ended one of this rank's boxes, if any has ended."""
        for inbox in self._inboxes:
            inbox.raise_if_failed()

    def begin_step(self) -> None:
        """Count traffic from here."""
        self._before = self._totals()

    def traffic(self) -> dict[str, LinkTraffic]:
        """Return what this rank has sent since `begin_step`, by peer."""
        now = self._totals()
        none = LinkTraffic(raw_bytes=0, wire_bytes=0, busy_s=0.0)
        return {peer: _difference(now[peer], self._before.get(peer, none)) for peer in now}

    def _totals(self) -> dict[str, LinkTraffic]:
        raw = {id(outbox.channel): outbox.raw_bytes for outbox in self._outboxes}
        totals: dict[str, LinkTraffic] = {}
        for channel in self._channels.values():
            stats = channel.stats
            so_far = totals.get(channel.peer)
            totals[channel.peer] = LinkTraffic(
                raw_bytes=raw.get(id(channel), round(stats.payload_bytes_sent * self._gradient_expansion))
                + (so_far.raw_bytes if so_far else 0),
                wire_bytes=stats.wire_bytes_sent + (so_far.wire_bytes if so_far else 0),
                busy_s=stats.busy_s / self._dilation + (so_far.busy_s if so_far else 0.0),
            )
        return totals

    def close(self, timeout_s: float) -> None:
        """End every channel by agreement; all ranks call it once nothing is under way."""
        for reducer in (self.data_reducer, self.tied_reducer):
            if reducer is not None:
                reducer.close(timeout_s)
        for outbox in self._outboxes:
            outbox.close()
        for inbox in self._inboxes:
            inbox.close()
        channels: Sequence[Channel] = list(self._channels.values())
        with ThreadPoolExecutor(max(1, len(channels))) as pool:
            list(pool.map(lambda channel: channel.close(timeout_s), channels))


def _difference(now: LinkTraffic, before: LinkTraffic) -> LinkTraffic:
    return LinkTraffic(
        raw_bytes=now.raw_bytes - before.raw_bytes,
        wire_bytes=now.wire_bytes - before.wire_bytes,
        busy_s=now.busy_s - before.busy_s,
    )
