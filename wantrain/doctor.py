"""`wantrain doctor`: what this machine can and cannot do, with the remedy for each."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from wantrain.errors import WantrainError
from wantrain.units import format_bandwidth, format_bytes, format_time

_MARKS = {"ok": "✓", "limited": "–", "missing": "✗"}

_NOBODYS_ADDRESS = "192.0.2.1"
"""Reserved for documentation (RFC 5737): no name service knows it."""

_QUESTIONS = 64
"""Chosen: as many connections as the start of some ten workers makes; some services answer 50 in a row, then none."""

_SLOW_ANSWERS_S = 1.0
"""Chosen: for all questions together; a start that is longer by this much is worth a line in a file."""


class Finding(NamedTuple):
    """One thing looked at: `state` is ok, limited (something optional is off) or missing (something needed is)."""

    what: str
    state: str
    detail: str
    remedy: str = ""


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain doctor`; the status is 1 where something needed is missing."""
    findings = list(examine()) if args.peer is None else list(examine_peer(args.peer, args.hosts))
    if args.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{_MARKS[finding.state]} {finding.what:<22}{finding.detail}")
            if finding.remedy:
                print(f"  {'':<22}→ {finding.remedy}")
    return 1 if any(finding.state == "missing" for finding in findings) else 0


def examine() -> Iterator[Finding]:
    """Look at everything wantrain depends on."""
    checks: list[Callable[[], Finding]] = [
        _python, _machine, _torch, _gpu, _sandbox, _programs, _delay, _buffers, _names, _disk, _extras
    ]  # fmt: skip
    for check in checks:
        yield check()


def examine_peer(peer: str, hosts: str | None) -> Iterator[Finding]:
    """Look at another machine, reached by ssh, and the line to it; `hosts` is a file that names it."""
    from wantrain.launch.peer import look_at, peer_host

    for found in look_at(*peer_host(peer, hosts)):
        yield Finding(*found)


def _python() -> Finding:
    return Finding("Python", "ok", ".".join(map(str, sys.version_info[:3])))


def _machine() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    detail = f"{cores} cores, {format_bytes(memory)} of memory"
    if cores < 2:
        return Finding("machine", "limited", detail, "several workers on one core need --dilation to be believed")
    return Finding("machine", "ok", detail)


def _torch() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("torch", "missing", "not installed", "pip install torch")
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return Finding("torch", "missing", f"{torch.__version__}, without gloo", "install a build of torch with gloo")
    return Finding("torch", "ok", f"{torch.__version__}, with gloo")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "limited", "none; layers run on the CPU", "")
    name = torch.cuda.get_device_name(0)
    return Finding("GPU", "ok", f"{torch.cuda.device_count()} × {name}")


def _sandbox() -> Finding:
    from wantrain.netem.sandbox import why_no_sandbox

    reason = why_no_sandbox()
    if reason is None:
        return Finding("private namespaces", "ok", "allowed, without root" if os.geteuid() else "allowed")
    problem, _, remedy = reason.partition("; ")
    return Finding("private namespaces", "limited", problem, remedy)


def _programs() -> Finding:
    from wantrain.netem.sandbox import search_path

    missing = [name for name in ("ip", "tc") if shutil.which(name, path=search_path()) is None]
    if missing:
        return Finding("iproute2", "limited", f"{', '.join(missing)} missing", "sudo apt-get install iproute2")
    return Finding("iproute2", "ok", "ip and tc are here")


def _delay() -> Finding:
    """How an emulated link gets its latency: the kernel's netem, or delay lines."""
    from wantrain.netem.emulate import kernel_has_netem, working_iptables

    try:
        if kernel_has_netem():
            return Finding("emulated delay", "ok", "sch_netem: latency, jitter and loss")
        return Finding(
            "emulated delay", "limited", f"no sch_netem; latency by NFQUEUE ({working_iptables()}), no jitter, no loss",
            "for jitter and loss use a kernel with sch_netem (Debian, Ubuntu: linux-modules-extra-$(uname -r))",
        )  # fmt: skip
    except WantrainError as caught:
        problem, _, remedy = str(caught).partition("; ")
        return Finding("emulated delay", "limited", problem, remedy)


def _buffers() -> Finding:
    """TCP's send buffer bounds one connection to buffer / round trip; several connections lift that."""
    try:
        most = int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2])
    except OSError:
        return Finding("TCP buffers", "limited", "can't be read", "")
    reached = format_bandwidth(0.65 * most / 0.1)  # a third of the buffer is the kernel's own bookkeeping
    detail = f"{format_bytes(most)} to send: about {reached} for one connection at 50 ms one way"
    return Finding("TCP buffers", "ok", f"{detail} (wantrain opens several)")


def _names() -> Finding:
    """How long the name service takes over an address that it doesn't know, asked as often as a job's start does."""
    began_s = time.monotonic()
    for number in range(1, _QUESTIONS + 1):
        with suppress(OSError):
            socket.getnameinfo((_NOBODYS_ADDRESS, 0), 0)
        took_s = time.monotonic() - began_s
        if took_s > _SLOW_ANSWERS_S:
            return Finding(
                "name service", "limited", f"took {format_time(took_s)} over an unknown address, asked {number} times",
                "torch asks for each connection to a job's first worker: list the workers there in /etc/hosts",
            )  # fmt: skip
    return Finding("name service", "ok", f"answered {_QUESTIONS} questions in {format_time(took_s)}")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    if free < 2e9:
        return Finding("disk", "limited", f"{format_bytes(free)} free here", "free some space before training")
    return Finding("disk", "ok", f"{format_bytes(free)} free here")


def _extras() -> Finding:
    found = [name for name in ("tokenizers", "triton") if importlib.util.find_spec(name) is not None]
    remedy = "" if "tokenizers" in found else "for tokenizer files: pip install 'wantrain[tokenizers]'"
    return Finding("extras", "ok" if not remedy else "limited", ", ".join(found) or "none", remedy)
