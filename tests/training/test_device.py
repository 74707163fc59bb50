import pytest
import torch

from wantrain.errors import ConfigError
from wantrain.training.device import open_device


def test_a_device_that_is_there_is_opened() -> None:
    assert open_device("cpu", "this machine", "choose another") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "abacus"])
def test_what_is_not_there_is_one_line_with_whose_it_is_and_the_remedy(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^worker 'a' can't use device '{name}' \(.+\); change the topology$"):
        open_device(name, "worker 'a'", "change the topology")
