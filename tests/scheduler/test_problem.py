import numpy as np
import pytest

from tests.scheduler.cases import PROFILE, regions
from wantrain.plan import DEFAULT_BUCKET_BYTES
from wantrain.scheduler.network import make_network
from wantrain.scheduler.problem import Request, as_arrays, bucket_bytes_for, make_problem, make_state, num_pieces
from wantrain.wire import payload_bytes


def test_layers_are_summed_and_payloads_counted_with_their_headers() -> None:
    network = make_network(regions({"a": 2}), ["a-0", "a-1"])
    problem = make_problem(Request(PROFILE, 8, forward_codec="quantized:4"), network, 2, 1, 8, 1)
    assert problem.parameter_bytes[-1] == PROFILE.parameter_bytes
    elements = PROFILE.layers[0].activation_elements
    assert problem.forward_bytes[0] == payload_bytes("quantized:4", (1, elements))
    assert problem.backward_bytes[0] == payload_bytes("raw:fp32", (1, elements))


def test_a_codec_that_feeds_back_costs_the_weights_once_more_among_replicas() -> None:
    network = make_network(regions({"a": 2}), ["a-0", "a-1"])
    request = Request(PROFILE, 8, gradient_codec="error_feedback:quantized:4")
    copies = [make_problem(request, network, *shape, 8, 1).weight_copies for shape in ((2, 1), (1, 2))]
    assert copies == [4, 5]


def test_buckets_grow_with_the_number_of_replicas_unless_asked_for() -> None:
    request = Request(PROFILE, 8)
    assert bucket_bytes_for(request, 2, 4) == DEFAULT_BUCKET_BYTES
    assert bucket_bytes_for(request, 2, 64) > DEFAULT_BUCKET_BYTES
    assert bucket_bytes_for(Request(PROFILE, 8, bucket_bytes=1000), 2, 64) == 1000


@pytest.mark.parametrize("replicas", [2, 16, 128])
def test_a_step_has_no_more_pieces_than_can_be_played(replicas: int) -> None:
    assert 0 < num_pieces(Request(PROFILE, 8), 2, replicas) <= 200_000


def test_lists_become_arrays_for_machine_code() -> None:
    network = make_network(regions({"a": 2}), ["a-0", "a-1"])
    problem = make_problem(Request(PROFILE, 8), network, 2, 1, 8, 1)
    arrays = as_arrays(make_state(problem, [1, 0], (0, 3, 6), [8]))
    assert arrays.cells.dtype == np.int64
    assert arrays.fill_s.dtype == np.float64
