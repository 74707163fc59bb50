"""The hosts file: where each worker of a plan runs, how it is reached, and on which network they talk.

    port = 29500                          # where they meet, on the first worker's host
    ports = "40000-40999"                 # where workers listen; the hosts' own range is held against it

    [wireguard]                           # without it: addresses must be private, or --insecure
    network = "10.77.0.0/24"

    [[host]]
    workers = ["paris-0"]
    ssh = "anna@gpu1.lab-a.example"       # as for ssh; ~/.ssh/config holds
    python = "/home/anna/wantrain/.venv/bin/python"
    folder = "/data/anna/runs"
    endpoint = "gpu1.lab-a.example"       # with [wireguard]: where its tunnel is reached from outside
    address = "10.0.0.7"                  # without: where the other hosts reach it

Between hosts goes what training needs, in the clear: gloo and torch's store neither encrypt nor ask who speaks. So what
is public is refused here, before anything starts.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from wantrain.errors import ConfigError
from wantrain.fact import Fact, read_toml
from wantrain.launch.torchrun import MASTER_PORT

WIREGUARD_PORT = 51820
"""WireGuard's customary one."""

_RANGE = re.compile(r"^(\d{1,5})-(\d{1,5})$")


class PortRange(Fact):
    """The ports from `first` to `last`, both included."""

    first: int = Field(ge=1024, le=65535)
    last: int = Field(ge=1024, le=65535)

    @classmethod
    def of(cls, text: str) -> Self:
        """Parse "40000-40999"; raise ValueError."""
        found = _RANGE.match(text)
        if found is None or int(found[1]) > int(found[2]):
            raise ValueError(f'expected a range of ports like "40000-40999" (got {text!r})')
        return cls(first=int(found[1]), last=int(found[2]))

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    def holds(self, other: PortRange) -> bool:
        """Say whether all ports of the other range are in this one."""
        return self.first <= other.first and other.last <= self.last


class WireGuard(Fact):
    """A network of encrypted tunnels, one interface on each host."""

    network: str
    """Private addresses for the tunnels: "10.77.0.0/24"."""
    port: int = Field(default=WIREGUARD_PORT, ge=1, le=65535)
    """UDP; the only port that the hosts' firewalls need to open to each other."""
    interface: str = Field(default="wantrain", pattern=r"^[a-zA-Z0-9_.-]{1,15}$")

    @field_validator("network")
    @classmethod
    def _is_private_network(cls, text: str) -> str:
        network = ipaddress.ip_network(text)
        if not network.is_private:
            raise ValueError(f"network must be of private addresses, like 10.77.0.0/24 (got {text})")
        return text

    def addresses(self, count: int) -> list[str]:
        """Return the first `count` addresses; raise ValueError where there are fewer."""
        network = ipaddress.ip_network(self.network)
        if network.num_addresses - 2 < count:
            raise ValueError(f"wireguard.network {network} has no room for {count} hosts; take a larger one")
        return [str(network[i + 1]) for i in range(count)]


class Host(Fact):
    """One machine: which workers run on it, and how it is reached."""

    workers: tuple[str, ...] = Field(min_length=1)
    ssh: str = Field(min_length=1, pattern=r"^[^-\s]\S*$")
    """What ssh calls it: a name of ~/.ssh/config, or user@host."""
    ssh_options: tuple[str, ...] = ()
    """More words for the ssh command line: ["-p", "2222"]."""
    address: str = ""
    """Where the other hosts reach it. With [wireguard] it is the tunnel's, and given out in the order of the file."""
    endpoint: str = ""
    """With [wireguard]: the name or address at which the tunnel is reached from outside; empty behind a NAT."""
    interface: str = ""
    """The network interface with that address; empty finds it."""
    python: str = "python3"
    """The interpreter there that has wantrain."""
    folder: str = "wantrain-runs"
    """Where run directories are kept there; relative to the home directory of the ssh user."""
    data: str = ""
    """The training text there, where it isn't at the run file's path."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.workers[0]


class Hosts(Fact):
    """A whole hosts file."""

    hosts: tuple[Host, ...] = Field(alias="host", min_length=1)
    port: int = Field(default=MASTER_PORT, ge=1024, le=65535)
    ports: PortRange | None = None
    wireguard: WireGuard | None = None

    @field_validator("ports", mode="before")
    @classmethod
    def _parse_ports(cls, given: object) -> object:
        return PortRange.of(given) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _complete(self) -> Self:
        names = [worker for host in self.hosts for worker in host.workers]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"worker '{twice}' runs on two hosts")
        if self.wireguard is not None:
            return self._with_tunnels(self.wireguard)
        for host in self.hosts:
            if not host.address:
                raise ValueError(f"host '{host.name}' has no address; say where the other hosts reach it")
            if host.endpoint:
                raise ValueError(f"host '{host.name}' has an endpoint but the file no [wireguard]; give an address")
        return self

    def _with_tunnels(self, wireguard: WireGuard) -> Self:
        """Give every host its address in the tunnel's network."""
        network = ipaddress.ip_network(wireguard.network)
        hosts = []
        for host, given in zip(self.hosts, wireguard.addresses(len(self.hosts)), strict=True):
            if host.address and ipaddress.ip_address(host.address) not in network:
                raise ValueError(f"host '{host.name}' has address {host.address}, outside wireguard.network {network}")
            hosts.append(host.model_copy(update={"address": host.address or given}))
        outward = [host for host in hosts if host.endpoint]
        if len(hosts) - len(outward) > 1:
            raise ValueError("two hosts without an endpoint can't reach each other; give all but one an endpoint")
        if len({host.address for host in hosts}) < len(hosts):
            raise ValueError("two hosts have one address in the tunnel's network")
        object.__setattr__(self, "hosts", tuple(hosts))  # frozen to everybody else; this is still its making
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a hosts file (TOML)."""
        return cls.parse(read_toml(path, ConfigError), ConfigError, str(path))

    def host_of(self, worker: str) -> Host:
        """Return where a worker runs."""
        for host in self.hosts:
            if worker in host.workers:
                return host
        raise ConfigError(f"no host has worker '{worker}' of the plan; add it to a [[host]]'s workers")

    def require(self, workers: Sequence[str], insecure: bool) -> None:
        """Raise ConfigError where a worker has no host, or what they say would be public (unless `insecure`)."""
        used = [self.host_of(worker) for worker in workers]
        if self.wireguard is not None or insecure:
            return
        for host in used:
            public = next(_public(host.address), None)
            if public is not None:
                raise ConfigError(
                    f"host '{host.name}' is reached at {public}, a public address, and what workers send isn't"
                    " encrypted; add [wireguard] and see 'wantrain wireguard', or say --insecure"
                )


def _public(address: str) -> Iterator[str]:
    """Yield the public addresses that a name or address stands for; raise ConfigError where a name isn't known."""
    try:
        found = {place[4][0] for place in socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)}
    except OSError as caught:
        raise ConfigError(f"can't find address '{address}' ({caught.strerror}); check the hosts file") from None
    for one in sorted(map(str, found)):
        if ipaddress.ip_address(one.partition("%")[0]).is_global:
            yield one if one == address else f"{address} ({one})"
