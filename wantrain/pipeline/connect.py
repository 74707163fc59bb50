"""Connect a rank to those it works with: the stages before and after it, and the other replicas of its stage.

    replica 0    rank 0 ═══ rank 1        ═══ pipeline: a channel for activations, one for their gradients
                   ║           ║           ║  data group: a channel for gradient buckets
    replica 1    rank 2 ═══ rank 3

    boundary whose codec remembers samples or may raise its bits: one more small channel each way, to agree on them

Each channel has connections of its own, and everything a rank sends leaves through one Sender, pipeline
first. The order in which payloads travel on a line is fixed by the plan at both ends, so nothing can wait in a circle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from wantrain.codecs.codec import Codec
from wantrain.comm.allreduce import Reducer
from wantrain.comm.channel import Channel, TwoWay
from wantrain.comm.groups import Membership
from wantrain.comm.sender import PIPELINE_PRIORITY, REDUCE_PRIORITY, Sender
from wantrain.comm.torch_channel import Opening
from wantrain.errors import WantrainError
from wantrain.pipeline.agreement import Agreement
from wantrain.pipeline.boundary import Inbox, Outbox, SendLog
from wantrain.pipeline.boundary_codecs import DEFAULT_SETTINGS, WAYS, BoundaryCodecs, CodecSettings, needs_agreement
from wantrain.pipeline.executor import Neighbour
from wantrain.pipeline.recorder import Recorder
from wantrain.plan import Plan
from wantrain.run_directory import LinkTraffic
from wantrain.wire import HEADER_BYTES, Transport, payload_bytes

_AGREE = "agree-"
AGREE_TRANSPORT = Transport(chunk_bytes=64 * 1024, num_posted=2)
"""Nine bytes a sample and step."""

_UP, _DOWN = "-up", "-down"
"""To the higher rank and to the lower one. Weight gradients go both ways at once: on one line the word that a chunk is
awaited would wait behind the chunks of the other way (100 Mbit/s, 20 ms: 86 Mbit/s each way, on two lines 95)."""

_EXPANSION_VALUES = 1 << 20
"""What a gradient codec saves is counted on a tensor of this size."""


OpenLines = Callable[[Mapping["Line", SendLog]], Sequence[Channel]]
"""Opens one end of each line, to be logged; over gloo in a job, in memory in tests."""


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
        for peer, boundary in ((rank - 1, stage - 1), (rank + 1, stage)):
            if 0 <= boundary < last:
                add(way, peer, plan.boundaries[boundary].transports[replica], PIPELINE_PRIORITY)
                if needs_agreement(plan, boundary, way):
                    add(_AGREE + way, peer, AGREE_TRANSPORT, PIPELINE_PRIORITY)
    others = [("data", other) for other in plan.data_group(stage) if other != rank]
    if is_tied and last > 0 and stage in (0, last):
        others.append(("tied", plan.rank_at(replica, last - stage)))
    for kind, other in others:
        for way in (_UP, _DOWN):
            add(kind + way, other, plan.gradient_transport, REDUCE_PRIORITY)
    return lines


class Connections:
    """Everything that joins one rank to the others."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        recorder: Recorder,
        open_lines: OpenLines,
        lines: Sequence[Line],
        timeout_s: float,
        device: torch.device | str = "cpu",
        settings: CodecSettings = DEFAULT_SETTINGS,
    ) -> None:
        """Open `lines`, all at once, and set up what works over them; activations arrive on `device`."""
        logs = {line: SendLog(recorder, line.peer) for line in lines}
        channels = self._channels = dict(zip(lines, open_lines(logs), strict=True))
        self._outboxes: list[Outbox] = []
        self._inboxes: list[Inbox] = []
        self._before: dict[str, LinkTraffic] = {}
        self._dilation = recorder.dilation
        self._gradient_expansion = _expansion(plan.gradient_codec)
        self.codecs = BoundaryCodecs(plan, rank, settings, device)
        stage = plan.stage_of(rank)

        def neighbour(peer_rank: int, boundary: int, sends: str, receives: str) -> Neighbour:
            ways = {line.kind: line for line in lines if line.peer_rank == peer_rank}
            out, back = ways[sends], ways[receives]
            sending, guard = self.codecs.sender(boundary, sends, out.peer)
            receiving = self.codecs.receiver(boundary, receives)

            def agreement(way: str, codec: Codec) -> Agreement | None:
                line = ways.get(_AGREE + way)
                return Agreement(channels[line], codec, timeout_s) if line is not None else None

            outbox = Outbox(
                channels[out], sending, recorder, logs[out], self._fail, agreement(sends, sending), guard
            )  # fmt: skip
            inbox = Inbox(channels[back], receiving, recorder, timeout_s, device, agreement(receives, receiving))
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
        settings: CodecSettings = DEFAULT_SETTINGS,
    ) -> Connections:
        """Connect to all that this rank works with; raise ChannelError where one doesn't come."""
        rank = membership.rank
        sender = Sender(plan.under_way_bytes.get(plan.workers[rank]))

        def open_lines(logs: Mapping[Line, SendLog]) -> list[Channel]:
            asked = [
                Opening(line.name, line.peer_rank, line.peer, sender, line.transport, line.priority, log)
                for line, log in logs.items()
            ]
            return membership.open_channels(asked, timeout_s)

        return cls(plan, rank, recorder, open_lines, lines_of(plan, rank, is_tied), timeout_s, device, settings)

    def _reducer(self, kind: str, plan: Plan, rank: int, timeout_s: float) -> Reducer | None:
        """Return the reducer over this rank's channels of a kind; members are numbered by rank."""
        found = {(line.kind, line.peer_rank): channel for line, channel in self._channels.items()}
        up, down = ({peer: one for (what, peer), one in found.items() if what == kind + way} for way in (_UP, _DOWN))
        if not up:
            return None
        members = sorted((rank, *up))
        by_member = {
            members.index(peer): TwoWay(up[peer], down[peer]) if peer > rank else TwoWay(down[peer], up[peer])
            for peer in up
        }
        return Reducer(members.index(rank), by_member, timeout_s, plan.gradient_codec)

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
        for line, channel in self._channels.items():
            stats = channel.stats
            so_far = totals.get(channel.peer, LinkTraffic(raw_bytes=0, wire_bytes=0, busy_s=0.0))
            expansion = 0.0 if line.kind.startswith(_AGREE) else self._gradient_expansion
            totals[channel.peer] = LinkTraffic(
                raw_bytes=so_far.raw_bytes + raw.get(id(channel), round(stats.payload_bytes_sent * expansion)),
                wire_bytes=so_far.wire_bytes + stats.wire_bytes_sent,
                busy_s=so_far.busy_s + stats.busy_s / self._dilation,
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
        self.codecs.close()
        channels: Sequence[Channel] = list(self._channels.values())
        with ThreadPoolExecutor(max(1, len(channels))) as pool:
            list(pool.map(lambda channel: channel.close(timeout_s), channels))


def _expansion(gradient_codec: str) -> float:
    """Return how many times larger gradients are as they are than through a codec."""
    shape = (_EXPANSION_VALUES,)
    return 4 * _EXPANSION_VALUES / (payload_bytes(gradient_codec, shape) - HEADER_BYTES)


def _difference(now: LinkTraffic, before: LinkTraffic) -> LinkTraffic:
    return LinkTraffic(
        raw_bytes=now.raw_bytes - before.raw_bytes,
        wire_bytes=now.wire_bytes - before.wire_bytes,
        busy_s=now.busy_s - before.busy_s,
    )
