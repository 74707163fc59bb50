"""Without a GPU a side stream is nothing at all."""

import torch

from wantrain.pipeline.side_stream import SideStream


def test_on_the_cpu_work_is_done_where_it_is() -> None:
    side, tensor = SideStream("cpu"), torch.ones(3)
    mark = side.mark()
    assert mark is None
    with side.after(mark, tensor):
        doubled = tensor * 2
    assert side.hand_over(doubled, mark) is doubled
