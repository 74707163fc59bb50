"""A step as two sheets of numbers, one whole and one real: what is to be played, and how far the play has come.

Ranks, lanes (ways from one rank to another), lines (links, and what several links share), buckets and payloads have
numbers. What belongs to one of them is a row of a table, and all tables lie one after another in the same two sheets,
so that a row has one address for both: `ints[at + IS_BUSY]` and `floats[at + GONE_AT_S]` are columns of one row. At the
sheets' head stand counts, flags and where each table begins.

So the loops of `play` pass on two things, whatever they look at. They run on lists as they are, and on numpy arrays as
machine code; sixty arrays with names of their own were tried, and took numba a minute to compile and ten times as long
to play.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = Any
"""A sheet: a list, or a numpy array for machine code."""

FORWARD, BACKWARD, REDUCE, STEP, WAIT, SEND, ENCODE, DECODE, WEIGHTS, NUM_KINDS = range(10)
"""Kinds of actions, and of what is recorded."""

SCATTER, GATHER = 2, 3
"""Streams beside FORWARD and BACKWARD: what a payload is."""

NUM_LINES = 5
"""Lines on a lane's way, the sender's own first: link, uplink, downlink, site's uplink, site's downlink; -1: none."""

NUM_THREADS = 5
"""Codec threads of a rank: one encodes, one decodes, and each phase of buckets (scatter, sum, gather) has its own."""

NUM_RANKS, NUM_REPLICAS, NUM_MICROBATCHES, NUM_DEVIATES, IS_BLOCKING, OVERLAPS_GRADIENTS, IS_RECORDED = range(7)
"""At the head: counts and flags. `NUM_MICROBATCHES` is that of the replica that has most."""

NUM_EVENTS, NUM_SENDINGS, NUM_RECORDS, FINISH_S = range(7, 11)
"""At the head: how many there are so far, and when the last action or sending ended."""

RANKS, ACTIONS, OUTLETS, BUCKETS, LANES, WAYS, LINES, ROWS, SENDINGS, RECORDS = range(11, 21)
ARRIVED, THREADS, GRADIENT_LANES, PIECES, NOISE, HEAD = range(21, 27)
"""At the head: where each table begins.

    ACTIONS          of all ranks, one after the other
    OUTLETS          what a rank sends of a microbatch, at 2 · rank + stream
    WAYS             a lane's lines, at NUM_LINES · lane + place
    ROWS             the lanes that wait for a line, at 2 · line + priority
    ARRIVED          whether a payload is there to be used, at (2 · rank + stream) · NUM_MICROBATCHES + microbatch
    THREADS          when each is free, at NUM_THREADS · rank + thread
    GRADIENT_LANES   from a rank to a member of its data group, at NUM_REPLICAS · rank + member; -1: itself
    PIECES           how many are there of a bucket, at 2 · bucket + (0: to be summed, 1: summed)
    NOISE            how late sendings are, in jitters
"""

NEXT_ACTION, END_ACTION, FIRST_BUCKET, END_BUCKET, BUCKETS_DUE, LAST_MICROBATCH, LAST_KIND, IS_BUSY = range(8)
BUCKET_CODING_S, GONE_AT_S, WAITING_SINCE_S, RANK = range(8, 12)
"""Columns of a rank; the last name of these lists is their number. Gradients are final with an action of `LAST_KIND`
for `LAST_MICROBATCH`."""

KIND, MICROBATCH, SECONDS, ACTION = range(4)
LANE_OUT, NUM_BYTES, ENCODE_S, DECODE_S, OUTLET = range(5)
"""`LANE_OUT` is -1 where nothing is sent; `DECODE_S` is for what comes in of that stream."""

RANK_OF, PIECE_BYTES, BUCKET = range(3)
SOURCE, TARGET, PRIORITY, FIRST_SENDING, LAST_SENDING, IS_WAITING, NEXT_WAITER = range(7)
S_PER_BYTE, LATENCY_S, JITTER_S, LAST_ARRIVAL_S, LANE = range(7, 12)
LINE_OF, PACE, WAY = range(3)
FREE_S, IS_WATCHED, LINE = range(3)
FIRST, LAST, ROW = range(3)
LANE_OF, STREAM, ITEM, NEXT_SENDING, SENDING = range(5)
RANK_AT, WHAT, ITEM_AT, PEER, BYTES, START_S, END_S, RECORD = range(8)
"""Columns of the other tables. Lists are chained: -1 is the end."""

WIDTHS = {
    RANKS: RANK,
    ACTIONS: ACTION,
    OUTLETS: OUTLET,
    BUCKETS: BUCKET,
    LANES: LANE,
    WAYS: WAY,
    LINES: LINE,
    ROWS: ROW,
    SENDINGS: SENDING,
    RECORDS: RECORD,
    **dict.fromkeys((ARRIVED, THREADS, GRADIENT_LANES, PIECES, NOISE), 1),
}
"""Columns of each table, in the order in which they lie."""


class Script(NamedTuple):
    """One step, as it begins, goes on and ends."""

    ints: Numbers
    floats: Numbers

    def column(self, table: int, column: int, rows: int | None = None, *, is_float: bool = False) -> NDArray[Any]:
        """Return a column of a table, up to its end or to so many rows."""
        first, width = self.ints[table] + column, WIDTHS[table]
        sheet = self.floats if is_float else self.ints
        end = len(sheet) if table + 1 == HEAD else self.ints[table + 1]
        if rows is not None:
            end = self.ints[table] + rows * width
        return np.asarray(sheet[first:end:width])

    @property
    def num_steps(self) -> int:
        """How long it is, roughly: actions and sendings."""
        head = self.ints
        return int((head[OUTLETS] - head[ACTIONS]) // ACTION + (head[RECORDS] - head[SENDINGS]) // SENDING)

    def as_lists(self) -> Script:
        """Return the same step on lists."""
        return Script(self.ints.tolist(), self.floats.tolist())


def make_script(head: dict[int, int], sizes: dict[int, int], columns: dict[tuple[int, int], Any]) -> Script:
    """Write the sheets: counts and flags, and columns by table and number; all else is zero.

    What a column holds goes where it belongs by its type, once for all rows or one for each.
    """
    starts, at = {}, HEAD
    for table, width in WIDTHS.items():
        starts[table] = at
        at += sizes[table] * width
    ints, floats = np.zeros(at, dtype=np.int64), np.zeros(at)
    for place, number in (head | starts).items():
        ints[place] = number
    for (table, column), values in columns.items():
        end = starts[table] + sizes[table] * WIDTHS[table]
        sheet = floats if np.asarray(values).dtype.kind == "f" else ints
        sheet[starts[table] + column : end : WIDTHS[table]] = values
    return Script(ints, floats)
