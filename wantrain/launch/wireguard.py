"""`wantrain wireguard HOSTS`: the keys and configurations of an encrypted network among the hosts of a job.

One file for each host, for `wg-quick`: its own private key, and of every other host the public key, a key that only the
pair shares, and where its tunnel is reached. All tunnels of a host share one UDP port, and that is the only one that
firewalls must let through. Keys come from the `wg` program; nothing is installed anywhere: the commands that do it are
printed. See https://www.wireguard.com/papers/wireguard.pdf, and wg(8), wg-quick(8).
"""

from __future__ import annotations

import argparse
import ipaddress
import itertools
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from wantrain.errors import ConfigError
from wantrain.fact import unwritable
from wantrain.launch.hosts import Host, Hosts, WireGuard
from wantrain.netem.sandbox import search_path

_KEEPALIVE_S = 25
"""WireGuard's own recommendation for peers behind a NAT."""


class Keys(NamedTuple):
    """A host's key pair, in WireGuard's base64."""

    private: str
    public: str


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain wireguard`: write the files, and print what to do with them."""
    hosts = Hosts.load(args.hosts)
    folder = Path(args.out)
    for path in write_configs(hosts, folder):
        print(f"wrote {path}")
    print("\non each host, once, with its own file (it holds that host's private key: don't send it elsewhere):")
    assert hosts.wireguard is not None
    name = f"{hosts.wireguard.interface}.conf"
    for host in hosts.hosts:
        copy = shlex.join(["scp", *_for_scp(host.ssh_options), str(folder / host.name / name), f"{host.ssh}:{name}"])
        up = f"sudo install -m 600 {name} /etc/wireguard/ && rm {name} && sudo wg-quick up {hosts.wireguard.interface}"
        print(f"  {copy}\n  {shlex.join(['ssh', '-t', *host.ssh_options, host.ssh, up])}")
    print(f"\nfirewalls: UDP port {hosts.wireguard.port}, both ways; then: wantrain launch CONFIG --hosts {args.hosts}")
    return 0


def write_configs(hosts: Hosts, folder: Path) -> list[Path]:
    """Write FOLDER/WORKER/INTERFACE.conf for every host, readable by its owner alone; return the paths.

    Raise ConfigError where the hosts file has no [wireguard], where a file is there already (hosts may use its keys),
    or without the `wg` program.
    """
    if hosts.wireguard is None:
        raise ConfigError('the hosts file has no [wireguard]; add it, with network = "10.77.0.0/24"')
    paths = {host.name: folder / host.name / f"{hosts.wireguard.interface}.conf" for host in hosts.hosts}
    there = next((path for path in paths.values() if path.exists()), None)
    if there is not None:
        raise ConfigError(f"{there} is there already, with keys that hosts may use; remove it, or choose another --out")
    for name, text in configs(hosts, hosts.wireguard).items():
        _write_private(paths[name], text)
    return list(paths.values())


def configs(hosts: Hosts, wireguard: WireGuard) -> dict[str, str]:
    """Return every host's configuration, with fresh keys, by the host's name."""
    keys = {host.name: _new_keys() for host in hosts.hosts}
    shared = {frozenset(pair): _wg("genpsk") for pair in itertools.combinations(keys, 2)}
    return {host.name: _config(host, hosts, wireguard, keys, shared) for host in hosts.hosts}


def _config(
    own: Host, hosts: Hosts, wireguard: WireGuard, keys: Mapping[str, Keys], shared: Mapping[frozenset[str], str]
) -> str:
    width = ipaddress.ip_network(wireguard.network).prefixlen
    lines = ["[Interface]", f"PrivateKey = {keys[own.name].private}", f"Address = {own.address}/{width}"]
    lines += [f"ListenPort = {wireguard.port}"]
    for peer in hosts.hosts:
        if peer.name == own.name:
            continue
        lines += ["", "[Peer]", f"# {', '.join(peer.workers)}", f"PublicKey = {keys[peer.name].public}"]
        lines += [f"PresharedKey = {shared[frozenset((own.name, peer.name))]}"]
        lines += [f"AllowedIPs = {peer.address}/{ipaddress.ip_address(peer.address).max_prefixlen}"]
        if peer.endpoint:
            lines += [f"Endpoint = {_bracketed(peer.endpoint)}:{wireguard.port}"]
        if not own.endpoint:  # behind a NAT, which forgets who is silent
            lines += [f"PersistentKeepalive = {_KEEPALIVE_S}"]
    return "\n".join(lines) + "\n"


def _bracketed(endpoint: str) -> str:
    return f"[{endpoint}]" if ":" in endpoint else endpoint


def _new_keys() -> Keys:
    private = _wg("genkey")
    return Keys(private, _wg("pubkey", private))


def _wg(what: str, given: str = "") -> str:
    program = shutil.which("wg", path=search_path())
    if program is None:
        raise ConfigError("the program wg is missing, which makes the keys; sudo apt-get install wireguard-tools")
    return subprocess.run([program, what], input=given, capture_output=True, text=True, check=True).stdout.strip()


def _write_private(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
    except OSError as caught:
        raise unwritable(path, caught) from None


def _for_scp(options: tuple[str, ...]) -> list[str]:
    """Turn ssh's words for the port into scp's."""
    return ["-P" if word == "-p" else word for word in options]
