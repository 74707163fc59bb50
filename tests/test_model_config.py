from pathlib import Path

import pytest

from wantrain.errors import ConfigError
from wantrain.model_config import ModelConfig

SHIPPED = sorted((Path(__file__).parents[1] / "configs/models").glob("*.toml"))


def test_layers_to_hand_out_are_embedding_blocks_and_head() -> None:
    assert ModelConfig(num_layers=4, hidden=8, num_heads=2, seq_len=8).num_layers_total == 6


@pytest.mark.parametrize(("hidden", "num_heads"), [(25, 3), (24, 8), (28, 8)])
def test_heads_of_odd_or_broken_size_are_refused(hidden: int, num_heads: int) -> None:
    given = {"num_layers": 1, "hidden": hidden, "num_heads": num_heads, "seq_len": 8}
    with pytest.raises(ConfigError, match="hidden must divide into heads of even size"):
        ModelConfig.parse(given, ConfigError, "model")


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_text("num_layers = 2\nhiden = 8\nnum_heads = 2\nseq_len = 8\n")
    with pytest.raises(ConfigError, match=r"unknown key 'hiden' .did you mean 'hidden'"):
        ModelConfig.load(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_models_load(path: Path) -> None:
    assert ModelConfig.load(path).num_layers_total >= 3
