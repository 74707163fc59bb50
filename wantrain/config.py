"""The run file: what is trained, on what, how, and what is kept of it.

    [model]       the GPT's shape (ModelConfig), or file = "configs/models/….toml"
    [data]        where the text comes from
    [training]    steps, batch, optimizer
    [parallel]    topology, stages × replicas, schedule, codecs
    [checkpoint]  how often, how many

Every field has a default but the ones that make the run what it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from wantrain.errors import ConfigError
from wantrain.fact import Fact, read_json, read_toml
from wantrain.model_config import ModelConfig
from wantrain.plan import DEFAULT_BUCKET_BYTES
from wantrain.schedule import ScheduleKind

MAX_TIMEOUT_S = 86400.0


class DataConfig(Fact):
    """The training text and how it becomes tokens."""

    source: str = "stdlib"
    """"stdlib" (the source text of the running Python's standard library), or the path of a file or folder."""
    tokenizer: str = "bytes"
    """"bytes", or the path of a `tokenizers` JSON file."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of the tokens, at the end, that is held out."""


class TrainingConfig(Fact):
    """Steps, batch and optimizer (AdamW, linear warm-up, cosine decay)."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    """Samples per step, over all replicas."""
    microbatch_size: int = Field(default=1, ge=1)
    num_lanes: int = Field(default=1, ge=1)
    """Fixed lanes that samples belong to; must divide batch_size and be dealt evenly to the replicas."""
    learning_rate: float = Field(default=1e-3, gt=0)
    final_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    warmup_steps: int = Field(default=0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Greatest norm of the whole model's gradient; null leaves it as it is."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; weights, gradients and optimizer state stay fp32."""
    seed: int = 0
    validate_every: int = Field(default=0, ge=0)
    """Steps between validations; 0 validates after the last step only."""
    validation_samples: int = Field(default=64, ge=1)
    record_every: int = Field(default=10, ge=1)
    """Steps between recorded timelines."""
    threads: int = Field(default=1, ge=1)
    """Threads per rank for computing on the CPU. Numbers are bit for bit repeatable for equal threads."""


class ParallelConfig(Fact):
    """Who does what, if no plan file says it."""

    topology: str = "lan"
    """A topology file, or the name of one that comes with wantrain."""
    num_stages: int = Field(default=1, ge=1)
    num_replicas: int = Field(default=1, ge=1)
    schedule: ScheduleKind = "1f1b"
    max_in_flight: tuple[int, ...] | None = None
    """Microbatches in flight by stage; null lets the plan choose by simulation, within memory."""
    forward_codec: str = "raw:fp32"
    backward_codec: str = "raw:fp32"
    gradient_codec: str = "raw:fp32"
    bucket_bytes: int = Field(default=DEFAULT_BUCKET_BYTES, ge=1)
    timeout_s: float = Field(default=120.0, gt=0, le=MAX_TIMEOUT_S)
    """Longest wait for a payload before the peer that should have sent it is named and the run ends."""


class CheckpointConfig(Fact):
    """How often a checkpoint is written, and how many are kept."""

    every: int = Field(default=100, ge=1)
    keep: int = Field(default=3, ge=1)


class RunConfig(Fact):
    """A whole run file."""

    name: str = "run"
    model: ModelConfig
    data: DataConfig = DataConfig()
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _lanes_fit(self) -> Self:
        training, replicas = self.training, self.parallel.num_replicas
        if training.batch_size % training.num_lanes:
            raise ValueError(
                f"batch_size must be a multiple of num_lanes (got {training.batch_size} and {training.num_lanes})"
            )
        if training.num_lanes < replicas:
            raise ValueError(
                f"{replicas} replicas need a lane each (got num_lanes = {training.num_lanes}); raise training.num_lanes"
            )
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a run file (TOML), or the config.json of a run directory."""
        read = read_json if str(path).endswith(".json") else read_toml
        data = read(path, ConfigError)
        return cls.parse(_with_model(data, Path(path)), ConfigError, str(path))


def _with_model(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Replace model.file, a path beside the run file, by the model file's keys; the run file's own keys win."""
    model = data.get("model")
    if not isinstance(model, dict) or "file" not in model:
        return data
    rest = {key: value for key, value in model.items() if key != "file"}
    return data | {"model": read_toml(path.parent / model["file"], ConfigError) | rest}
