"""The event loop of the simulator: loops over flat sequences, run as they are or as machine code (see `native`).

Four things happen at points in time, and whatever follows from them at the same moment is done at once:

    a rank is done computing, or may go on      it starts its next action if what that needs is here
    a codec thread is done                      its payload gets in line, or is there to be used
    a payload arrives                           a codec thread decodes it, or the rank it came for looks again
    a line is free                              the first payload in line for it leaves (`traffic`)

Nothing is written twice: small plays run this very code uncompiled, on lists.
"""

from __future__ import annotations

from heapq import heappop

from wantrain.scheduler.script import (
    ACTION,
    ACTIONS,
    ARRIVED,
    BACKWARD,
    BUCKET,
    BUCKET_CODING_S,
    BUCKETS,
    BUCKETS_DUE,
    DECODE,
    DECODE_S,
    ENCODE,
    ENCODE_S,
    END_ACTION,
    END_BUCKET,
    FIRST_BUCKET,
    GONE_AT_S,
    GRADIENT_LANES,
    IS_BLOCKING,
    IS_BUSY,
    ITEM,
    KIND,
    LANE,
    LANE_OF,
    LANE_OUT,
    LANES,
    LAST_KIND,
    LAST_MICROBATCH,
    MICROBATCH,
    NEXT_ACTION,
    NUM_MICROBATCHES,
    NUM_RANKS,
    NUM_REPLICAS,
    NUM_THREADS,
    OUTLET,
    OUTLETS,
    OVERLAPS_GRADIENTS,
    PIECES,
    RANK,
    RANK_OF,
    RANKS,
    REDUCE,
    SCATTER,
    SECONDS,
    SENDING,
    SENDINGS,
    STREAM,
    TARGET,
    THREADS,
    WAIT,
    WAITING_SINCE_S,
    Numbers,
)
from wantrain.scheduler.traffic import (
    HAS_ARRIVED,
    IS_CODED,
    IS_DECODED,
    IS_ENCODED,
    IS_FINISHED,
    IS_HANDED_IN,
    IS_READY,
    LINE_FREE,
    NUM_KINDS,
    TRAFFIC,
    line_free,
    push,
    record,
    submit,
)

_ENCODER, _DECODER, _SCATTERER = range(3)
"""A rank's codec threads."""


def play(ints: Numbers, floats: Numbers) -> None:
    """Play one step to its end, or until nothing happens any more."""
    queue = [(0.0, 0, IS_READY)]
    for rank in range(1, ints[NUM_RANKS]):
        push(ints, queue, 0.0, IS_READY, rank)
    while len(queue) > 0:
        now_s, _, event = heappop(queue)
        kind, subject = event % NUM_KINDS, event // NUM_KINDS
        if kind == LINE_FREE:
            line_free(ints, floats, queue, subject, now_s)
        elif kind == IS_READY:
            ints[ints[RANKS] + subject * RANK + IS_BUSY] = 0
            advance(ints, floats, queue, subject, now_s)
        elif kind == IS_FINISHED:
            finish(ints, floats, queue, subject, now_s)
        elif kind == IS_ENCODED:
            encoded(ints, floats, queue, subject, now_s)
        elif kind == HAS_ARRIVED:
            arrive(ints, floats, queue, subject, now_s)
        elif kind == IS_DECODED:
            deliver(ints, floats, queue, subject, now_s)
        elif kind == IS_HANDED_IN:
            code_bucket(ints, floats, queue, subject, 0, now_s)
        else:
            bucket_coded(ints, floats, queue, subject // 3, subject % 3, now_s)


def advance(ints: Numbers, floats: Numbers, queue: Numbers, rank: int, now_s: float) -> None:
    """Start the rank's next action if it is idle and what it needs is here."""
    own = ints[RANKS] + rank * RANK
    if ints[own + IS_BUSY] or ints[own + NEXT_ACTION] == ints[own + END_ACTION] or now_s >= floats[own + GONE_AT_S]:
        return
    action = ints[ACTIONS] + ints[own + NEXT_ACTION] * ACTION
    kind, microbatch = ints[action + KIND], ints[action + MICROBATCH]
    if kind == REDUCE and ints[own + BUCKETS_DUE] > 0:
        return
    if kind <= BACKWARD and lacks_input(ints, rank, kind, microbatch):
        return
    if now_s > floats[own + WAITING_SINCE_S]:
        record(ints, floats, rank, WAIT, floats[own + WAITING_SINCE_S], now_s, microbatch)
    ints[own + IS_BUSY] = 1
    end_s = now_s + floats[action + SECONDS]
    if end_s > floats[own + GONE_AT_S]:
        return
    if kind != REDUCE:
        record(ints, floats, rank, kind, now_s, end_s, microbatch)
    if kind == ints[own + LAST_KIND] and microbatch == ints[own + LAST_MICROBATCH] and ints[OVERLAPS_GRADIENTS]:
        hand_in(ints, queue, rank, now_s, floats[action + SECONDS])
    push(ints, queue, end_s, IS_FINISHED, rank)


def lacks_input(ints: Numbers, rank: int, stream: int, microbatch: int) -> bool:
    """Whether a forward or backward waits for a payload: from where the other stream goes, if it goes anywhere."""
    other_way = ints[OUTLETS] + (2 * rank + 1 - stream) * OUTLET
    place = (2 * rank + stream) * ints[NUM_MICROBATCHES] + microbatch
    return bool(ints[other_way + LANE_OUT] >= 0 and ints[ints[ARRIVED] + place] == 0)


def finish(ints: Numbers, floats: Numbers, queue: Numbers, rank: int, now_s: float) -> None:
    """Send on what an action has made, and go on with the next one."""
    own = ints[RANKS] + rank * RANK
    action = ints[ACTIONS] + ints[own + NEXT_ACTION] * ACTION
    kind, microbatch = ints[action + KIND], ints[action + MICROBATCH]
    ints[own + NEXT_ACTION] += 1
    ints[own + IS_BUSY] = 0
    floats[own + WAITING_SINCE_S] = now_s
    if kind <= BACKWARD and ints[ints[OUTLETS] + (2 * rank + kind) * OUTLET + LANE_OUT] >= 0:
        ints[own + IS_BUSY] = ints[IS_BLOCKING]
        send(ints, floats, queue, rank, kind, microbatch, now_s)
    if kind == ints[own + LAST_KIND] and microbatch == ints[own + LAST_MICROBATCH] and not ints[OVERLAPS_GRADIENTS]:
        hand_in(ints, queue, rank, now_s, 0.0)
    advance(ints, floats, queue, rank, now_s)


def send(ints: Numbers, floats: Numbers, queue: Numbers, rank: int, stream: int, microbatch: int, now_s: float) -> None:
    """Have a payload of the pipeline encoded, then put into its lane."""
    seconds = floats[ints[OUTLETS] + (2 * rank + stream) * OUTLET + ENCODE_S]
    payload = (2 * rank + stream) * ints[NUM_MICROBATCHES] + microbatch
    if seconds > 0:
        end_s = thread_end_s(ints, floats, rank, _ENCODER, now_s, seconds)
        record(ints, floats, rank, ENCODE, end_s - seconds, end_s, microbatch)
        push(ints, queue, end_s, IS_ENCODED, payload)
    else:
        encoded(ints, floats, queue, payload, now_s)


def encoded(ints: Numbers, floats: Numbers, queue: Numbers, payload: int, now_s: float) -> None:
    """Put a payload of the pipeline into its lane."""
    outlet, microbatch = payload // ints[NUM_MICROBATCHES], payload % ints[NUM_MICROBATCHES]
    submit(ints, floats, queue, ints[ints[OUTLETS] + outlet * OUTLET + LANE_OUT], outlet % 2, microbatch, now_s)


def thread_end_s(ints: Numbers, floats: Numbers, rank: int, thread: int, now_s: float, seconds: float) -> float:
    """Give a codec thread work and return when it is done: one thing after another."""
    at = ints[THREADS] + NUM_THREADS * rank + thread
    floats[at] = max(now_s, floats[at]) + seconds
    end_s: float = floats[at]
    return end_s


def arrive(ints: Numbers, floats: Numbers, queue: Numbers, number: int, now_s: float) -> None:
    """Have a payload decoded, or count a piece of a bucket."""
    at = ints[SENDINGS] + number * SENDING
    stream, item = ints[at + STREAM], ints[at + ITEM]
    rank = ints[ints[LANES] + ints[at + LANE_OF] * LANE + TARGET]
    own = ints[RANKS] + rank * RANK
    if now_s >= floats[own + GONE_AT_S]:
        return
    if stream >= SCATTER:
        count_piece(ints, floats, queue, ints[own + FIRST_BUCKET] + item, stream - SCATTER, now_s)
        return
    seconds = floats[ints[OUTLETS] + (2 * rank + stream) * OUTLET + DECODE_S]
    if seconds > 0:
        end_s = thread_end_s(ints, floats, rank, _DECODER, now_s, seconds)
        record(ints, floats, rank, DECODE, end_s - seconds, end_s, item)
        push(ints, queue, end_s, IS_DECODED, number)
    else:
        deliver(ints, floats, queue, number, now_s)


def deliver(ints: Numbers, floats: Numbers, queue: Numbers, number: int, now_s: float) -> None:
    """Let a rank use a payload."""
    at = ints[SENDINGS] + number * SENDING
    rank = ints[ints[LANES] + ints[at + LANE_OF] * LANE + TARGET]
    ints[ints[ARRIVED] + (2 * rank + ints[at + STREAM]) * ints[NUM_MICROBATCHES] + ints[at + ITEM]] = 1
    advance(ints, floats, queue, rank, now_s)


def hand_in(ints: Numbers, queue: Numbers, rank: int, now_s: float, seconds: float) -> None:
    """Hand in the rank's buckets, evenly over the action that makes their gradients final."""
    own = ints[RANKS] + rank * RANK
    first, end = ints[own + FIRST_BUCKET], ints[own + END_BUCKET]
    for bucket in range(first, end):
        push(ints, queue, now_s + seconds * (bucket - first + 1) / (end - first), IS_HANDED_IN, bucket)


def code_bucket(ints: Numbers, floats: Numbers, queue: Numbers, bucket: int, phase: int, now_s: float) -> None:
    """Have a bucket's next phase coded: its pieces encoded; added up and encoded again; or decoded."""
    rank = ints[ints[BUCKETS] + bucket * BUCKET + RANK_OF]
    share = 1.0 if phase == 1 else (ints[NUM_REPLICAS] - 1) / ints[NUM_REPLICAS]
    seconds = floats[ints[RANKS] + rank * RANK + BUCKET_CODING_S] * share
    end_s = thread_end_s(ints, floats, rank, _SCATTERER + phase, now_s, seconds)
    if seconds > 0:
        record(ints, floats, rank, DECODE if phase == 2 else ENCODE, end_s - seconds, end_s, -1)
    push(ints, queue, end_s, IS_CODED, 3 * bucket + phase)


def bucket_coded(ints: Numbers, floats: Numbers, queue: Numbers, bucket: int, phase: int, now_s: float) -> None:
    """Send a bucket's pieces to their owners, or the sum of the own one to everybody; or the bucket is done."""
    rank = ints[ints[BUCKETS] + bucket * BUCKET + RANK_OF]
    own = ints[RANKS] + rank * RANK
    if now_s >= floats[own + GONE_AT_S]:
        return
    if phase == 2:
        ints[own + BUCKETS_DUE] -= 1
        advance(ints, floats, queue, rank, now_s)
        return
    for member in range(ints[NUM_REPLICAS]):
        lane = ints[ints[GRADIENT_LANES] + ints[NUM_REPLICAS] * rank + member]
        if lane >= 0:
            submit(ints, floats, queue, lane, SCATTER + phase, bucket - ints[own + FIRST_BUCKET], now_s)
    count_piece(ints, floats, queue, bucket, phase, now_s)


def count_piece(ints: Numbers, floats: Numbers, queue: Numbers, bucket: int, phase: int, now_s: float) -> None:
    """Count a piece of a bucket, a rank's own among them; go on once all are there."""
    at = ints[PIECES] + 2 * bucket + phase
    ints[at] += 1
    if ints[at] == ints[NUM_REPLICAS]:
        code_bucket(ints, floats, queue, bucket, phase + 1, now_s)


HELPERS = (
    *(*TRAFFIC, thread_end_s, encoded, send, code_bucket, count_piece, hand_in, lacks_input),
    *(advance, bucket_coded, deliver, arrive, finish),
)
"""What `play` calls; each after those that it calls itself."""
