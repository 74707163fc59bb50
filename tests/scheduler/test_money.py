import pytest

from tests.jobs import change, flat_topology, small_plan
from wantrain.errors import TopologyError
from wantrain.scheduler.money import dear_workers, has_prices, step_price
from wantrain.topology import Topology


def priced(**link: object) -> Topology:
    return Topology.parse(
        {
            "name": "flat",
            "worker": [{"name": "w", "count": 4, "site": "s", "price_per_hour": 3.6}],
            "link": [{"within": "s", "bandwidth": "1 Gbit/s"} | link],
        },
        TopologyError,
        "flat",
    )


def test_a_step_costs_its_workers_by_the_hour_and_its_bytes_by_the_gigabyte() -> None:
    price = step_price(small_plan(2, 1), priced(price_per_gb=0.1), 10.0, {("w-0", "w-1"): 2_000_000_000})
    assert price.workers == pytest.approx(2 * 3.6 / 3600 * 10)  # two of four workers take part
    assert price.traffic == pytest.approx(0.2)
    assert price.total == pytest.approx(0.22)


def test_prices_are_known_or_not() -> None:
    assert has_prices(priced())
    assert not has_prices(flat_topology(2))


def test_a_negative_price_is_refused() -> None:
    with pytest.raises(TopologyError, match="price_per_gb"):
        priced(price_per_gb=-1)


def test_a_plan_knows_the_codecs_it_uses() -> None:
    alone, pair = small_plan(2, 1, gradient_codec="quantized:8"), small_plan(2, 2, gradient_codec="quantized:8")
    assert alone.codecs == {"raw:fp32"}  # nothing to reduce
    assert pair.codecs == {"raw:fp32", "quantized:8"}
    assert change(alone, boundaries=[{"backward_codec": "hadamard:4", "transports": [{}]}]).codecs == {
        "raw:fp32",
        "hadamard:4",
    }


def test_the_dearest_by_computing_are_left_out_first() -> None:
    topology = priced()
    prices = {"w-0": (4.0, 1e9), "w-1": (6.0, 3e9), "w-2": (6.0, 3e9), "w-3": (1.0, 1e9)}
    workers = tuple(
        worker.model_copy(update={"price_per_hour": prices[worker.name][0], "flops_per_s": prices[worker.name][1]})
        for worker in topology.workers
    )
    sets = dear_workers(topology.model_copy(update={"workers": workers}))
    assert sets == [(), ("w-0",), ("w-0", "w-1", "w-2")]
