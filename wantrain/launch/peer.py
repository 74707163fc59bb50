"""`wantrain doctor --peer HOST`: what lies between this machine and another, looked at from both ends.

An agent (`agent.py`) is started there by ssh; for a moment both ends listen on ports such as a job uses.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

from wantrain.errors import ConfigError
from wantrain.launch.connection import Connection
from wantrain.launch.environment import Environment
from wantrain.launch.hosts import Host, Hosts
from wantrain.launch.interfaces import interface_with
from wantrain.launch.reach import Answerer, Reached, path_mtu, reach
from wantrain.launch.torchrun import MASTER_PORT
from wantrain.units import format_time

_REACH_WITHIN_S = 10.0
_ECHO_WITHIN_S = 1.0
_CLOCK_WITHIN_S = 1.0

Found = tuple[str, str, str, str]
"""What was looked at, its state (as the doctor's findings have it), what was found, the remedy."""


def peer_host(name: str, hosts: str | None) -> tuple[Host, int]:
    """Return a peer and the port where a job would meet: by a worker's name in a hosts file, or as ssh knows it."""
    if hosts is None:
        return Host(workers=(name,), ssh=name), MASTER_PORT
    found = Hosts.load(hosts)
    return found.host_of(name), found.port


def look_at(host: Host, port: int) -> Iterator[Found]:
    """Look at a peer and the line to it; raise ConfigError or RunError where ssh doesn't get there."""
    connection = Connection(host)
    try:
        connection.send("hello")
        said = connection.answer("hello")
        yield _software(host, {name: value for name, value in said.items() if name != "is"})
        yield from _line(connection, host.address or _address_of(connection), port)
    finally:
        connection.close()


def _address_of(connection: Connection) -> str:
    """Return where ssh's connection came in."""
    connection.send("peer")
    return str(connection.answer("peer")["address"])


def _software(host: Host, said: dict[str, str]) -> Found:
    there = Environment.model_validate(said)
    try:
        Environment.here().require_same(there, host.name)
    except ConfigError as caught:
        problem, _, remedy = str(caught).rpartition("; ")
        return "software there", "missing", problem, remedy
    return "software there", "ok", f"Python {there.python}, torch {there.torch}, wantrain {there.wantrain}", ""


def _line(connection: Connection, address: str, port: int) -> Iterator[Found]:
    connection.send("listen", address=address, ports=[port, 0])
    there = connection.answer("listening")["ports"]
    reached: Reached | None = None
    for what, one in zip(("meeting port", "a port of gloo's"), there, strict=True):
        try:
            reached = reach(address, one, _REACH_WITHIN_S)
            yield what, "ok", f"{address} port {one} is reached", ""
        except OSError as caught:
            yield what, "missing", f"{address} port {one}: {_why(caught)}", "open its firewall, or use WireGuard"
    yield _way_back(connection, address)
    if reached is not None:
        yield "round trip", "ok", format_time(reached.round_trip_s), ""
        yield _mtu(address, there[1])
        yield _clock(reached)


def _way_back(connection: Connection, address: str) -> Found:
    """Have the peer connect to a port here."""
    own = own_address_towards(address)
    answerer = Answerer(own)
    try:
        connection.send("reach", places=[("here", own, answerer.port)])
        failed = connection.answer("reached")["failed"]
    finally:
        answerer.close()
    if failed:
        return "the way back", "missing", failed[0][1], "open this machine's firewall, or use WireGuard"
    return "the way back", "ok", f"{own} port {answerer.port} is reached from there", ""


def _mtu(address: str, port: int) -> Found:
    found = path_mtu(address, port, _ECHO_WITHIN_S)
    if found is None:
        return "MTU", "limited", "unknown: no UDP comes back", "for WireGuard, open its UDP port"
    interface = interface_with(own_address_towards(address))
    if found < interface.mtu:
        remedy = f"sudo ip link set dev {interface.name} mtu {found}"
        return "MTU", "limited", f"{found} bytes get there whole; {interface.name} sends up to {interface.mtu}", remedy
    return "MTU", "ok", f"{found} bytes get there whole", ""


def _clock(reached: Reached) -> Found:
    detail = f"{reached.clock_ahead_s * 1e3:+.1f} ms there, ± {reached.round_trip_s * 500:.1f} ms"
    if abs(reached.clock_ahead_s) > _CLOCK_WITHIN_S:
        return "clock", "limited", detail, "sudo timedatectl set-ntp true, on both; timelines are laid on one clock"
    return "clock", "ok", detail, ""


def own_address_towards(address: str) -> str:
    """Return this machine's address from which packets to another leave; none is sent."""
    family, _, _, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(place)
        except OSError as caught:
            raise ConfigError(f"no route to {address} ({_why(caught)}); check it") from None
        return str(probe.getsockname()[0])


def _why(caught: OSError) -> str:
    return (os.strerror(caught.errno) if caught.errno else str(caught)).lower()
