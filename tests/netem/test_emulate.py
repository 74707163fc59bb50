"""The standing network: addresses, processes, what is refused, and what happens when a part of it dies."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from wantrain.errors import EmulationError, TopologyError
from wantrain.netem.commands import Command
from wantrain.netem.emulate import EmulatedNetwork, kernel_has_netem, run_commands
from wantrain.topology import Topology


def three_workers(**link: str) -> Topology:
    rule = {"within": "s", "bandwidth": "100 Mbit/s", "latency": "2 ms"} | link
    data = {"name": "t", "worker": [{"name": "w", "count": 3, "site": "s"}], "link": [rule]}
    return Topology.parse(data, TopologyError, "t")


def shown(network: EmulatedNetwork, worker: str, *argv: str) -> str:
    with network.popen(worker, argv, stdout=subprocess.PIPE, text=True) as process:
        return str(process.communicate()[0])


def look_around() -> dict[str, Any]:
    """Return what a worker sees of itself; runs in the sandbox."""
    with EmulatedNetwork(three_workers()) as network:
        sysctl = "/proc/sys/net/ipv4/tcp_slow_start_after_idle"
        seen = {
            "links": shown(network, "w-1", "ip", "-o", "-4", "addr"),
            "idle restart": shown(network, "w-1", "cat", sysctl).strip(),
            "address": network.address("w-1"),
        }
    seen["left"] = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    return seen


def test_a_worker_has_one_interface_and_tuned_tcp(in_sandbox: Callable[..., Any]) -> None:
    seen = in_sandbox(look_around)
    assert seen["address"] == "10.77.0.2"
    assert "e0    inet 10.77.0.2/16" in seen["links"]
    assert "lo    inet 127.0.0.1/8" in seen["links"]
    assert seen["links"].count("\n") == 2
    assert seen["idle restart"] == "0"


def test_leaving_takes_the_namespaces_down(in_sandbox: Callable[..., Any]) -> None:
    assert in_sandbox(look_around)["left"] == ""


def kill_a_delay_line() -> list[str]:
    """Kill one delay line behind the network's back; runs in the sandbox."""
    with EmulatedNetwork(three_workers()) as network:
        network.raise_if_broken()
        subprocess.run(["sh", "-c", "kill -9 $(pgrep -f wantrain.netem.delaylin[e] | head -n 1)"], check=True)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                network.raise_if_broken()
            except EmulationError as caught:
                return [str(caught)]
            time.sleep(0.01)
    return []


@pytest.mark.skipif("kernel_has_netem()", reason="this kernel needs no delay lines")
def test_a_dead_delay_line_breaks_the_network(in_sandbox: Callable[..., Any]) -> None:
    (said,) = in_sandbox(kill_a_delay_line)
    assert said.startswith("the emulated network is broken: the delay line of worker 'w-0' has ended")


def test_loss_is_refused_where_the_kernel_has_no_netem(sandbox_works: None) -> None:
    if kernel_has_netem():
        assert EmulatedNetwork(three_workers(loss="1 %")).commands.delay_lines == {}
    else:
        with pytest.raises(EmulationError, match="asks for loss, which needs sch_netem"):
            EmulatedNetwork(three_workers(loss="1 %"))


def test_outside_a_sandbox_nothing_is_built(sandbox_works: None) -> None:
    with pytest.raises(EmulationError, match="inside a sandbox only"), EmulatedNetwork(three_workers()):
        pass


def test_a_failing_command_is_named_with_what_it_said() -> None:
    say = "import sys; sys.exit('no such qdisc')"
    with pytest.raises(EmulationError, match=r"can't be built: .* failed \(no such qdisc\)"):
        run_commands([Command((sys.executable, "-c", say))])


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(EmulationError, match="'tc' is missing; install the package iproute2"):
        run_commands([Command(("tc", "-n", "w", "qdisc"))])
