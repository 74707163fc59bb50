"""Small topologies that searches are tried on."""

from __future__ import annotations

import random

from wantrain.errors import TopologyError
from wantrain.model_config import ModelConfig
from wantrain.profile import gpt_profile
from wantrain.topology import Topology

PROFILE = gpt_profile(ModelConfig(num_layers=4, hidden=128, num_heads=4, seq_len=128, vocab_size=512), 1)


def regions(counts: dict[str, int], *, far: str = "200 Mbit/s", name: str = "regions", **worker: str) -> Topology:
    """Return workers of some sites, 10 Gbit/s inside and `far` between."""
    sites = list(counts)
    workers = [{"name": site, "count": count, "site": site} | worker for site, count in counts.items()]
    links = [{"within": site, "bandwidth": "10 Gbit/s", "latency": "0.5 ms"} for site in sites]
    links += [{"between": [a, b], "bandwidth": far, "latency": "20 ms"} for i, a in enumerate(sites) for b in sites[:i]]
    return Topology.parse({"name": name, "worker": workers, "link": links}, TopologyError, name)


def with_speeds(topology: Topology, speeds: list[float]) -> Topology:
    """Return the topology with other computing speeds, worker by worker."""
    workers = tuple(
        worker.model_copy(update={"flops_per_s": speed}) for worker, speed in zip(topology.workers, speeds, strict=True)
    )
    return topology.model_copy(update={"workers": workers})


def shuffled(topology: Topology, seed: int = 0) -> Topology:
    """Return the topology with its workers in another order."""
    workers = random.Random(seed).sample(topology.workers, len(topology.workers))
    return topology.model_copy(update={"workers": tuple(workers)})
