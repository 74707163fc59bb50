"""What is known of a cluster without one, and what is refused before anything is asked of it."""

from __future__ import annotations

from typing import Any

import pytest

from wantrain.cli import main
from wantrain.launch.ray_cluster import Node, find_places
from wantrain.topology import Worker


def make_worker(name: str, **values: Any) -> Worker:
    return Worker.model_validate({"name": name, "site": "s"} | values)


def make_node(name: str, address: str = "10.0.0.1", **resources: float) -> Node:
    return Node(id=name, name=name, address=address, port=1, resources={"CPU": 1.0, **resources})


def test_a_worker_is_on_the_node_with_its_resource_then_its_name_then_its_address() -> None:
    resource, named, addressed = make_node("x", paris=1.0), make_node("paris"), make_node("y", "10.0.0.7")
    paris = make_worker("paris", address="10.0.0.7")
    assert find_places([paris], [addressed, named, resource]) == {"paris": resource}
    assert find_places([paris], [addressed, named]) == {"paris": named}
    assert find_places([paris], [addressed]) == {"paris": addressed}
    assert find_places([make_worker("tokyo")], [addressed, named, resource]) == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--replan",), "--replan is for --engine ray"),
        (("--node-wait", "5"), "--node-wait is for --engine ray"),
        (("--engine", "ray", "--dilation", "2"), "can't go with --engine ray"),
        (("--engine", "ray", "--address", "ray://somewhere:10001"), "--address is HOST:PORT"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "demo", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
