"""Jobs over SSH on two hosts of their own: watched, cancelled, a host lost, and what is read on the wire."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.ssh_lab import ADDRESSES, PATH, ROOT, Lab, missing, wait_for
from tests.small_run import write_run
from wantrain.run_directory import RunDirectory

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(1800),
]

SECTIONS = """
[training]
steps = 60
batch_size = 4
num_lanes = 2
validation_samples = 8
[parallel]
topology = "{folder}/topology.toml"
num_stages = 2
timeout_s = 60
[checkpoint]
every = 5
"""

TOPOLOGY = """
[[worker]]
name = "paris-0"
site = "paris"
[[worker]]
name = "tokyo-0"
site = "tokyo"
[[link]]
between = ["paris", "tokyo"]
bandwidth = "3 Mbit/s"
latency = "1 ms"
"""

HOST = """
[[host]]
workers = ["{name}"]
ssh = "{address}"
ssh_options = ["-F", "{folder}/ssh_config"]
{reached}
python = "{folder}/python"
folder = "{folder}/runs-of-{name}"
"""

_JOB_MARK = b"wantrain/arrived"
"""A key of torch's store, which every worker sends to the first."""


class Launch:
    """Launches from the lab onto its hosts."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.folder = lab, lab.folder

    def hosts(self, wireguard: bool = False) -> Path:
        tunnel = '[wireguard]\nnetwork = "10.77.0.0/24"\n' if wireguard else ""
        reached = "endpoint" if wireguard else "address"
        path = self.folder / ("tunnels.toml" if wireguard else "hosts.toml")
        path.write_text(
            tunnel
            + "".join(
                HOST.format(name=name, address=address, folder=self.folder, reached=f'{reached} = "{address}"')
                for name, address in ADDRESSES.items()
            )
        )
        return path

    def argv(self, run: str, *options: str) -> list[str]:
        config = str(self.folder / "run.toml")
        return [str(self.folder / "python"), "-m", "wantrain", "launch", config, "--run-dir", self.path(run), *options]

    def path(self, run: str) -> str:
        return str(self.folder / "here" / run)

    def start(self, run: str, *options: str, wireguard: bool = False) -> subprocess.Popen[str]:
        argv = self.lab.argv(self.argv(run, "--hosts", str(self.hosts(wireguard)), *options))
        pipe = subprocess.PIPE
        return subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, env=os.environ | {"PATH": PATH})

    def launcher(self, run: str) -> int:
        """Return the launcher's own process, below nsenter."""
        line = [str(self.path(run)), "--hosts"]
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().decode().split("\0")
                except OSError:
                    continue
                if words[0].endswith(("python", "python3")) and set(line) <= set(words):
                    return int(entry.name)
        raise AssertionError("no launcher")

    def losses(self, run: str) -> list[float]:
        return [record.loss for record in RunDirectory(self.path(run)).read_steps(0)]

    def wait_for_step(self, process: subprocess.Popen[str], run: str, step: int) -> None:
        def reached() -> bool:
            assert process.poll() is None, process.communicate()
            return len(self.losses(run)) >= step

        wait_for(reached, 600)

    def nothing_is_left(self) -> None:
        wait_for(lambda: not self.lab.pythons(), 60)


class Capture:
    """What passes one host's cable, from `with` to the end of its block, as (source, target, protocol, packet)."""

    PROGRAM = """
import select, socket, sys
cable = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
cable.bind((sys.argv[1], 0))
with open(sys.argv[2], "wb", buffering=0) as file:
    print("ready", flush=True)
    while True:
        ready = select.select([cable, sys.stdin], [], [])[0]
        if sys.stdin in ready:
            break
        frame = cable.recv(65536)
        file.write(len(frame).to_bytes(4, "big") + frame)
"""

    def __init__(self, lab: Lab, cable: str) -> None:
        self._lab, self._cable = lab, cable
        self._file = lab.folder / f"{cable}.frames"

    def __enter__(self) -> Capture:
        argv = [sys.executable, "-c", self.PROGRAM, self._cable, str(self._file)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._lab.argv(argv), stdin=pipe, stdout=pipe)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def between_hosts(self) -> list[bytes]:
        """Return the IPv4 packets from one host to the other."""
        data, at, found = self._file.read_bytes(), 0, []
        ends = {bytes(map(int, address.split("."))) for address in ADDRESSES.values()}
        while at + 4 <= len(data):
            size = int.from_bytes(data[at : at + 4], "big")
            frame = data[at + 4 : at + 4 + size]
            at += 4 + size
            if frame[12:14] == b"\x08\x00" and {frame[26:30], frame[30:34]} == ends:
                found.append(frame[14:])
        return found


def udp_ports(packet: bytes) -> tuple[int, int] | None:
    """Return source and target port, None of what isn't UDP."""
    if packet[9] != 17:
        return None
    start = 4 * (packet[0] & 15)
    return int.from_bytes(packet[start : start + 2], "big"), int.from_bytes(packet[start + 2 : start + 4], "big")


def begun_here(packets: list[bytes]) -> list[bytes]:
    """Leave out packets of TCP connections that began before: one that was lost earlier is tried again for minutes."""
    begun = {_tcp_ends(packet) for packet in packets if _tcp_ends(packet) and packet[4 * (packet[0] & 15) + 13] & 2}
    return [packet for packet in packets if _tcp_ends(packet) is None or _tcp_ends(packet) in begun]


def _tcp_ends(packet: bytes) -> frozenset[bytes] | None:
    """Return both ends' addresses and ports, None of what isn't TCP."""
    if packet[9] != 6:
        return None
    start = 4 * (packet[0] & 15)
    return frozenset((packet[12:16] + packet[start : start + 2], packet[16:20] + packet[start + 2 : start + 4]))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if lacking := missing():
        pytest.fail(f"{lacking} missing; apt-get install openssh-server openssh-client iproute2 util-linux")
    folder = tmp_path_factory.mktemp("lab")
    (folder / "topology.toml").write_text(TOPOLOGY)
    write_run(folder / "run.toml", SECTIONS.format(folder=folder))
    lab = Lab(folder)
    yield lab
    lab.close()


@pytest.fixture
def launch(lab: Lab) -> Iterator[Launch]:
    launch = Launch(lab)
    yield launch
    launch.nothing_is_left()


@pytest.fixture(scope="module")
def expected(lab: Lab) -> list[float]:
    """The losses of a run that nothing happened to, on one host."""
    launch = Launch(lab)
    subprocess.run(launch.argv("whole", "--no-emulation"), check=True, capture_output=True, timeout=900)
    return launch.losses("whole")


def test_a_job_is_watched_and_ctrl_c_ends_it_after_an_agreed_step(launch: Launch) -> None:
    """And without a tunnel what the workers say is read on the wire, which is why public addresses are refused."""
    with Capture(launch.lab, "paris-0") as capture:
        process = launch.start("run")
        launch.wait_for_step(process, "run", 8)
        os.kill(launch.launcher("run"), signal.SIGINT)
        out, err = process.communicate(timeout=600)
    assert process.returncode == 130, out + err
    run = RunDirectory(launch.path("run"))
    assert len(run.read_steps(0)) == len(run.read_steps(1)) < 60
    stopped = re.search(r"^paris-0: stopped after step (\d+) of 60", err, re.MULTILINE)
    assert stopped, err
    for name in ADDRESSES:
        checkpoint = launch.folder / f"runs-of-{name}" / "run" / "checkpoints" / f"step-{int(stopped[1]):08d}"
        assert (checkpoint / "manifest.json").exists()
        assert (run.logs / f"{name}.log").exists()
    assert run.report.exists()
    assert f"--hosts {launch.folder}/hosts.toml" in out
    assert any(_JOB_MARK in packet for packet in capture.between_hosts())


def test_a_lost_host_ends_the_job_and_resume_gives_the_same_losses(launch: Launch, expected: list[float]) -> None:
    process = launch.start("lost")
    launch.wait_for_step(process, "lost", 12)
    launch.lab.kill_host("tokyo-0")
    began_s = time.monotonic()
    out, err = process.communicate(timeout=600)
    took_s = time.monotonic() - began_s
    assert process.returncode == 1, out + err
    said = [line for line in err.splitlines() if line.startswith("wantrain: ")]
    assert len(said) == 1
    assert "worker 'tokyo-0' is gone" in said[0]
    assert took_s < 90  # fifteen to notice, the rest for a busy machine
    launch.nothing_is_left()
    launch.lab.restart_host("tokyo-0")
    process = launch.start("lost", "--resume")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    assert re.search(r"^paris-0: resumed from step 1\d", err, re.MULTILINE), err
    assert launch.losses("lost") == expected


def test_over_wireguard_nothing_is_readable_and_a_killed_launcher_leaves_nothing(launch: Launch) -> None:
    lab = launch.lab
    hosts, tunnels = launch.hosts(wireguard=True), launch.folder / "wireguard"
    argv = [str(lab.folder / "python"), "-m", "wantrain", "wireguard", str(hosts), "--out", str(tunnels)]
    subprocess.run(argv, check=True, capture_output=True)
    for name in ADDRESSES:
        lab.on(name, "env", f"PATH={PATH}", "WG_QUICK_USERSPACE_IMPLEMENTATION=wireguard-go", "wg-quick", "up",
               str(tunnels / name / "wantrain.conf"))  # fmt: skip
    with Capture(lab, "paris-0") as capture:
        process = launch.start("run-private", wireguard=True)
        launch.wait_for_step(process, "run-private", 5)
        os.kill(launch.launcher("run-private"), signal.SIGKILL)
        process.communicate(timeout=30)
        launch.nothing_is_left()
    packets = begun_here(capture.between_hosts())
    assert sum(map(len, packets)) > 200_000  # five steps of activations and their gradients
    assert {udp_ports(packet) for packet in packets} == {(51820, 51820)}
    assert not [packet for packet in packets if _JOB_MARK in packet or b"wantrain" in packet]


def test_another_source_of_wantrain_is_refused(launch: Launch) -> None:
    """The host's copy differs in a comment: same version, another source."""
    copy = launch.folder / "other"
    shutil.copytree(ROOT / "wantrain", copy / "wantrain", ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "wantrain" / "units.py").open("a") as file:
        file.write("# edited\n")
    python = launch.folder / "other-python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={copy}:{ROOT} exec {launch.folder}/python "$@"\n')
    python.chmod(0o755)
    text = launch.hosts().read_text()
    other = launch.folder / "other.toml"
    head, tail = text.rsplit("python = ", 1)
    other.write_text(f'{head}python = "{python}"\n{tail.partition(chr(10))[2]}')
    process = subprocess.run(
        launch.lab.argv(launch.argv("refused", "--hosts", str(other))), capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 2, process.stderr
    assert re.search(r"^wantrain: host 'tokyo-0' has another wantrain \(got .*; use one commit$", process.stderr)


def test_the_doctor_looks_at_the_line_to_a_host(launch: Launch) -> None:
    lab = launch.lab
    lab.run("ip", "-n", "tokyo-0", "link", "set", "dev", "eth0", "mtu", "1400")
    argv = [str(lab.folder / "python"), "-m", "wantrain", "doctor", "--json", "--peer", "tokyo-0"]
    try:
        found = {one["what"]: one for one in json.loads(lab.run(*argv, "--hosts", str(launch.hosts())))}
    finally:
        lab.run("ip", "-n", "tokyo-0", "link", "set", "dev", "eth0", "mtu", "1500")
    states = {what: one["state"] for what, one in found.items()}
    assert states.pop("MTU") == "limited"
    assert set(states.values()) == {"ok"}
    assert set(states) == {"software there", "meeting port", "a port of gloo's", "the way back", "round trip", "clock"}
    assert found["meeting port"]["detail"] == "10.9.0.2 port 29500 is reached"
    whole = re.fullmatch(r"(\d+) bytes get there whole; br0 sends up to 1500", found["MTU"]["detail"])
    assert whole
    assert 1400 <= int(whole[1]) <= 1404  # veth lets through a VLAN's four bytes more
