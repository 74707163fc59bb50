import numpy as np
from plays import flat, make_plan, work

from wantrain.scheduler.disturbance import CALM
from wantrain.scheduler.layout import lay_out
from wantrain.scheduler.script import HEAD, LANES, LATENCY_S, NOISE, PIECES, RANKS, SOURCE, WIDTHS, make_script


def test_every_table_has_its_width_and_lies_in_the_order_of_its_number() -> None:
    assert list(WIDTHS) == list(range(RANKS, HEAD))
    sizes = {table: number for number, table in enumerate(WIDTHS)}
    made = make_script({}, sizes, {})
    assert [len(made.column(table, 0)) for table in WIDTHS] == list(sizes.values())
    assert len(made.ints) == len(made.floats) == HEAD + sum(sizes[table] * WIDTHS[table] for table in WIDTHS)


def test_a_column_is_read_as_it_was_written() -> None:
    sizes = dict.fromkeys(WIDTHS, 0) | {LANES: 3, NOISE: 1}
    written = {(LANES, SOURCE): np.arange(3), (LANES, LATENCY_S): 0.5, (NOISE, 0): np.array([7.0])}
    made = make_script({}, sizes, written)
    for one in (made, made.as_lists()):
        assert one.column(LANES, SOURCE).tolist() == [0, 1, 2]
        assert one.column(LANES, LATENCY_S, is_float=True).tolist() == [0.5] * 3
        assert one.column(LANES, SOURCE, 2).tolist() == [0, 1]
        assert one.column(NOISE, 0, is_float=True).tolist() == [7.0]
        assert one.column(PIECES, 0).tolist() == []


def test_a_step_is_as_long_as_its_actions_and_sendings() -> None:
    plan = make_plan(2, 3, 5)
    made = lay_out(plan, flat(6), work(plan, bucket_bytes=((10,), ())), CALM, is_recorded=False)
    actions, payloads, pieces = 6 * (2 * 5 + 2), 3 * 2 * 5, 2 * 3 * 2
    assert made.num_steps == actions + payloads + pieces
    assert len(made.column(RANKS, 0)) == 6
