"""DT-FM's own scheduling problem, and a solver for it: to be held against their cost on their scenarios.

Yuan et al., "Decentralized Training of Foundation Models in Heterogeneous Environments", NeurIPS 2022, section 3.
S stages of R devices each; a is the delay in s, b the rate in Gbit/s, A and G activations and gradients in GB:

    send(d, d') = a[d,d'] + 8·A / b[d,d']
    DP   = max over stages, max over their devices d, of the sum over the stage's others d' of 2·(a + 8·G / (b·R))
    PP   = sum over boundaries of the slowest send between the two devices of a replica
    cost = DP + 2·PP

No compute, no memory, no overlap: their figure, not a prediction. Pipelines are scored as they are laid out; DT-FM
minimizes PP over pairings (a bottleneck matching) and orders of stages (an open travelling salesman) by itself, which a
search over the layout covers: swaps of two devices, of two stages and of whole runs of stages.

Many runs of record-to-record travel from random layouts, and from devices in their own order, one after another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wantrain.scheduler.native import compiled
from wantrain.scheduler.placement import next_random

GRADIENT_GB = 0.65
"""Three of 24 layers of 1.3 billion parameters, in fp32: as in their code."""

ACTIVATION_GB = 2024 * 2048 * 2 * (1.25e5 / 2048) / 1024**3
"""61 samples of a pipeline's batch in fp16: as in their code, with its 2024 for 2048 and its 1024³ for 10⁹."""

_RUNS, _CHANGES = 8, 40_000
"""Chosen: twice what all published scenarios needed with any of three seeds."""

_ALLOWANCE = 0.1
_WEIGHTS = (1.0, 0.02)
"""Chosen: a run is led by means first, and then by the cost itself."""

Table = NDArray[np.float64]


class Solution(NamedTuple):
    """A layout (a row per stage, a device of each replica in it) and its cost."""

    cost: float
    stages: tuple[tuple[int, ...], ...]


class _Costs(NamedTuple):
    """The problem for machine code: what a pair costs, flat; how many stages and replicas."""

    exchange_s: Any
    send_s: Any
    num_devices: int
    num_stages: int
    num_replicas: int


class _Layout(NamedTuple):
    """Devices stage by stage, and what each stage and each boundary costs."""

    devices: Any
    exchange_s: Any
    send_s: Any
    mean_send_s: Any
    best: Any


def tables(delay_s: Table, rate_gbit_per_s: Table, num_replicas: int) -> tuple[Table, Table]:
    """Return what a pair of devices costs in a stage's exchange, and what one send between them costs."""
    exchange_s = 2 * (delay_s + 8 * GRADIENT_GB / (rate_gbit_per_s * num_replicas))
    return exchange_s, delay_s + 8 * ACTIVATION_GB / rate_gbit_per_s


def cost(stages: Sequence[Sequence[int]], delay_s: Table, rate_gbit_per_s: Table) -> float:
    """Return DT-FM's cost of a layout, as it is laid out."""
    exchange_s, send_s = tables(delay_s, rate_gbit_per_s, len(stages[0]))
    groups = [np.asarray(stage) for stage in stages]
    own = [exchange_s[np.ix_(group, group)].sum(axis=1) - exchange_s[group, group] for group in groups]
    crossing = [send_s[a, b].max() for a, b in itertools.pairwise(groups)]
    return float(max(sums.max() for sums in own) + 2 * sum(crossing))


def solve(delay_s: Table, rate_gbit_per_s: Table, num_stages: int, num_replicas: int, seed: int = 0) -> Solution:
    """Return the best layout found; every device takes part."""
    exchange_s, send_s = tables(delay_s, rate_gbit_per_s, num_replicas)
    num_devices = num_stages * num_replicas
    costs = _Costs(exchange_s.ravel(), send_s.ravel(), num_devices, num_stages, num_replicas)
    run = compiled(improve, next_random, price_stage, price_boundary, price_around, total, swap)
    generator = np.random.default_rng(seed)
    best = np.inf, np.zeros(num_devices, dtype=np.int64)
    for first in _starts(generator, num_stages, num_replicas):
        layout = _Layout(first, np.zeros(num_stages), np.zeros(num_stages), np.zeros(num_stages), first.copy())
        for weight in _WEIGHTS:
            run(costs, layout, _CHANGES, _ALLOWANCE, weight, int(generator.integers(1, 2**31 - 1)))
        stages = layout.best.reshape(num_stages, num_replicas)
        best = min(best, (cost(stages, delay_s, rate_gbit_per_s), layout.best), key=lambda one: one[0])
    return Solution(best[0], tuple(tuple(map(int, row)) for row in best[1].reshape(num_stages, num_replicas)))


def _starts(generator: np.random.Generator, num_stages: int, num_replicas: int) -> list[NDArray[np.int64]]:
    """Return devices in order as stages and as pipelines, and random layouts."""
    order = np.arange(num_stages * num_replicas)
    pipelines = np.ascontiguousarray(order.reshape(num_replicas, num_stages).T).ravel()
    return [order, pipelines, *(generator.permutation(order) for _ in range(_RUNS - 2))]


def price_stage(costs: _Costs, layout: _Layout, s: int) -> None:
    """Fill in what a stage's exchange costs."""
    worst = 0.0
    first = s * costs.num_replicas
    for i in range(costs.num_replicas):
        row = layout.devices[first + i] * costs.num_devices
        own = 0.0
        for j in range(costs.num_replicas):
            if i != j:
                own += costs.exchange_s[row + layout.devices[first + j]]
        worst = max(worst, own)
    layout.exchange_s[s] = worst


def price_boundary(costs: _Costs, layout: _Layout, s: int) -> None:
    """Fill in the slowest send from stage s to the next, and the mean one."""
    worst = mean = 0.0
    for r in range(costs.num_replicas):
        here = layout.devices[s * costs.num_replicas + r]
        there = layout.devices[(s + 1) * costs.num_replicas + r]
        seconds = costs.send_s[here * costs.num_devices + there]
        worst = max(worst, seconds)
        mean += seconds / costs.num_replicas
    layout.send_s[s] = worst
    layout.mean_send_s[s] = mean


def price_around(costs: _Costs, layout: _Layout, s: int) -> None:
    """Bring up to date what a stage has a part in."""
    price_stage(costs, layout, s)
    if s > 0:
        price_boundary(costs, layout, s - 1)
    if s + 1 < costs.num_stages:
        price_boundary(costs, layout, s)


def total(costs: _Costs, layout: _Layout, weight: float) -> float:
    """Return the cost, and `weight` of what it would be with means in the place of maxima, which leads on.

    A boundary counts with the geometric mean of its slowest and its mean send: two boundaries of which one is all fast
    are then better than two half fast ones, which is how all of a boundary's sends become fast.
    """
    worst = mean = 0.0
    for s in range(costs.num_stages):
        worst = max(worst, layout.exchange_s[s])
        mean += layout.exchange_s[s] / costs.num_stages
    for s in range(costs.num_stages - 1):
        worst += 2 * layout.send_s[s]
        mean += 2 * math.sqrt(layout.mean_send_s[s] * layout.send_s[s])
    return worst + weight * mean


def swap(costs: _Costs, layout: _Layout, kind: int, i: int, j: int) -> None:
    """Swap two devices (0), the stages that they are in (1), or their replicas from the first one's stage on (2)."""
    width, devices = costs.num_replicas, layout.devices
    a, b = i // width, j // width
    if kind == 0:
        devices[i], devices[j] = devices[j], devices[i]
    elif kind == 1:
        for r in range(width):
            k, m = a * width + r, b * width + r
            devices[k], devices[m] = devices[m], devices[k]
    else:
        for s in range(a, costs.num_stages):
            k, m = s * width + i % width, s * width + j % width
            devices[k], devices[m] = devices[m], devices[k]
    if kind == 2:
        for s in range(a, costs.num_stages):
            price_stage(costs, layout, s)
        if a > 0:
            price_boundary(costs, layout, a - 1)
    else:
        price_around(costs, layout, a)
        price_around(costs, layout, b)


def improve(costs: _Costs, layout: _Layout, changes: int, allowance: float, weight: float, random: int) -> float:
    """Try so many swaps; leave the best layout met in `best` and in `devices`."""
    for s in range(costs.num_stages):
        price_around(costs, layout, s)
    best = total(costs, layout, weight)
    layout.best[:] = layout.devices
    for change in range(changes):
        random = next_random(random)
        i = random % costs.num_devices
        random = next_random(random)
        j = random % costs.num_devices
        random = next_random(random)
        kind = max(0, random % 20 - 17)
        swap(costs, layout, kind, i, j)
        now = total(costs, layout, weight)
        left = 1 - change / changes
        if now < best:
            best = now
            layout.best[:] = layout.devices
        elif now > best * (1 + allowance * left * left):
            swap(costs, layout, kind, i, j)
    layout.devices[:] = layout.best
    return best
