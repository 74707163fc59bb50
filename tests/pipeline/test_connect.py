from tests.jobs import small_plan
from wantrain.comm.sender import PIPELINE_PRIORITY, REDUCE_PRIORITY
from wantrain.pipeline.connect import lines_of


def test_both_ends_of_every_line_agree_on_its_name_and_transport() -> None:
    plan = small_plan(3, 2)
    ends = [(rank, line) for rank in range(plan.world_size) for line in lines_of(plan, rank, is_tied=True)]
    for rank, line in ends:
        (other,) = [one for at, one in ends if at == line.peer_rank and one.name == line.name]
        assert other.peer_rank == rank
        assert other.transport == line.transport
        assert line.peer == plan.workers[line.peer_rank]


def test_a_rank_has_its_neighbours_its_replicas_and_the_other_end() -> None:
    plan = small_plan(3, 2)
    kinds = {rank: [(line.kind, line.peer_rank) for line in lines_of(plan, rank, is_tied=True)] for rank in range(3)}
    ends = [("forward", 1), ("backward", 1)]
    assert kinds[0] == [*ends, ("data-up", 3), ("data-down", 3), ("tied-up", 2), ("tied-down", 2)]
    assert kinds[1] == [
        ("forward", 0),
        ("forward", 2),
        ("backward", 0),
        ("backward", 2),
        ("data-up", 4),
        ("data-down", 4),
    ]
    assert kinds[2] == [*ends, ("data-up", 5), ("data-down", 5), ("tied-up", 0), ("tied-down", 0)]


def test_gradients_go_after_activations() -> None:
    priorities = {line.kind: line.priority for line in lines_of(small_plan(2, 2), 0)}
    first, then = dict.fromkeys(["forward", "backward"], PIPELINE_PRIORITY), REDUCE_PRIORITY
    assert priorities == first | {"data-up": then, "data-down": then}
    assert PIPELINE_PRIORITY < REDUCE_PRIORITY
