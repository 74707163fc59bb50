"""Lay a step out for the simulator: plan, topology, workload and disturbance as the tables of a script."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from wantrain.plan import Plan
from wantrain.schedule import ScheduleKind, is_own, make_schedule
from wantrain.scheduler.disturbance import Disturbance
from wantrain.scheduler.routes import Columns, Floats, Ints, Lanes, lane_columns, number_lanes, way_columns
from wantrain.scheduler.script import (
    ACTIONS,
    ARRIVED,
    BACKWARD,
    BUCKET_CODING_S,
    BUCKETS,
    BUCKETS_DUE,
    DECODE_S,
    ENCODE_S,
    END_ACTION,
    END_BUCKET,
    FIRST,
    FIRST_BUCKET,
    FORWARD,
    GONE_AT_S,
    GRADIENT_LANES,
    IS_BLOCKING,
    IS_RECORDED,
    KIND,
    LANE_OUT,
    LANES,
    LAST,
    LAST_KIND,
    LAST_MICROBATCH,
    LINES,
    MICROBATCH,
    NEXT_ACTION,
    NOISE,
    NUM_BYTES,
    NUM_DEVIATES,
    NUM_KINDS,
    NUM_LINES,
    NUM_MICROBATCHES,
    NUM_RANKS,
    NUM_REPLICAS,
    NUM_THREADS,
    OUTLETS,
    OVERLAPS_GRADIENTS,
    PIECE_BYTES,
    PIECES,
    RANK_OF,
    RANKS,
    RECORDS,
    REDUCE,
    ROWS,
    SECONDS,
    SENDINGS,
    STEP,
    THREADS,
    WAYS,
    WEIGHTS,
    Script,
    make_script,
)
from wantrain.scheduler.workload import Workload
from wantrain.topology import Topology

_KINDS = {"F": FORWARD, "B": BACKWARD, "W": WEIGHTS, "R": REDUCE, "S": STEP}

_NUM_DEVIATES = 1 << 16
"""Chosen: after so many sendings the deviates begin anew."""


def lay_out(plan: Plan, topology: Topology, workload: Workload, disturbance: Disturbance, is_recorded: bool) -> Script:
    """Return the step as it begins."""
    has_gradients = len(plan.replicas) > 1 and any(workload.bucket_bytes)
    most = max(replica.num_microbatches for replica in plan.replicas)
    lanes = number_lanes(plan, has_gradients)
    num_actions, actions = _actions(plan, workload, disturbance)
    num_buckets, buckets = _buckets(plan, workload if has_gradients else None)
    num_lines, ways = way_columns(plan, topology, lanes)
    sizes = {
        RANKS: plan.world_size,
        ACTIONS: int(num_actions.sum()),
        OUTLETS: 2 * plan.world_size,
        BUCKETS: int(num_buckets.sum()),
        LANES: len(lanes.source),
        WAYS: NUM_LINES * len(lanes.source),
        LINES: num_lines,
        ROWS: 2 * num_lines,
        SENDINGS: _num_sendings(plan, int(num_buckets.sum())),
        ARRIVED: 2 * plan.world_size * most,
        THREADS: NUM_THREADS * plan.world_size,
        GRADIENT_LANES: len(lanes.gradient_lane),
        PIECES: 2 * int(num_buckets.sum()),
        NOISE: 1 if disturbance.jitter_seed is None else _NUM_DEVIATES,
    }
    sizes[RECORDS] = (2 * sizes[ACTIONS] + 3 * sizes[SENDINGS] + 3 * sizes[BUCKETS]) * is_recorded
    head = {
        NUM_RANKS: plan.world_size,
        NUM_REPLICAS: len(plan.replicas),
        NUM_MICROBATCHES: most,
        NUM_DEVIATES: sizes[NOISE],
        IS_BLOCKING: disturbance.has_blocking_sends,
        OVERLAPS_GRADIENTS: disturbance.overlaps_gradients,
        IS_RECORDED: is_recorded,
    }
    rest = {
        (ROWS, FIRST): -1,
        (ROWS, LAST): -1,
        (GRADIENT_LANES, 0): lanes.gradient_lane,
        (NOISE, 0): _noise(disturbance.jitter_seed),
    }
    return make_script(
        head,
        sizes,
        actions
        | buckets
        | ways
        | rest
        | _ranks(plan, workload, disturbance, num_actions, num_buckets)
        | _outlets(plan, workload, lanes)
        | lane_columns(plan, topology, lanes, disturbance),
    )


def _noise(seed: int | None) -> Floats:
    return np.zeros(1) if seed is None else np.random.default_rng(seed).standard_normal(_NUM_DEVIATES)


def _num_sendings(plan: Plan, num_buckets: int) -> int:
    """Return how many payloads a step sends."""
    microbatches = sum(replica.num_microbatches for replica in plan.replicas)
    return 2 * (plan.num_stages - 1) * microbatches + 2 * num_buckets * (len(plan.replicas) - 1)


@functools.lru_cache(maxsize=64)
def _replica_actions(
    kind: ScheduleKind, depths: tuple[int, ...], postponed: tuple[int, ...], num_microbatches: int
) -> tuple[Ints, Ints, Ints]:
    """Return the number of actions of each stage, and of all of them kind and microbatch."""
    schedule = make_schedule(kind, len(depths), num_microbatches, depths, postponed)
    kinds = [_KINDS[action.kind] for actions in schedule for action in actions]
    microbatches = [action.microbatch for actions in schedule for action in actions]
    return np.array([len(actions) for actions in schedule]), np.array(kinds), np.array(microbatches)


def _actions(plan: Plan, workload: Workload, disturbance: Disturbance) -> tuple[Ints, Columns]:
    """Return how many actions each rank has, and all of them."""
    depths = tuple(stage.max_in_flight for stage in plan.stages)
    actions_of = _replica_actions.__wrapped__ if is_own(plan.schedule) else _replica_actions  # own ones may change
    postponed = tuple(stage.max_postponed for stage in plan.stages)
    replicas = [actions_of(plan.schedule, depths, postponed, one.num_microbatches) for one in plan.replicas]
    counts, kinds, microbatches = (np.concatenate(part) for part in zip(*replicas, strict=True))
    slow = np.array([disturbance.slow.get(name, 1.0) for name in plan.workers])
    ranks = np.arange(plan.world_size).repeat(counts)
    seconds = np.zeros((NUM_KINDS, plan.world_size))
    seconds[FORWARD], seconds[STEP] = workload.forward_s, workload.step_s
    is_split = np.bincount(ranks[kinds == WEIGHTS], minlength=plan.world_size) > 0
    seconds[WEIGHTS] = np.where(is_split, workload.weights_s or 0.0, 0.0)
    seconds[BACKWARD] = workload.backward_s - seconds[WEIGHTS]
    seconds *= slow
    return counts, {
        (RANKS, LAST_KIND): np.where(is_split, WEIGHTS, BACKWARD),
        (ACTIONS, KIND): kinds,
        (ACTIONS, MICROBATCH): microbatches,
        (ACTIONS, SECONDS): seconds[kinds, ranks],
    }


def _ranks(plan: Plan, workload: Workload, disturbance: Disturbance, num_actions: Ints, num_buckets: Ints) -> Columns:
    stages = np.arange(plan.world_size) % plan.num_stages
    last = np.array([replica.num_microbatches - 1 for replica in plan.replicas])
    coding_s = workload.bucket_coding_s or (0.0,) * plan.num_stages
    return {
        (RANKS, NEXT_ACTION): np.cumsum(num_actions) - num_actions,
        (RANKS, END_ACTION): np.cumsum(num_actions),
        (RANKS, FIRST_BUCKET): np.cumsum(num_buckets) - num_buckets,
        (RANKS, END_BUCKET): np.cumsum(num_buckets),
        (RANKS, BUCKETS_DUE): num_buckets,
        (RANKS, LAST_MICROBATCH): last.repeat(plan.num_stages),
        (RANKS, BUCKET_CODING_S): np.array(coding_s, dtype=float)[stages],
        (RANKS, GONE_AT_S): np.array([disturbance.gone_at_s.get(name, np.inf) for name in plan.workers]),
    }


def _outlets(plan: Plan, workload: Workload, lanes: Lanes) -> Columns:
    stages, idle = np.arange(plan.world_size) % plan.num_stages, (0.0,) * plan.world_size

    def both(forward: object, backward: object) -> NDArray[np.float64]:
        return np.array([forward, backward], dtype=float).T.ravel()

    sizes = [np.array(one)[stages] for one in (workload.forward_bytes, workload.backward_bytes)]
    return {
        (OUTLETS, LANE_OUT): np.array([lanes.next_lane, lanes.previous_lane]).T.ravel(),
        (OUTLETS, NUM_BYTES): np.array(sizes, dtype=np.int64).T.ravel(),
        (OUTLETS, ENCODE_S): both(workload.forward_encode_s or idle, workload.backward_encode_s or idle),
        (OUTLETS, DECODE_S): both(workload.forward_decode_s or idle, workload.backward_decode_s or idle),
    }


def _buckets(plan: Plan, workload: Workload | None) -> tuple[Ints, Columns]:
    """Return how many buckets each rank has, and all of them; none where nothing is reduced."""
    members = len(plan.replicas)
    sizes = ((),) * plan.num_stages if workload is None else workload.bucket_bytes
    counts = np.array([len(one) for one in sizes] * members)
    pieces = np.array([-(-size // members) for one in sizes for size in one] * members, dtype=np.int64)
    ranks = np.arange(plan.world_size).repeat(counts)
    return counts, {(BUCKETS, RANK_OF): ranks, (BUCKETS, PIECE_BYTES): pieces}
