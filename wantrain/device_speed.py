"""What common devices sustain, from published figures: for planning with machines that are not at hand.

The table is `configs/profiles/devices.toml`; every line of it names its source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field

from wantrain import units
from wantrain.errors import ConfigError, did_you_mean
from wantrain.fact import Fact, read_toml
from wantrain.hf_model import Model
from wantrain.hf_profile import counted_profile
from wantrain.profile import ModelProfile
from wantrain.resources import configs_folder

Speed = Annotated[float, BeforeValidator(units.parse_flops_per_s)]
Size = Annotated[int, BeforeValidator(units.parse_bytes)]


class DeviceSpeed(Fact):
    """A device's speed in training transformers."""

    name: str
    dtype: str
    peak_flops_per_s: Speed = Field(alias="peak")
    sustained_flops_per_s: Speed = Field(alias="sustained")
    memory_bytes: Size = Field(alias="memory")
    source: str


class DeviceTable(Fact):
    """All devices of a file."""

    devices: tuple[DeviceSpeed, ...] = Field(alias="device")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a table from a TOML file."""
        return cls.parse(read_toml(path, ConfigError), ConfigError, str(path))

    def device(self, name: str) -> DeviceSpeed:
        """Return a device by name, in capitals or not; raise ConfigError for one that is not in the table."""
        known = {one.name: one for one in self.devices}
        if name.lower() not in known:
            raise ConfigError(
                f"there are no published figures for '{name}' here{did_you_mean(name.lower(), known)};"
                f" expected one of {', '.join(known)}, or measure it with 'wantrain profile --model'"
            )
        return known[name.lower()]


def shipped_devices() -> DeviceTable:
    """Return the table that comes with wantrain."""
    return DeviceTable.load(configs_folder() / "profiles" / "devices.toml")


def derived_profile(config: Model, microbatch_size: int, device: DeviceSpeed) -> ModelProfile:
    """Return a model's counted profile with the speed of a device."""
    return counted_profile(config, microbatch_size).model_copy(
        update={
            "source": f"derived from published figures of {device.name} in {device.dtype}: {device.source}",
            "reference_flops_per_s": device.sustained_flops_per_s,
            "memory_bytes": device.memory_bytes,
        }
    )
