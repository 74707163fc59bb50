"""`wantrain launch`: which launcher carries it out."""

from __future__ import annotations

import argparse

from wantrain.errors import ConfigError

_FOR_RAY = ("address", "measure", "node_wait", "max_restarts", "replan")


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain launch`, here, over SSH or on Ray; only what is used is imported."""
    _refuse_without_ray(args)
    if args.hosts is not None:
        if args.engine == "ray":
            raise ConfigError("--hosts is for SSH, --engine ray for a cluster; leave one out")
        from wantrain.launch import ssh

        return ssh.run(args)
    if args.insecure:
        raise ConfigError("--insecure is for the machines of --hosts; there are none")
    if args.engine == "ray":
        from wantrain.launch import ray

        return ray.run(args)
    from wantrain.launch import local

    return local.run(args)


def _refuse_without_ray(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that only Ray has."""
    for name in _FOR_RAY if args.engine != "ray" else ():
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is for --engine ray; leave it out, or say --engine ray")
