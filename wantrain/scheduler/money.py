"""What a plan costs in money: its workers by the hour, and the bytes that leave over links with a price."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wantrain.plan import Plan
from wantrain.topology import Topology

_S_PER_HOUR, _BYTES_PER_GB = 3600.0, 1e9


@dataclass(frozen=True)
class StepPrice:
    """Of one step, in the topology's currency."""

    workers: float
    traffic: float

    @property
    def total(self) -> float:
        return self.workers + self.traffic


def step_price(
    plan: Plan, topology: Topology, step_s: float, bytes_by_link: Mapping[tuple[str, str], int]
) -> StepPrice:
    """Return what a step of `step_s` seconds costs; workers that the plan leaves out cost nothing."""
    per_hour = sum(topology.worker(name).price_per_hour for name in plan.workers)
    traffic = sum(
        num_bytes / _BYTES_PER_GB * topology.link(*pair).price_per_gb for pair, num_bytes in bytes_by_link.items()
    )
    return StepPrice(workers=per_hour * step_s / _S_PER_HOUR, traffic=traffic)


def has_prices(topology: Topology) -> bool:
    """Say whether the topology names any price."""
    by_the_hour = any(worker.price_per_hour for worker in topology.workers)
    return by_the_hour or any(rule.price_per_gb for rule in topology.rules)


def dear_workers(topology: Topology) -> list[tuple[str, ...]]:
    """Return sets of workers to try without: none, the dearest by computing, the two dearest kinds, and so on."""
    by_price: dict[float, list[str]] = {}
    for worker in topology.workers:
        by_price.setdefault(worker.price_per_hour / worker.flops_per_s, []).append(worker.name)
    kinds = [by_price[price] for price in sorted(by_price, reverse=True)]
    return [tuple(name for kind in kinds[:count] for name in kind) for count in range(len(kinds))]
