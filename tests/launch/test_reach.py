"""What lies between two hosts, on this machine's loopback."""

from __future__ import annotations

import socket

import pytest

from wantrain.errors import ConfigError
from wantrain.launch.hosts import PortRange
from wantrain.launch.interfaces import given_out_ports, interface_with, require_free, require_ports
from wantrain.launch.reach import Answerer, path_mtu, reach


def test_an_answerer_is_reached_and_has_this_clock() -> None:
    answerer = Answerer("127.0.0.1")
    try:
        found = reach("127.0.0.1", answerer.port, 30.0)
        assert 0 < found.round_trip_s < 30
        assert abs(found.clock_ahead_s) <= found.round_trip_s + 5
        assert path_mtu("127.0.0.1", answerer.port, 5.0) == 9216  # loopback's is 65536; nobody needs more than this
    finally:
        answerer.close()


def test_a_closed_port_is_an_error() -> None:
    answerer = Answerer("127.0.0.1")
    answerer.close()
    with pytest.raises(OSError, match=r"."):
        reach("127.0.0.1", answerer.port, 5.0)
    assert path_mtu("127.0.0.1", answerer.port, 0.05) is None


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"can't use port {port} on 127.0.0.1 \(address already in use\)"):
            require_free("127.0.0.1", port)


def test_an_address_that_others_cannot_reach_is_refused() -> None:
    with pytest.raises(ConfigError, match="is this host's own loopback"):
        interface_with("127.0.0.1")
    with pytest.raises(ConfigError, match=r"address 192.0.2.1 is none of this host's \(it has "):
        interface_with("192.0.2.1")


def test_ports_are_held_against_what_the_kernel_gives_out() -> None:
    own = given_out_ports()
    require_ports(own)
    with pytest.raises(ConfigError, match=f"gives out ports {own} .*sysctl -w net.ipv4.ip_local_port_range='40000 4"):
        require_ports(PortRange.of("40000-40001"))
