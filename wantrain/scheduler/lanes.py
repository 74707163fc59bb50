"""Deal the lanes of a batch to replicas, more of them to faster ones.

Lanes are dealt in units: the fewest that fill whole microbatches. Where nothing is said about lanes there is one for
each microbatch of the batch, so that the samples that share a microbatch don't depend on the plan.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

from wantrain.errors import PlanError


class Deck(NamedTuple):
    """What there is to deal: `units` of some lanes each, and the microbatches that a unit fills."""

    num_lanes: int
    units: int
    lanes_per_unit: int
    microbatches_per_unit: int

    def lanes_of(self, units: Sequence[int]) -> list[tuple[int, ...]]:
        """Return every replica's lanes: a run of them, for the units that it is dealt."""
        lanes, first = [], 0
        for count in units:
            end = first + count * self.lanes_per_unit
            lanes.append(tuple(range(first, end)))
            first = end
        return lanes


def make_deck(batch_size: int, microbatch_size: int, num_lanes: int | None, num_replicas: int | None) -> Deck:
    """Return what there is to deal; raise PlanError where it can't be dealt to so many replicas."""
    needed = num_replicas or 1
    lanes = num_lanes or max(batch_size // microbatch_size, 1)
    if batch_size % lanes or lanes < needed:
        raise PlanError(
            f"{lanes} lanes can't be drawn from evenly by {needed} replicas in batches of {batch_size};"
            " num_lanes must divide batch_size and be no less than num_replicas"
        )
    per_lane = batch_size // lanes
    lanes_per_unit = microbatch_size // math.gcd(microbatch_size, per_lane)
    units, rest = divmod(lanes, lanes_per_unit)
    if rest or units < needed:
        raise PlanError(
            f"a replica's {batch_size // needed} samples a step don't fill microbatches of {microbatch_size};"
            " change batch_size, num_lanes or microbatch_size"
        )
    return Deck(lanes, units, lanes_per_unit, lanes_per_unit * per_lane // microbatch_size)


def deal_evenly(units: int, num_replicas: int) -> list[int]:
    """Return each replica's units, as evenly as can be; later ones get what is left over."""
    return [units * (i + 1) // num_replicas - units * i // num_replicas for i in range(num_replicas)]


def deal_by_speed(deck: Deck, fill_s: Sequence[float], period_s: Sequence[float]) -> list[int]:
    """Return each replica's units so that the last one is done soonest; n microbatches take fill + (n - 1) · period.

    Each unit goes to whoever is done with it first. That is optimal, since what a unit adds to a replica doesn't depend
    on the others (jobs of equal size on machines of different speed).
    """
    own = [period * deck.microbatches_per_unit for period in period_s]
    units = [1] * len(own)
    done = [(fill + 2 * own[r] - period_s[r], -r) for r, fill in enumerate(fill_s)]
    heapq.heapify(done)
    for _ in range(deck.units - len(own)):
        then_s, r = done[0]
        units[-r] += 1
        heapq.heapreplace(done, (then_s + own[-r], r))
    return units
