"""Run a command in private namespaces that the kernel takes down however the run dies: no root, no trace.

    wantrain (pid P) ──exec──► sandbox (still P): unshare(user, mount, network, process), fork, wait
                                  └─ pid 1 of the new process namespace: /proc, tmpfs on /run, fork, reap
                                        └─ CMD, and all that it starts

The host's own network is never touched: interfaces, rules and queues live in network namespaces that only these
processes hold. Every way to die ends the same: P killed at any moment kills pid 1 (PR_SET_PDEATHSIG), pid 1's end makes
the kernel kill every process of the namespace, and with the last process the other namespaces go. Without a process
namespace children outlive a killed parent, and their network with them.

Kept single-threaded and light, since unshare(CLONE_NEWUSER) refuses threads, and called by ctypes, since
`os.unshare` came with Python 3.12. See user_namespaces(7), pid_namespaces(7).
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from wantrain.errors import EmulationError, WantrainError

_SAYS = "wantrain: "

_MARK = "WANTRAIN_SANDBOX"
"""Holds the identity of the sandbox's network namespace, so that a copied environment proves nothing."""

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x00020000, 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 16384, 1 << 18
_PR_SET_PDEATHSIG = 1
_SI_KERNEL = 0x80
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_WATCHED = (*_FORWARDED, signal.SIGCHLD)

_libc = ctypes.CDLL(None, use_errno=True)


def inside_sandbox() -> bool:
    """Say whether this process runs in the sandbox's own network namespace (a worker's namespace is not that)."""
    return os.environ.get(_MARK) == os.readlink("/proc/self/ns/net")


def run_in_sandbox_argv(command: Sequence[str]) -> list[str]:
    """Return the argv that runs `command` inside a fresh sandbox."""
    return [sys.executable, "-m", "wantrain.netem.sandbox", "--", *command]


def search_path() -> str:
    """Return PATH with the folders of ip, tc and iptables, which an ordinary user's lacks on Debian."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def enter_sandbox(command: Sequence[str]) -> NoReturn:
    """Replace this process by a sandbox that runs `command`; its process id stays."""
    sys.stdout.flush()
    sys.stderr.flush()
    argv = run_in_sandbox_argv(command)
    os.execv(argv[0], argv)


def why_no_sandbox() -> str | None:
    """Try whether a sandbox can be made here; return None, or the reason with its remedy."""
    tried = subprocess.run(run_in_sandbox_argv(["true"]), capture_output=True, text=True, check=False)
    return tried.stderr.strip().removeprefix(_SAYS) or None


def run_in_sandbox(command: Sequence[str]) -> int:
    """Run `command` in fresh namespaces and return its exit status (128 + number where a signal ended it)."""
    former_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    _unshare()
    alive_read, alive_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(alive_write)
        _be_pid_1(command, alive_read, former_mask)
    os.close(alive_read)
    return _supervise(child)


def _unshare() -> None:
    """Move this process into private namespaces, as root inside; raise EmulationError where that is forbidden."""
    uid, gid = os.geteuid(), os.getegid()
    private = _CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWPID
    if _libc.unshare(_CLONE_NEWUSER | private) == 0:
        _map_ids(uid, gid)
        return
    reason = ctypes.get_errno()
    if uid == 0 and _libc.unshare(private) == 0:  # root needs no user namespace to make the others
        return
    raise EmulationError(_why_forbidden(reason))


def _map_ids(uid: int, gid: int) -> None:
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    except OSError as caught:
        raise EmulationError(_why_forbidden(caught.errno or errno.EPERM)) from None


def _why_forbidden(code: int) -> str:
    """Name the setting that forbids user namespaces, and what to do."""
    settings = {
        "user.max_user_namespaces": ("0", "sysctl -w user.max_user_namespaces=10000"),
        "kernel.unprivileged_userns_clone": ("0", "sysctl -w kernel.unprivileged_userns_clone=1"),
        "kernel.apparmor_restrict_unprivileged_userns": (
            "1",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    }
    for name, (forbidding, remedy) in settings.items():
        if _sysctl(name) == forbidding:
            cause, remedy = f"{name} is {forbidding}", f"let an administrator run '{remedy}'"
            break
    else:
        cause = os.strerror(code).lower()
        remedy = "in a container, start it with '--security-opt seccomp=unconfined', or run as root"
    return (
        f"private network namespaces are forbidden here ({cause}); {remedy}, or go without the emulated network:"
        " --no-emulation"
    )


def _sysctl(name: str) -> str:
    try:
        return Path("/proc/sys", *name.split(".")).read_text().strip()
    except OSError:
        return ""


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies, however that happens."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _be_pid_1(command: Sequence[str], alive: int, mask: set[int]) -> NoReturn:
    """Prepare the namespaces, run the command, reap whatever is orphaned; never return."""
    die_with_parent()
    if select.select([alive], [], [], 0)[0]:  # the parent was killed before it could be watched
        os._exit(128 + signal.SIGKILL)
    status = 1
    try:
        _mount_private()
        os.environ[_MARK] = os.readlink("/proc/self/ns/net")
        os.environ["PATH"] = search_path()
        child = os.fork()
        if child == 0:
            _exec(command, mask)
        status = _supervise(child)
    except WantrainError as caught:
        status = _report(caught)
    finally:
        os._exit(status)


def _mount_private() -> None:
    """Give the namespace its own /proc and /run; `ip netns` keeps its names in /run, and iptables its lock."""
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/run", "tmpfs", _MS_NOSUID | _MS_NODEV)
    try:
        _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    except EmulationError:
        # Containers that mask parts of /proc forbid a fresh one. The old one serves: only `ps` would tell them apart.
        return


def _mount(source: str, target: str, kind: str | None, flags: int) -> None:
    encoded_kind = None if kind is None else kind.encode()
    if _libc.mount(source.encode(), target.encode(), encoded_kind, ctypes.c_ulong(flags), None) != 0:
        reason = os.strerror(ctypes.get_errno()).lower()
        raise EmulationError(f"can't mount {kind or 'privately'} on {target} ({reason}); {_why_forbidden(errno.EPERM)}")


def _exec(command: Sequence[str], mask: set[int]) -> NoReturn:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        os.execvp(command[0], list(command))
    except OSError as caught:
        reason = (caught.strerror or "unknown error").lower()
        _report(EmulationError(f"can't run '{command[0]}' ({reason}); check the command"))
    os._exit(127)


def _supervise(child: int) -> int:
    """Hand signals on to `child` and reap until it ends; return its exit status.

    The terminal sends Ctrl-C to the whole process group (si_code SI_KERNEL): handing that on would make it two.
    """
    while True:
        received = signal.sigwaitinfo(_WATCHED)
        if received.si_signo != signal.SIGCHLD:
            if received.si_code != _SI_KERNEL:
                os.kill(child, received.si_signo)
            continue
        status = _reap(child)
        if status is not None:
            return status


def _reap(child: int) -> int | None:
    """Collect every process that has ended; return the exit status of `child` once it is among them."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == 0:
            return None
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _report(error: WantrainError) -> int:
    print(f"{_SAYS}{error}", file=sys.stderr, flush=True)
    return error.exit_status


def main(argv: Sequence[str]) -> int:
    """Run `-- CMD …`, as `python -m wantrain.netem.sandbox` gives it."""
    command = argv[1:] if argv[:1] == ["--"] else argv
    if not command:
        return _report(EmulationError("nothing to run; say: python -m wantrain.netem.sandbox -- CMD …"))
    try:
        return run_in_sandbox(command)
    except WantrainError as caught:
        return _report(caught)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
