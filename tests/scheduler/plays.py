"""Small plans, networks and workloads for the simulator's tests: figures that can be added up in the head."""

from __future__ import annotations

from typing import Any

from wantrain.errors import PlanError, TopologyError
from wantrain.plan import Plan
from wantrain.scheduler.workload import Workload
from wantrain.topology import PAYLOAD_SHARE, Topology
from wantrain.units import parse_bytes_per_s


def payload(rate: str) -> str:
    """Return the rate of a link that carries `rate` of payload."""
    return f"{parse_bytes_per_s(rate) / PAYLOAD_SHARE!r} B/s"


def flat(num_workers: int, uplink: str | None = None, **changes: Any) -> Topology:
    """One site; links of 1 MB/s of payload and no latency, where nothing else is said. The uplink is payload too."""
    limits = {} if uplink is None else {"uplink": payload(uplink)}
    link = {"within": "s", "bandwidth": payload("1 MB/s")} | changes
    workers = [{"name": f"w{i}", "site": "s"} | limits for i in range(num_workers)]
    return Topology.parse({"name": "flat", "worker": workers, "link": [link]}, TopologyError, "flat")


def make_plan(
    stages: int,
    replicas: int,
    microbatches: int,
    depths: list[int] | None = None,
    schedule: str = "1f1b",
    postponed: list[int] | None = None,
) -> Plan:
    """Pipelines of consecutive workers w0, w1, …, one layer a stage."""
    depths = depths or [min(microbatches, stages - s) for s in range(stages)]
    postponed = postponed or [0] * stages
    rows = [
        {
            "workers": [f"w{r * stages + s}" for s in range(stages)],
            "num_microbatches": microbatches,
            "lanes": [r],
        }
        for r in range(replicas)
    ]
    data = {
        "topology": "flat",
        "model": "m",
        "num_layers": stages,
        "batch_size": microbatches * replicas,
        "microbatch_size": 1,
        "num_lanes": replicas,
        "schedule": schedule,
        "stages": [
            {"first_layer": s, "end_layer": s + 1, "max_in_flight": depths[s], "max_postponed": postponed[s]}
            for s in range(stages)
        ],
        "replicas": rows,
        "boundaries": [{"transports": [{}] * replicas} for _ in range(stages - 1)],
    }
    return Plan.parse(data, PlanError, "plan")


def work(plan: Plan, **changes: Any) -> Workload:
    """A second forward, two backward, a megabyte over every boundary each way, no gradients."""
    ranks, stages = plan.world_size, plan.num_stages
    given: dict[str, Any] = {
        "forward_s": (1.0,) * ranks,
        "backward_s": (2.0,) * ranks,
        "step_s": (0.0,) * ranks,
        "forward_bytes": (*(1_000_000,) * (stages - 1), 0),
        "backward_bytes": (0, *(1_000_000,) * (stages - 1)),
        "bucket_bytes": ((),) * stages,
    }
    return Workload(**given | changes)
