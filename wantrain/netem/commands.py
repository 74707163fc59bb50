"""What to run so that a topology stands as a real network: pure, so that `--dry-run` prints exactly what is run.

    worker a                       hub                               worker b
    ┌──────────────┐   ┌───────────────────────────────┐   ┌──────────────────────┐
    │ e0 ─ HTB     │   │            bridge             │   │ mangle PREROUTING    │
    │  1:1 uplink  ╞═══╡ p0                         p1 ╞═══╡ one NFQUEUE a source │
    │   1:10 → b   │   │  └ HTB: a's downlink          │   │ e0                   │
    └──────────────┘   └───────────────────────────────┘   └──────────────────────┘

A rate is one HTB class per destination on the sender's egress, under a class for the uplink where there is one. In HTB
a child's `rate` is a guarantee that overrides its parent (three children of 100 Mbit/s under a parent of 100 sent 287),
so children of an uplink are guaranteed next to nothing and borrow up to `ceil`, the link's own rate; the uplink then
holds, and siblings share it in equal quanta. A downlink is shaped where the hub hands packets to the worker. A site
with a limit has a bridge of its own, joined to the hub's by a veth pair that is shaped on both ends.

Delay, jitter and loss are a netem leaf below the class. Where the kernel has no sch_netem, delay is an NFQUEUE rule per
source at the *receiver*, served by `delayline`; at the sender the waiting packets would count against TCP's own socket
and starve it (2 Mbit/s, measured).

No queue keeps its default length: netem's 1000 packets hold 50 ms only up to about 240 Mbit/s. All of them follow from
the bandwidth-delay product.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from wantrain.errors import EmulationError
from wantrain.topology import Limits, Link, Site, Topology

HUB = "_hub"
"""The namespace of the bridges; no worker's name starts with an underscore."""

INTERFACE = "e0"
"""Every worker's network interface."""

FRAME_BYTES = 1514
"""A full Ethernet frame as tc counts it: 1500 bytes and a header of 14."""

_BURST_S = 1e-3
"""Chosen: long enough that a late timer loses no rate, short enough that a pause earns next to no credit.

It counts in emulated time, so dilation lengthens it: the remedy where timers come late, as in virtual machines.
"""

_STANDING_S = 50e-3
"""Chosen: the least time that a queue can hold at full rate; shallow ones punish TCP's probing on short links."""

_LEAST_QUEUE_BYTES = 4 * 65536
"""Derived: a queue must hold a few of TCP's 64 kB segments-to-be, which pass the queues whole."""

_BORROWED_RATE = "8kbit"
"""A child's own guarantee below an uplink: next to nothing, all else is borrowed."""

_MOST_SEGMENT_BYTES = 65536
"""Linux' own bound for a segment-to-be."""

_RTO_MIN_S = 0.2
"""Linux' least retransmission time-out (TCP_RTO_MIN); it must grow with the dilation."""


@dataclass(frozen=True)
class Command:
    """One program call, to be made inside the sandbox; which namespace it means is part of it (`tc -n oregon-0 …`)."""

    argv: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.argv)


@dataclass(frozen=True)
class DelayQueue:
    """Packets from one source that wait `delay_s` in NFQUEUE `number` at their receiver."""

    number: int
    source: str
    delay_s: float

    def __str__(self) -> str:
        return f"{self.number}:{self.delay_s:.9f}"


@dataclass(frozen=True)
class NetworkCommands:
    """How a topology is built: workers' addresses in order, what to run, and which delay lines to keep running."""

    addresses: dict[str, str]
    commands: tuple[Command, ...]
    delay_lines: dict[str, tuple[DelayQueue, ...]]

    def delay_line_argvs(self) -> dict[str, list[str]]:
        """Return the program that delays what each worker receives, to be run in that worker's namespace."""
        module = [sys.executable, "-m", "wantrain.netem.delayline"]
        return {name: [*module, *map(str, queues)] for name, queues in self.delay_lines.items()}


def network_commands(
    topology: Topology, *, has_netem: bool, dilation: float = 1.0, iptables: str = "iptables-legacy"
) -> NetworkCommands:
    """Return what builds `topology`, with every rate divided and every time multiplied by `dilation`.

    Raises EmulationError where a link asks for jitter or loss and the kernel has no netem.
    """
    return _Network(topology, has_netem, dilation, iptables).commands()


def address(index: int) -> str:
    """Return the address of the worker at `index`, in 10.77.0.0/16."""
    return f"10.77.{(index + 1) >> 8}.{(index + 1) & 255}"


class _Network:
    """The names and numbers that every part of the network needs."""

    def __init__(self, topology: Topology, has_netem: bool, dilation: float, iptables: str) -> None:
        if not has_netem:
            _refuse_what_needs_netem(topology)
        self.topology = topology.dilated(dilation)
        self.names = [worker.name for worker in topology.workers]
        self.addresses = {name: address(i) for i, name in enumerate(self.names)}
        self.limited_sites = [site for site in self.topology.sites if _is_limited(site)]
        self.has_netem, self.dilation, self.iptables = has_netem, dilation, iptables

    def commands(self) -> NetworkCommands:
        delay_lines = {} if self.has_netem else self._delay_lines()
        argvs = [*self._bridges(), *self._joins(), *self._shaping(), *self._delay_rules(delay_lines)]
        return NetworkCommands(self.addresses, tuple(Command(argv) for argv in argvs), delay_lines)

    def _bridges(self) -> Iterator[tuple[str, ...]]:
        """The hub, and for every site with a limit a bridge and a shaped pair that joins it to the hub's."""
        ip = ("ip", "-n", HUB)
        yield "ip", "netns", "add", HUB
        for bridge in ("hub", *(f"s{k}" for k in range(len(self.limited_sites)))):
            yield *ip, "link", "add", "name", bridge, "type", "bridge", "mcast_snooping", "0"
            yield *ip, "link", "set", "dev", bridge, "up"
        for k, site in enumerate(self.limited_sites):
            yield *ip, "link", "add", "name", f"u{k}", "type", "veth", "peer", "name", f"d{k}"
            yield *ip, "link", "set", "dev", f"u{k}", "master", f"s{k}", "up"
            yield *ip, "link", "set", "dev", f"d{k}", "master", "hub", "up"
            yield from self._limit(f"u{k}", site.uplink_bytes_per_s)
            yield from self._limit(f"d{k}", site.downlink_bytes_per_s)

    def _bridge_of(self, site: str) -> str:
        limited = [one.name for one in self.limited_sites]
        return f"s{limited.index(site)}" if site in limited else "hub"

    def _joins(self) -> Iterator[tuple[str, ...]]:
        """A namespace for every worker, its interface, and its port on the bridge."""
        for name in self.names:
            yield "ip", "netns", "add", name
        for i, worker in enumerate(self.topology.workers):
            ends = (INTERFACE, "netns", worker.name, "type", "veth", "peer", "name", f"p{i}", "netns", HUB)
            yield "ip", "link", "add", "name", *ends
        for i, worker in enumerate(self.topology.workers):
            yield "ip", "-n", HUB, "link", "set", "dev", f"p{i}", "master", self._bridge_of(worker.site), "up"
        for i, worker in enumerate(self.topology.workers):
            yield from self._limit(f"p{i}", worker.downlink_bytes_per_s)
            yield from self._worker(worker.name)

    def _worker(self, name: str) -> Iterator[tuple[str, ...]]:
        """Kernel settings first (no IPv6 beside the shaped IPv4), then the interface."""
        ip = ("ip", "-n", name)
        yield "ip", "netns", "exec", name, "sh", "-c", self._settings(name)
        yield *ip, "link", "set", "dev", "lo", "up"
        if self._drops_packets(name):
            yield *ip, "link", "set", "dev", INTERFACE, "gso_max_segs", "1"  # else netem drops 64 kB at once
        yield *ip, "link", "set", "dev", INTERFACE, "gso_max_size", f"{self._segment_bytes(name)}"
        yield *ip, "addr", "add", f"{self.addresses[name]}/16", "dev", INTERFACE
        yield *ip, "link", "set", "dev", INTERFACE, "up"
        if self.dilation > 1:
            rto_ms = math.ceil(_RTO_MIN_S * self.dilation * 1000)
            yield *ip, "route", "change", "10.77.0.0/16", "dev", INTERFACE, "rto_min", f"{rto_ms}ms"

    def _segment_bytes(self, name: str) -> int:
        """Return the largest piece that TCP hands down whole: a millisecond of the worker's line.

        Pieces of 64 kB hold up what comes behind them, for 5 ms each at 100 Mbit/s; on a link that is busy both ways
        these are the acknowledgements, and BBR then takes a short link for a long one. Dilation lengthens the
        millisecond, or a slowed network would cut the same line's bytes into smaller pieces, each of them work.
        """
        uplink = self.topology.worker(name).uplink_bytes_per_s
        rates = [self.topology.link(name, other).bandwidth_bytes_per_s for other in self.names if other != name]
        rate = max(rates, default=0.0) if uplink is None else uplink
        return min(_MOST_SEGMENT_BYTES, max(2 * FRAME_BYTES, round(rate * _BURST_S * self.dilation)))

    def _settings(self, name: str) -> str:
        """TCP as on a host set up for long links: room for four bandwidth-delay products, no idle restart.

        Where nothing is lost or reordered the window grows as Reno's does, by acknowledgements alone. With BBR single
        payloads came half a second late: its probing pauses, presumably, whose clock is not dilated.
        """
        others = [self._bdp_bytes(a, b) for a, b in self._directed(name)]
        most = max([16 << 20, *(4 * math.ceil(one) for one in others)])
        is_steady = not any(link.loss or link.jitter_s for *_, link in self.topology.pairs())
        return (
            "set -e; cd /proc/sys/net; [ ! -e ipv6 ] || echo 1 >ipv6/conf/all/disable_ipv6; cd ipv4;"
            " echo 0 >tcp_slow_start_after_idle; echo 1 >tcp_no_metrics_save;"
            f" echo 4096 131072 {most} >tcp_rmem; echo 4096 65536 {most} >tcp_wmem"
            + ("; echo reno >tcp_congestion_control" if is_steady else "")
        )

    def _directed(self, name: str) -> Iterator[tuple[str, str]]:
        for other in self.names:
            if other != name:
                yield name, other
                yield other, name

    def _drops_packets(self, name: str) -> bool:
        return any(_needs_netem(self.topology.link(name, other)) for other in self.names if other != name)

    def _rtt_s(self, a: str, b: str) -> float:
        return self.topology.link(a, b).latency_s + self.topology.link(b, a).latency_s

    def _bdp_bytes(self, a: str, b: str) -> float:
        return self.topology.link(a, b).bandwidth_bytes_per_s * self._rtt_s(a, b)

    def _shaping(self) -> Iterator[tuple[str, ...]]:
        for worker in self.topology.workers:
            tc = ("tc", "-n", worker.name)
            yield *tc, "qdisc", "add", "dev", INTERFACE, "root", "handle", "1:", "htb", "default", "0"
            uplink = worker.uplink_bytes_per_s
            if uplink is not None:
                yield *tc, *self._class(INTERFACE, "1:", "1:1", uplink, _bit_per_s(uplink))
            for j, target in enumerate(self.names):
                if target != worker.name:
                    yield from ((*tc, *argv) for argv in self._to(worker.name, target, 0x10 + j, uplink))

    def _to(self, source: str, target: str, minor: int, uplink: float | None) -> Iterator[tuple[str, ...]]:
        """The class, queue and filter for what one worker sends to another."""
        link = self.topology.link(source, target)
        rate = link.bandwidth_bytes_per_s if uplink is None else min(uplink, link.bandwidth_bytes_per_s)
        own = _bit_per_s(rate) if uplink is None else _BORROWED_RATE
        classid = f"1:{minor:x}"
        yield self._class(INTERFACE, "1:" if uplink is None else "1:1", classid, rate, own)
        rtt_s = self._rtt_s(source, target)
        leaf = self._netem(link, rtt_s) if self.has_netem else self._fifo(rate, rtt_s)
        yield "qdisc", "add", "dev", INTERFACE, "parent", classid, "handle", f"{minor:x}:", *leaf
        match = ("u32", "match", "ip", "dst", f"{self.addresses[target]}/32", "flowid", classid)
        yield "filter", "add", "dev", INTERFACE, "parent", "1:", "protocol", "ip", "prio", "1", *match

    def _limit(self, port: str, bytes_per_s: float | None) -> Iterator[tuple[str, ...]]:
        """Shape everything that leaves one port of the hub."""
        if bytes_per_s is None:
            return
        tc = ("tc", "-n", HUB)
        yield *tc, "qdisc", "add", "dev", port, "root", "handle", "1:", "htb", "default", "1"
        yield *tc, *self._class(port, "1:", "1:1", bytes_per_s, _bit_per_s(bytes_per_s))
        yield *tc, "qdisc", "add", "dev", port, "parent", "1:1", "handle", "2:", *self._fifo(bytes_per_s, 0.0)

    def _class(self, device: str, parent: str, classid: str, bytes_per_s: float, rate: str) -> tuple[str, ...]:
        """A class that sends at `bytes_per_s` at most; the turns of siblings are two bursts long."""
        burst = max(2 * FRAME_BYTES, round(bytes_per_s * _BURST_S * self.dilation))
        ceil = ("ceil", _bit_per_s(bytes_per_s), "burst", f"{burst}", "cburst", f"{burst}")
        shape = ("htb", "rate", rate, *ceil, "quantum", f"{min(65536, 2 * burst)}")
        return "class", "add", "dev", device, "parent", parent, "classid", classid, *shape

    def _fifo(self, bytes_per_s: float, rtt_s: float) -> tuple[str, ...]:
        held = round(bytes_per_s * max(rtt_s, _STANDING_S * self.dilation))
        return "bfifo", "limit", f"{max(_LEAST_QUEUE_BYTES, held)}"

    def _netem(self, link: Link, rtt_s: float) -> tuple[str, ...]:
        """What the link holds in flight and what queues before it wait in the same place: the limit covers both."""
        held_s = link.latency_s + 4 * link.jitter_s + max(rtt_s, _STANDING_S * self.dilation)
        limit = max(1000, math.ceil(held_s * link.bandwidth_bytes_per_s / FRAME_BYTES))
        jitter = (f"{link.jitter_s * 1e6:.0f}us", "distribution", "normal") if link.jitter_s else ()
        loss = ("loss", f"{link.loss * 100:g}%") if link.loss else ()
        return "netem", "limit", f"{limit}", "delay", f"{link.latency_s * 1e6:.0f}us", *jitter, *loss

    def _delay_lines(self) -> dict[str, tuple[DelayQueue, ...]]:
        """One queue for each source that is not at distance zero; a worker's number in the file is its queue's."""
        lines = {}
        for target in self.names:
            sources = [(i, name) for i, name in enumerate(self.names) if name != target]
            queues = [DelayQueue(i, name, self.topology.link(name, target).latency_s) for i, name in sources]
            lines[target] = tuple(queue for queue in queues if queue.delay_s > 0)
        return {target: queues for target, queues in lines.items() if queues}

    def _delay_rules(self, delay_lines: dict[str, tuple[DelayQueue, ...]]) -> Iterator[tuple[str, ...]]:
        for target, queues in delay_lines.items():
            for queue in queues:
                match = ("-i", INTERFACE, "-s", self.addresses[queue.source])
                jump = ("-j", "NFQUEUE", "--queue-num", f"{queue.number}")
                yield "ip", "netns", "exec", target, self.iptables, "-t", "mangle", "-A", "PREROUTING", *match, *jump


def _bit_per_s(bytes_per_s: float) -> str:
    return f"{round(bytes_per_s * 8)}bit"


def _is_limited(place: Limits | Site) -> bool:
    return place.uplink_bytes_per_s is not None or place.downlink_bytes_per_s is not None


def _needs_netem(link: Link) -> bool:
    return link.jitter_s > 0 or link.loss > 0


def _refuse_what_needs_netem(topology: Topology) -> None:
    for a, b, link in topology.pairs():
        if _needs_netem(link):
            raise EmulationError(
                f"the link from '{a.name}' to '{b.name}' asks for {'loss' if link.loss else 'jitter'}, which needs"
                " sch_netem, and this kernel has none; install the kernel's extra modules (Debian, Ubuntu:"
                " linux-modules-extra-$(uname -r)), or leave jitter and loss out"
            )
