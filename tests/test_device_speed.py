from pathlib import Path

import pytest

from wantrain.device_speed import DeviceTable, derived_profile, shipped_devices
from wantrain.errors import ConfigError
from wantrain.model_config import ModelConfig
from wantrain.profile import gpt_profile
from wantrain.resources import find_config

MODEL = ModelConfig(num_layers=2, hidden=64, num_heads=4, seq_len=32)


def test_every_shipped_device_sustains_less_than_its_peak_and_names_its_source() -> None:
    devices = shipped_devices().devices
    assert {one.name for one in devices} >= {"v100", "a100", "h100", "t4", "rtx3090", "rtx4090"}
    for one in devices:
        assert 0.2 < one.sustained_flops_per_s / one.peak_flops_per_s < 0.6, one.name
        assert len(one.source) > 40


def test_a_device_is_found_whatever_its_capitals() -> None:
    assert shipped_devices().device("V100").sustained_flops_per_s == 39e12


def test_an_unknown_device_names_the_known() -> None:
    with pytest.raises(ConfigError, match=r"no published figures for 'a10' here \(did you mean 'a100'\?\)"):
        shipped_devices().device("a10")


def test_a_derived_profile_is_the_counted_one_with_a_speed_and_a_source() -> None:
    device = shipped_devices().device("h100")
    profile = derived_profile(MODEL, 2, device)
    assert profile.layers == gpt_profile(MODEL, 2).layers
    assert profile.reference_flops_per_s == device.sustained_flops_per_s
    assert profile.source.startswith("derived from published figures of h100 in bf16: ")


def test_a_table_without_a_source_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(
        '[[device]]\nname = "x"\ndtype = "fp16"\npeak = "1 TFLOP/s"\nsustained = "1 TFLOP/s"\nmemory = "1 GB"'
    )
    with pytest.raises(ConfigError, match="missing key"):
        DeviceTable.load(path)


def test_the_shape_of_gpt3_xl_has_its_parameters() -> None:
    model = ModelConfig.load(find_config("models", "gpt3_xl", ConfigError))
    tied = gpt_profile(model, 1).parameter_bytes / 4 - model.vocab_size * model.hidden
    assert tied == pytest.approx(1.3e9, rel=0.02)
