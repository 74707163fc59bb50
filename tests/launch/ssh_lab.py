"""Two hosts of their own on this machine, each with its own network, processes and sshd, for tests that run as root.

    lab (mount, network and process namespace)   10.9.0.254, where the launcher runs
      ├─ host paris-0   10.9.0.1   network and process namespace, sshd
      └─ host tokyo-0   10.9.0.2   likewise

Keys are made anew, nothing of this machine's ssh is read or changed, and all of it goes with the lab's first process.
The line between the hosts is slow, so that there is time to watch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from wantrain.netem.sandbox import die_with_parent

ADDRESSES = {"paris-0": "10.9.0.1", "tokyo-0": "10.9.0.2"}
ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("sshd", "ssh", "ssh-keygen", "ip", "tc", "nsenter", "unshare")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

_SET_UP = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir /run/sshd /run/netns /run/wireguard
mount --bind {folder}/shadow /etc/shadow
[ -c /dev/net/tun ] || {{ mkdir -p /dev/net; mknod /dev/net/tun c 10 200; }}
ip link set lo up
ip link add br0 type bridge
ip addr add 10.9.0.254/24 dev br0
ip link set br0 up
{hosts}
echo ready
exec sleep infinity
"""

_SET_UP_HOST = """
ip netns add {name}
ip link add {name} type veth peer name eth0 netns {name}
ip link set {name} master br0 up
ip -n {name} addr add {address}/24 dev eth0
ip -n {name} link set lo up
ip -n {name} link set eth0 up
tc -n {name} qdisc add dev eth0 root handle 1: htb default 1
tc -n {name} class add dev eth0 parent 1: classid 1:1 htb rate 3mbit
"""

_SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
PidFile none
"""

_SSH = """
Host *
  User root
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile none
  StrictHostKeyChecking yes
"""


class Lab:
    """The hosts, from `__init__` to `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._write_files()
        hosts = "".join(_SET_UP_HOST.format(name=name, address=address) for name, address in ADDRESSES.items())
        self._outer = subprocess.Popen(
            [*_new_namespaces("--net"), "sh", "-c", _SET_UP.format(folder=folder, hosts=hosts)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PATH": PATH},
            preexec_fn=die_with_parent,
        )
        assert self._outer.stdout is not None
        assert self._outer.stdout.readline() == b"ready\n"
        self._pid = _child_of(self._outer.pid)
        self._sshd = {name: self._start_host(name) for name in ADDRESSES}

    def close(self) -> None:
        self._outer.kill()
        self._outer.wait()
        assert self._outer.stdout is not None
        self._outer.stdout.close()
        for sshd in self._sshd.values():
            sshd.wait()

    def argv(self, command: Sequence[str]) -> list[str]:
        """Return what runs a command in the lab, beside the hosts."""
        return ["nsenter", "-t", str(self._pid), "-m", "-n", "-p", "--", *command]

    def run(self, *command: str) -> str:
        """Run a command in the lab to its end."""
        return subprocess.run(
            self.argv(command), check=True, capture_output=True, text=True, timeout=120, env=os.environ | {"PATH": PATH}
        ).stdout

    def on(self, host: str, *command: str) -> str:
        """Run a command on a host, by ssh."""
        return self.run("ssh", "-F", str(self.folder / "ssh_config"), ADDRESSES[host], *command)

    def kill_host(self, host: str) -> None:
        """Take a host away as a power cut does: nothing that it had open says good-bye."""
        self.run("ip", "link", "set", host, "down")
        self._sshd[host].kill()
        self._sshd[host].wait()

    def restart_host(self, host: str) -> None:
        self.run("ip", "link", "set", host, "up")
        self._sshd[host] = self._start_host(host)

    def pythons(self) -> list[str]:
        """Return the command lines of all Pythons on the hosts."""
        networks = {os.stat(f"/proc/{self._pid}/root/run/netns/{name}").st_ino for name in ADDRESSES}
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.stat(entry / "ns/net").st_ino in networks:
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return [line for line in found if "python" in line]

    def _start_host(self, name: str) -> subprocess.Popen[bytes]:
        inside = "mount -t tmpfs tmpfs /run/wireguard && exec /usr/sbin/sshd -D -e -f "
        argv = ["ip", "netns", "exec", name, *_new_namespaces(), "sh", "-c", f"{inside}{self.folder}/{name}.sshd"]
        with (self.folder / f"{name}.sshd.log").open("ab") as log:
            host = subprocess.Popen(
                self.argv(argv), stderr=log, env={"PATH": PATH}, preexec_fn=die_with_parent, start_new_session=True
            )
        probe = ["sh", "-c", f"exec 3<>/dev/tcp/{ADDRESSES[name]}/22"]
        wait_for(lambda: subprocess.run(self.argv(["bash", *probe[1:]]), capture_output=True).returncode == 0)
        return host

    def _write_files(self) -> None:
        folder = self.folder
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
        (folder / "known_hosts").write_text("".join(f"{address} {host_key}\n" for address in ADDRESSES.values()))
        (folder / "ssh_config").write_text(_SSH.format(folder=folder))
        (folder / "shadow").write_text("root:*:19000:0:99999:7:::\nsshd:!:19000::::::\n")
        for name, address in ADDRESSES.items():
            (folder / f"{name}.sshd").write_text(_SSHD.format(folder=folder, address=address))
        home = f"PYTHONPATH=${{PYTHONPATH:-{ROOT}}} HOME={folder} XDG_CACHE_HOME={folder}/cache"
        python = folder / "python"  # the tests' own, away from the home directory
        python.write_text(f'#!/bin/sh\nexec env {home} nice -n {os.nice(0)} {sys.executable} "$@"\n')
        python.chmod(0o755)


def _new_namespaces(*more: str) -> list[str]:
    return ["unshare", "--mount", "--pid", *more, "--fork", "--kill-child", "--mount-proc"]


def _child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def wait_for(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def missing() -> str:
    """Name what a lab needs and this machine lacks."""
    return ", ".join(name for name in NEEDED if shutil.which(name, path=PATH) is None)
