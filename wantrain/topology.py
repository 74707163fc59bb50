"""Who takes part, and the link of every ordered pair.

A topology file says what is known, at the grain at which it is known: a link between two sites holds for all their
workers, a link between two workers overrides it. Links are directed; ``between`` sets both directions, ``from``/``to``
one. Latency is one way. A limit on the uplink or downlink of a worker or a site is shared by everything that leaves
or enters it (a home line, an instance's network card, a lab's exit).

    [[worker]]                        [[site]]                    [[link]]
    name = "oregon"                   name = "oregon"             between = ["oregon", "virginia"]
    count = 2      # oregon-0, -1     uplink = "1 Gbit/s"         bandwidth = "790 Mbit/s"
    site = "oregon"                                               latency = "33 ms"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from wantrain import units
from wantrain.errors import TopologyError
from wantrain.fact import Fact, read_toml

Seconds = Annotated[float, BeforeValidator(units.parse_time_s)]
Size = Annotated[int, BeforeValidator(units.parse_bytes)]
Rate = Annotated[float, BeforeValidator(units.parse_bytes_per_s)]
Speed = Annotated[float, BeforeValidator(units.parse_flops_per_s)]
Share = Annotated[float, BeforeValidator(units.parse_fraction)]

DEFAULT_FLOPS_PER_S = 50e9
"""Chosen: two cores of a laptop on a small transformer, in fp32; a topology should say its own."""

DEFAULT_MEMORY_BYTES = 8 * 2**30
"""Chosen: a laptop's share; a topology should say its own."""


PAYLOAD_SHARE = 0.955
"""What TCP gets of a line's own rate, as tc and providers count it: 1448 bytes of every 1514, less acknowledgements."""


class Limits(Fact):
    """What a worker or a site can send and receive in all, over all its links."""

    uplink_bytes_per_s: Rate | None = Field(default=None, alias="uplink")
    downlink_bytes_per_s: Rate | None = Field(default=None, alias="downlink")


class Worker(Limits):
    """A machine taking part."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    site: str = Field(default="", max_length=64, pattern=r"^[A-Za-z0-9_.-]*$")
    device: str = "cpu"
    memory_bytes: Size = Field(default=DEFAULT_MEMORY_BYTES, alias="memory")
    flops_per_s: Speed = Field(default=DEFAULT_FLOPS_PER_S, alias="flops")
    codec_values_per_s: float | None = Field(default=None, gt=0, alias="codec_speed")
    """Values that an encode, or a decode, of a quantizing codec gets through: a plain number. None: not known."""
    address: str | None = None
    price_per_hour: float = Field(default=0.0, ge=0)
    """Plain number, in whatever currency all prices of the file are."""


class Site(Limits):
    """A place whose workers share a line to the outside; traffic inside it is not counted."""

    name: str = Field(min_length=1)


class Link(Fact):
    """One direction of a connection between two workers: `latency_s` is one way, `jitter_s` its standard deviation."""

    bandwidth_bytes_per_s: Rate = Field(alias="bandwidth")
    latency_s: Seconds = Field(default=0.0, alias="latency")
    jitter_s: Seconds = Field(default=0.0, alias="jitter")
    loss: Share = 0.0
    price_per_gb: float = Field(default=0.0, ge=0)
    """What its sender pays for 10⁹ bytes."""


class _LinkRule(Link):
    """A [[link]] of the file: which ordered pairs it holds for."""

    within: str | None = None
    between: tuple[str, str] | None = None
    source: str | None = Field(default=None, alias="from")
    target: str | None = Field(default=None, alias="to")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        ways = [self.within is not None, self.between is not None, self.source is not None or self.target is not None]
        if sum(ways) != 1 or (self.source is None) != (self.target is None):
            raise ValueError("a link needs exactly one of: within = SITE, between = [A, B], or from = A with to = B")
        return self

    @property
    def ends(self) -> list[tuple[str, str]]:
        """The ordered pairs of names (of sites or workers) that the rule speaks of."""
        if self.within is not None:
            return [(self.within, self.within)]
        if self.between is not None:
            return [self.between, self.between[::-1]]
        assert self.source is not None
        assert self.target is not None
        return [(self.source, self.target)]

    def as_link(self) -> Link:
        return Link.model_construct(**{name: getattr(self, name) for name in Link.model_fields})


class Topology(Fact):
    """All workers, and the link of every ordered pair of them."""

    name: str
    description: str = ""
    source: str = ""
    workers: tuple[Worker, ...] = Field(alias="worker", min_length=1)
    sites: tuple[Site, ...] = Field(default=(), alias="site")
    rules: tuple[_LinkRule, ...] = Field(default=(), alias="link")

    @field_validator("workers", mode="before")
    @classmethod
    def _expand_counts(cls, given: Any) -> Any:
        """Write a worker with `count = 3` out as three: name-0, name-1, name-2."""
        if not isinstance(given, list):
            return given
        out: list[Any] = []
        for worker in given:
            if not isinstance(worker, dict) or "count" not in worker:
                out.append(worker)
                continue
            rest = {key: value for key, value in worker.items() if key != "count"}
            if not isinstance(worker["count"], int) or worker["count"] < 1:
                raise ValueError(f"count must be a whole number above zero (got {worker['count']!r})")
            out += [rest | {"name": f"{rest.get('name', '')}-{i}"} for i in range(worker["count"])]
        return out

    @model_validator(mode="after")
    def _complete(self) -> Self:
        names = [worker.name for worker in self.workers]
        for name in names:
            if names.count(name) > 1 and len(names) < 2000:
                raise ValueError(f"two workers are called '{name}'")
        known = set(names) | {worker.site for worker in self.workers}
        for site in self.sites:
            if site.name not in known:
                raise ValueError(f"site '{site.name}' has no worker")
        for rule in self.rules:
            for end in {name for pair in rule.ends for name in pair}:
                if end not in known:
                    raise ValueError(f"a link names '{end}', which is neither a worker nor a site")
        missing = [(a, b) for a, b in self.site_pairs() if self._find(a, b) is None]
        if missing:
            a, b = missing[0]
            more = f" and {len(missing) - 1} more pairs" if len(missing) > 1 else ""
            raise ValueError(f"no link from '{a.name}' to '{b.name}'{more}; add a [[link]] between their sites")
        return self

    def site_pairs(self) -> Iterator[tuple[Worker, Worker]]:
        """Yield ordered pairs of workers such that every distinct pair of ends that a rule could name comes up."""
        named = {name for rule in self.rules for pair in rule.ends for name in pair}
        kept: list[Worker] = []
        per_site: dict[str, int] = {}
        for worker in self.workers:
            if worker.name in named or per_site.get(worker.site, 0) < 2:
                per_site[worker.site] = per_site.get(worker.site, 0) + 1
                kept.append(worker)
        yield from ((a, b) for a in kept for b in kept if a.name != b.name)

    @cached_property
    def _by_ends(self) -> dict[tuple[str, str], Link]:
        return {ends: rule.as_link() for rule in self.rules for ends in rule.ends}

    @cached_property
    def _by_name(self) -> dict[str, Worker]:
        return {worker.name: worker for worker in self.workers}

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some values replaced; what was looked up before is looked up anew."""
        copy = super().model_copy(update=update, deep=deep)
        for cached in ("_by_ends", "_by_name"):
            copy.__dict__.pop(cached, None)
        return copy

    def _find_ends(self, a: Worker, b: Worker) -> tuple[str, str] | None:
        ways = ((a.name, b.name), (a.name, b.site), (a.site, b.name), (a.site, b.site))
        return next((ends for ends in ways if ends in self._by_ends), None)

    def _find(self, a: Worker, b: Worker) -> Link | None:
        ends = self._find_ends(a, b)
        return None if ends is None else self._by_ends[ends]

    def link_ends(self, source: str, target: str) -> tuple[str, str]:
        """Return between whom the link of two workers is said to be: themselves, or their sites."""
        ends = self._find_ends(self.worker(source), self.worker(target))
        if ends is None:
            raise TopologyError(f"topology '{self.name}' has no link from '{source}' to '{target}'")
        return ends

    def worker(self, name: str) -> Worker:
        """Return a worker by name."""
        if name not in self._by_name:
            raise TopologyError(f"topology '{self.name}' has no worker '{name}' (it has {', '.join(self._by_name)})")
        return self._by_name[name]

    def link(self, source: str, target: str) -> Link:
        """Return the link from one worker to another, both by name; the most particular rule holds."""
        link = self._find(self.worker(source), self.worker(target))
        if link is None or source == target:
            raise TopologyError(f"topology '{self.name}' has no link from '{source}' to '{target}'")
        return link

    def pairs(self) -> Iterator[tuple[Worker, Worker, Link]]:
        """Yield every ordered pair of distinct workers with its link."""
        for a in self.workers:
            for b in self.workers:
                if a.name != b.name:
                    yield a, b, self.link(a.name, b.name)

    def shared_limits(self, source: str, target: str) -> list[tuple[tuple[str, ...], float]]:
        """Return the shared lines on the way from one worker to another: ((kind, name), bytes per second) each."""
        a, b = self.worker(source), self.worker(target)
        ends: list[tuple[str, str, float | None]] = [
            ("uplink", a.name, a.uplink_bytes_per_s),
            ("downlink", b.name, b.downlink_bytes_per_s),
        ]
        if a.site != b.site:
            ends += [("site uplink", site.name, site.uplink_bytes_per_s) for site in self.sites if site.name == a.site]
            ends += [
                ("site downlink", site.name, site.downlink_bytes_per_s) for site in self.sites if site.name == b.site
            ]
        return [((kind, name), rate) for kind, name, rate in ends if rate is not None]

    def send_limit_bytes_per_s(self, source: str, target: str) -> float:
        """Return what one sender alone can get across: the least of link, uplinks and downlinks on the way."""
        shared = [rate for _, rate in self.shared_limits(source, target)]
        return min([self.link(source, target).bandwidth_bytes_per_s, *shared])

    def payload_bytes_per_s(self, source: str, target: str) -> float:
        """Return what of `send_limit_bytes_per_s` is payload: rates are the links' own, headers included."""
        return PAYLOAD_SHARE * self.send_limit_bytes_per_s(source, target)

    def with_link(self, source: str, target: str, **changes: float) -> Self:
        """Return the topology with other figures for one directed link, between two workers or between two sites.

        `changes` are fields of Link. Links between workers that have a rule of their own don't follow their sites'.
        """
        known = {worker.name for worker in self.workers} | {worker.site for worker in self.workers}
        for end in (source, target):
            if end not in known:
                raise TopologyError(f"topology '{self.name}' has no worker or site '{end}'")
        a = next(worker for worker in self.workers if source in (worker.name, worker.site))
        b = next(worker for worker in self.workers[::-1] if target in (worker.name, worker.site))
        link = self._find(a, b)
        if link is None or a.name == b.name:
            raise TopologyError(f"topology '{self.name}' has no link from '{source}' to '{target}'")
        values = {name: getattr(link, name) for name in Link.model_fields} | changes
        rule = _LinkRule.model_construct(source=source, target=target, within=None, between=None, **values)
        return self.model_copy(update={"rules": (*self.rules, rule)})

    def dilated(self, dilation: float) -> Topology:
        """Return the same network with every rate divided and every latency multiplied by `dilation`."""

        def slower(fact: Any, rates: tuple[str, ...], times: tuple[str, ...] = ()) -> Any:
            now = {name: getattr(fact, name) for name in (*rates, *times)}
            changed = {name: now[name] / dilation for name in rates if now[name] is not None}
            return fact.model_copy(update=changed | {name: now[name] * dilation for name in times})

        limits = ("uplink_bytes_per_s", "downlink_bytes_per_s")
        return Topology.model_construct(
            name=self.name,
            description=self.description,
            source=self.source,
            workers=tuple(slower(worker, limits) for worker in self.workers),
            sites=tuple(slower(site, limits) for site in self.sites),
            rules=tuple(slower(rule, ("bandwidth_bytes_per_s",), ("latency_s", "jitter_s")) for rule in self.rules),
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a topology from a TOML file."""
        data = read_toml(path, TopologyError)
        return cls.parse({"name": Path(path).stem} | data, TopologyError, str(path))
