"""Traffic in the simulator: who waits for which line, and what leaves when.

A *lane* is the way from one rank to another. Its payloads leave one after another, in order. A payload leaves when
every *line* on its way is free: the link itself, the sender's uplink, the receiver's downlink, the exit and the
entrance of their sites. It then holds each line for its bytes at that line's pace, has left after its bytes at the pace
of the slowest, and is there one latency later. A lane that must wait stands in line at the one that is busy longest:
whose payload was submitted first goes first, and in the sender's own lines any payload of the pipeline before any piece
of gradients.

    lane 0 → 1   ─[F0]─[F1]──────        rank 0 and rank 2 share nothing; rank 1's uplink carries F0 and B0,
    lane 1 → 2   ──────[F0]──[F1]        in the order in which they were ready
    lane 1 → 0   ───────────[B0]─
"""

from __future__ import annotations

from heapq import heappush

from wantrain.scheduler.script import (
    BUCKET,
    BUCKETS,
    BYTES,
    END_S,
    FINISH_S,
    FIRST,
    FIRST_BUCKET,
    FIRST_SENDING,
    FREE_S,
    GONE_AT_S,
    IS_BLOCKING,
    IS_RECORDED,
    IS_WAITING,
    IS_WATCHED,
    ITEM,
    ITEM_AT,
    JITTER_S,
    LANE,
    LANE_OF,
    LANES,
    LAST,
    LAST_ARRIVAL_S,
    LAST_SENDING,
    LATENCY_S,
    LINE,
    LINE_OF,
    LINES,
    NEXT_SENDING,
    NEXT_WAITER,
    NOISE,
    NUM_BYTES,
    NUM_DEVIATES,
    NUM_EVENTS,
    NUM_LINES,
    NUM_RECORDS,
    NUM_SENDINGS,
    OUTLET,
    OUTLETS,
    PACE,
    PEER,
    PIECE_BYTES,
    PRIORITY,
    RANK,
    RANK_AT,
    RANKS,
    RECORD,
    RECORDS,
    ROW,
    ROWS,
    S_PER_BYTE,
    SCATTER,
    SEND,
    SENDING,
    SENDINGS,
    SOURCE,
    START_S,
    STREAM,
    TARGET,
    WAY,
    WAYS,
    WHAT,
    Numbers,
)

_NUM_OWN_LINES = 2
"""Of a lane's lines, those that are the sender's own."""

IS_READY, IS_FINISHED, IS_ENCODED, HAS_ARRIVED, IS_DECODED, IS_HANDED_IN, IS_CODED, LINE_FREE, NUM_KINDS = range(9)
"""Kinds of events. Their subjects: a rank (twice), a rank's payload, a sending (twice), a bucket, a bucket's phase, a
line."""

_FIRST = 1 << 60
"""Of events at the same time, lines that become free come first: so that nobody pushes in."""


def push(ints: Numbers, queue: Numbers, time_s: float, kind: int, subject: int) -> None:
    """Have something happen at a time; at the same time what was said first happens first."""
    number = ints[NUM_EVENTS] + 1
    ints[NUM_EVENTS] = number
    heappush(queue, (time_s, number - _FIRST if kind == LINE_FREE else number, subject * NUM_KINDS + kind))


def record(ints: Numbers, floats: Numbers, rank: int, kind: int, start_s: float, end_s: float, microbatch: int) -> int:
    """Note what happened, and return where; when it ended is noted even if nothing else is."""
    floats[FINISH_S] = max(floats[FINISH_S], end_s)
    at: int = ints[RECORDS] + ints[NUM_RECORDS] * RECORD
    if ints[IS_RECORDED]:
        ints[NUM_RECORDS] += 1
        ints[at + RANK_AT], ints[at + WHAT], ints[at + ITEM_AT], ints[at + PEER] = rank, kind, microbatch, -1
        floats[at + START_S], floats[at + END_S] = start_s, end_s
    return at


def submit(ints: Numbers, floats: Numbers, queue: Numbers, lane: int, stream: int, item: int, now_s: float) -> None:
    """Put a payload at the end of a lane."""
    own, number = ints[LANES] + lane * LANE, ints[NUM_SENDINGS]
    if now_s >= floats[ints[RANKS] + ints[own + SOURCE] * RANK + GONE_AT_S]:
        return
    ints[NUM_SENDINGS] = number + 1
    at = ints[SENDINGS] + number * SENDING
    ints[at + LANE_OF], ints[at + STREAM], ints[at + ITEM], ints[at + NEXT_SENDING] = lane, stream, item, -1
    if ints[own + FIRST_SENDING] < 0:
        ints[own + FIRST_SENDING] = number
    else:
        ints[ints[SENDINGS] + ints[own + LAST_SENDING] * SENDING + NEXT_SENDING] = number
    ints[own + LAST_SENDING] = number
    if not ints[own + IS_WAITING]:
        leave(ints, floats, queue, lane, now_s)


def leave(ints: Numbers, floats: Numbers, queue: Numbers, lane: int, now_s: float) -> None:
    """Send off what a lane holds, up to the first payload that must wait for a line."""
    while ints[ints[LANES] + lane * LANE + FIRST_SENDING] >= 0:
        place = busy_place(ints, floats, lane, now_s)
        if place >= 0:
            stand_in_line(ints, floats, queue, lane, place)
            return
        depart(ints, floats, queue, lane, now_s)


def busy_place(ints: Numbers, floats: Numbers, lane: int, now_s: float) -> int:
    """Return which place on a lane's way is busy longest, of equals the one that most share; -1: all lines are free."""
    found, latest_s = -1, now_s
    for place in range(NUM_LINES):
        line = ints[ints[WAYS] + (NUM_LINES * lane + place) * WAY + LINE_OF]
        free_s = floats[ints[LINES] + line * LINE + FREE_S] if line >= 0 else now_s
        if free_s >= latest_s and free_s > now_s:
            found, latest_s = place, free_s
    return found


def stand_in_line(ints: Numbers, floats: Numbers, queue: Numbers, lane: int, place: int) -> None:
    """Put a lane among those that wait for a line: in the order in which their first payloads were submitted."""
    lanes, own = ints[LANES], ints[LANES] + lane * LANE
    line = ints[ints[WAYS] + (NUM_LINES * lane + place) * WAY + LINE_OF]
    row = ints[ROWS] + (2 * line + (ints[own + PRIORITY] if place < _NUM_OWN_LINES else 0)) * ROW
    ahead, behind = -1, ints[row + FIRST]
    if behind >= 0 and ints[lanes + ints[row + LAST] * LANE + FIRST_SENDING] < ints[own + FIRST_SENDING]:
        ahead, behind = ints[row + LAST], -1
    while behind >= 0 and ints[lanes + behind * LANE + FIRST_SENDING] < ints[own + FIRST_SENDING]:
        ahead, behind = behind, ints[lanes + behind * LANE + NEXT_WAITER]
    ints[own + NEXT_WAITER] = behind
    if ahead < 0:
        ints[row + FIRST] = lane
    else:
        ints[lanes + ahead * LANE + NEXT_WAITER] = lane
    if behind < 0:
        ints[row + LAST] = lane
    ints[own + IS_WAITING] = 1
    watch(ints, floats, queue, line)


def watch(ints: Numbers, floats: Numbers, queue: Numbers, line: int) -> None:
    """Have a line looked at once it is free."""
    at = ints[LINES] + line * LINE
    if not ints[at + IS_WATCHED]:
        ints[at + IS_WATCHED] = 1
        push(ints, queue, floats[at + FREE_S], LINE_FREE, line)


def line_free(ints: Numbers, floats: Numbers, queue: Numbers, line: int, now_s: float) -> None:
    """Let those go that wait for a line, as long as it is free."""
    at, rows = ints[LINES] + line * LINE, ints[ROWS] + 2 * line * ROW
    for row in (rows, rows + ROW):
        while ints[row + FIRST] >= 0 and floats[at + FREE_S] <= now_s:
            lane = ints[row + FIRST]
            ints[row + FIRST] = ints[ints[LANES] + lane * LANE + NEXT_WAITER]
            ints[ints[LANES] + lane * LANE + IS_WAITING] = 0
            leave(ints, floats, queue, lane, now_s)
    ints[at + IS_WATCHED] = 0
    if ints[rows + FIRST] >= 0 or ints[rows + ROW + FIRST] >= 0:
        watch(ints, floats, queue, line)


def depart(ints: Numbers, floats: Numbers, queue: Numbers, lane: int, now_s: float) -> None:
    """Put a lane's first payload on its lines, all of which are free."""
    own, number = ints[LANES] + lane * LANE, ints[ints[LANES] + lane * LANE + FIRST_SENDING]
    at, source = ints[SENDINGS] + number * SENDING, ints[own + SOURCE]
    stream, num_bytes = ints[at + STREAM], bytes_of(ints, source, ints[at + STREAM], ints[at + ITEM])
    ints[own + FIRST_SENDING] = ints[at + NEXT_SENDING]
    for place in range(NUM_LINES):
        way = ints[WAYS] + (NUM_LINES * lane + place) * WAY
        if ints[way + LINE_OF] >= 0:
            floats[ints[LINES] + ints[way + LINE_OF] * LINE + FREE_S] = now_s + num_bytes * floats[way + PACE]
    left_s = now_s + num_bytes * floats[own + S_PER_BYTE]
    if left_s > floats[ints[RANKS] + source * RANK + GONE_AT_S]:
        return
    late_s = floats[own + JITTER_S] * floats[ints[NOISE] + number % ints[NUM_DEVIATES]]
    arrival_s = left_s + max(0.0, floats[own + LATENCY_S] + late_s)
    floats[own + LAST_ARRIVAL_S] = max(floats[own + LAST_ARRIVAL_S], arrival_s)
    noted = record(ints, floats, source, SEND, now_s, left_s, ints[at + ITEM] if stream < SCATTER else -1)
    if ints[IS_RECORDED]:
        ints[noted + PEER], ints[noted + BYTES] = ints[own + TARGET], num_bytes
    push(ints, queue, floats[own + LAST_ARRIVAL_S], HAS_ARRIVED, number)
    if ints[IS_BLOCKING] and stream < SCATTER:
        push(ints, queue, left_s, IS_READY, source)


def bytes_of(ints: Numbers, source: int, stream: int, item: int) -> int:
    """Return the bytes of a payload, or of a piece of a bucket."""
    if stream < SCATTER:
        size: int = ints[ints[OUTLETS] + (2 * source + stream) * OUTLET + NUM_BYTES]
    else:
        bucket = ints[ints[RANKS] + source * RANK + FIRST_BUCKET] + item
        size = ints[ints[BUCKETS] + bucket * BUCKET + PIECE_BYTES]
    return size


TRAFFIC = (push, record, watch, busy_place, stand_in_line, bytes_of, depart, leave, submit, line_free)
"""The functions of this module, each after those that it calls itself."""
