"""Which network interface has an address, whether it is a tunnel, and from which ports this host gives out its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from wantrain.errors import ConfigError
from wantrain.launch.hosts import PortRange
from wantrain.netem.sandbox import search_path

_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


class Interface(NamedTuple):
    """A network interface of this host; `kind` is the kernel's word for what it is, empty for a network card."""

    name: str
    kind: str
    mtu: int

    @property
    def is_tunnel(self) -> bool:
        """Whether it is WireGuard's, the kernel's or a program's (tun)."""
        return self.kind in ("wireguard", "tun")


def interface_with(address: str) -> Interface:
    """Return the interface of this host that has an address.

    Raise ConfigError where none has it: gloo tells the others the address that it listens on, so one that only a
    router in front of this host knows can't be used.
    """
    found = _resolve(address)
    links = _ip("-details", "address", "show")
    for link in links:
        if found in (place.get("local") for place in link.get("addr_info", ())):
            if "LOOPBACK" in link.get("flags", ()):
                raise ConfigError(f"address {address} is this host's own loopback ({found}); give its outside address")
            return Interface(link["ifname"], link.get("linkinfo", {}).get("info_kind", ""), link["mtu"])
    own = [place["local"] for link in links for place in link.get("addr_info", ()) if place.get("scope") == "global"]
    raise ConfigError(
        f"address {address} is none of this host's (it has {', '.join(own) or 'none'});"
        " give one of them, or join the hosts by [wireguard]"
    )


def interface_called(name: str) -> Interface:
    """Return an interface of this host by name; raise ConfigError where there is none."""
    for link in _ip("-details", "address", "show"):
        if link["ifname"] == name:
            return Interface(name, link.get("linkinfo", {}).get("info_kind", ""), link["mtu"])
    raise ConfigError(f"this host has no interface '{name}'; leave it out, and it is found by the address")


def given_out_ports() -> PortRange:
    """Return the range from which the kernel chooses ports for who asks for none: gloo always does."""
    first, last = map(int, _PORT_RANGE.read_text().split())
    return PortRange.model_construct(first=first, last=last)


def require_ports(ports: PortRange) -> None:
    """Raise ConfigError where this host may give out ports outside `ports`."""
    own = given_out_ports()
    if not ports.holds(own):
        raise ConfigError(
            f"this host gives out ports {own} (ports says {ports}), and gloo can't be told which; let an administrator"
            f" run: sysctl -w net.ipv4.ip_local_port_range='{ports.first} {ports.last}'"
        )


def require_free(address: str, port: int) -> None:
    """Raise ConfigError where somebody listens on a port already."""
    try:
        with socket.create_server((address, port), family=_family(address)):
            return
    except OSError as caught:
        reason = os.strerror(caught.errno or 0).lower()
        raise ConfigError(f"can't use port {port} on {address} ({reason}); choose another port") from None


def _family(address: str) -> socket.AddressFamily:
    return socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]


def _resolve(address: str) -> str:
    try:
        return str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as caught:
        raise ConfigError(f"can't find address '{address}' ({caught.strerror}); check it") from None


def _ip(*words: str) -> list[dict[str, Any]]:
    program = shutil.which("ip", path=search_path())
    if program is None:
        raise ConfigError("the program ip is missing, which finds the network interface; sudo apt-get install iproute2")
    out = subprocess.run([program, "-json", *words], capture_output=True, text=True, check=True).stdout
    found: list[dict[str, Any]] = json.loads(out)
    return found
