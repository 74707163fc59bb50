"""The run file: what is trained, on what, how, and what is kept of it.

    [model]       the GPT's shape (ModelConfig), or file = "configs/models/….toml", or hf = a Hugging Face model
    [data]        where the text comes from
    [training]    steps, batch, optimizer
    [parallel]    topology, stages × replicas, schedule, codecs
    [checkpoint]  how often, how many
    [buffers]     what message buffers may take
    [watch]       who else is told how it goes

Every field has a default but the ones that make the run what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from wantrain.errors import ConfigError
from wantrain.fact import Fact, class_tag, read_json, read_toml
from wantrain.hf_model import HuggingFaceModel, find_file, resolve_source
from wantrain.model_config import ModelConfig
from wantrain.overrides import split_override, with_nulls, with_overrides
from wantrain.plan import DEFAULT_BUCKET_BYTES, BackwardCodec, ForwardCodec, GradientCodec
from wantrain.resources import find_config
from wantrain.schedule import ScheduleKind
from wantrain.units import parse_bytes

MAX_TIMEOUT_S = 86400.0


class DataConfig(Fact):
    """The training text and how it becomes tokens."""

    source: str = "stdlib"
    """"stdlib" (the source text of the running Python's standard library), or the path of a file or folder."""
    tokenizer: str = "bytes"
    """"bytes", or the path of a `tokenizers` JSON file; of a Hugging Face model, if nothing is said, its own."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of the tokens, at the end, that is held out."""


class TrainingConfig(Fact):
    """Steps, batch and optimizer (linear warm-up, cosine decay)."""

    steps: int = Field(ge=1)
    """Updates of the weights, in all."""
    batch_size: int = Field(ge=1)
    """Samples per step, over all replicas."""
    microbatch_size: int = Field(default=1, ge=1)
    """Samples that go through the pipeline together; must divide what a replica draws."""
    num_lanes: int = Field(default=1, ge=1)
    """Fixed lanes that samples belong to; must divide batch_size and be dealt evenly to the replicas."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Greatest rate, reached at the end of the warm-up."""
    final_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """Rate of the last step, as a share of the greatest."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the rate rises from nothing."""
    optimizer: Literal["adamw", "quantized_adam"] = "adamw"
    """quantized_adam: after a while √v stays as it is and momenta are averaged instead of gradients, so that
    gradient_codec may be narrower. Before that gradients are averaged in full precision."""
    fix_variance_after: int | None = Field(default=None, ge=1)
    """Steps for which quantized_adam learns v, at least warmup_steps; null: a fifth of all, or twice warmup_steps."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of Adam: how much of the last momentum and of the last variance stays."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Of AdamW, times the rate."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Greatest norm of the whole model's gradient; null leaves it as it is."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; weights, gradients and optimizer state stay fp32."""
    recompute: bool = False
    """Activation checkpointing: a layer keeps its input alone, and its backward runs its forward once more. The numbers
    stay the same; plans count the memory saved and the time it takes."""
    seed: int = 0
    """Keys everything random: weights, draws of samples, dropout, stochastic rounding."""
    validate_every: int = Field(default=0, ge=0)
    """Steps between validations; 0 validates after the last step only."""
    validation_samples: int = Field(default=64, ge=1)
    """Held-out samples that the model is judged on."""
    record_every: int = Field(default=10, ge=1)
    """Steps between recorded timelines."""
    threads: int = Field(default=1, ge=1)
    """Threads per rank for computing on the CPU. Numbers are bit for bit repeatable for equal threads."""

    @property
    def variance_steps(self) -> int:
        """Return for how many steps quantized_adam learns v."""
        return self.fix_variance_after or max(1, self.steps // 5, 2 * self.warmup_steps)

    @model_validator(mode="after")
    def _optimizer_fits(self) -> Self:
        if self.fix_variance_after is not None and self.optimizer != "quantized_adam":
            raise ValueError('fix_variance_after is for optimizer = "quantized_adam"; leave it out')
        if self.fix_variance_after is not None and self.fix_variance_after < self.warmup_steps:
            raise ValueError(
                f"v can't be fixed before the rate is warm (got fix_variance_after = {self.fix_variance_after},"
                f" expected at least warmup_steps = {self.warmup_steps}); raise it"
            )
        return self


class ParallelConfig(Fact):
    """Who does what, if no plan file says it."""

    topology: str = "lan"
    """A topology file, or the name of one that comes with wantrain."""
    profile: str | None = None
    """A file beside the run file, by `wantrain profile`: what the layers cost; null counts their operations."""
    num_stages: int = Field(default=1, ge=1)
    """Consecutive parts that the layers are cut into, a worker each."""
    num_replicas: int = Field(default=1, ge=1)
    """Copies of the pipeline, over other samples."""
    schedule: ScheduleKind = "1f1b"
    """In which order a stage works: "1f1b", "gpipe", or "zero_bubble", which leaves gradients of weights for later."""
    max_in_flight: tuple[int, ...] | None = None
    """Microbatches in flight by stage; null lets the plan choose by simulation, within memory."""
    forward_codec: ForwardCodec = "raw:fp32"
    """How activations travel: "raw:bf16", "quantized:4", "hadamard:4", "aqsgd:4", with keys behind a comma."""
    backward_codec: BackwardCodec = "raw:fp32"
    """How gradients of activations travel: raw, quantized or hadamard."""
    gradient_codec: GradientCodec = "raw:fp32"
    """How weight gradients travel between replicas: also cocktail, and "error_feedback:quantized:4"."""
    max_codec_error: float | None = Field(default=None, gt=0)
    """Relative error of a boundary's payloads above which its codecs get more bits; null leaves them as they are."""
    bucket_bytes: int = Field(default=DEFAULT_BUCKET_BYTES, ge=1)
    """Weight gradients that are summed together, in bytes."""
    timeout_s: float = Field(default=120.0, gt=0, le=MAX_TIMEOUT_S)
    """Longest wait for a payload before the peer that should have sent it is named and the run ends."""


class CheckpointConfig(Fact):
    """How often a checkpoint is written, and how many are kept."""

    every: int = Field(default=100, ge=1)
    """Steps from one checkpoint to the next."""
    keep: int = Field(default=3, ge=1)
    """How many checkpoints stay, the newest ones."""


class BufferConfig(Fact):
    """What a worker's message buffers may take, all of them together (codec aqsgd). Sizes are text: "16 GiB"."""

    ram: str = "1 GiB"
    """Host memory; holds at least the samples of two steps."""
    file: str = "0 B"
    """A file in the run directory. With checkpoints, what changes between two of them takes room twice. What has no
    room in memory or file is sent in full at its next visit."""
    device: str = "0 B"
    """A GPU's memory, for copies of entries that stay between their uses; with 0 each is copied there for its use."""
    on_checkpoint: Literal["keep", "drop"] = "keep"
    """keep: a resumed run goes on with the very numbers. Entries in the file cost only what has changed since the last
    checkpoint; entries that are in memory alone are all written at every one. drop: a resumed run sends all anew."""

    @field_validator("ram", "file", "device")
    @classmethod
    def _is_size(cls, text: str) -> str:
        parse_bytes(text)
        return text

    @property
    def ram_bytes(self) -> int:
        return parse_bytes(self.ram)

    @property
    def file_bytes(self) -> int:
        return parse_bytes(self.file)

    @property
    def device_bytes(self) -> int:
        return parse_bytes(self.device)


class TensorBoardConfig(Fact):
    """Event files for TensorBoard, one folder for each worker."""

    folder: str | None = None
    """Where; null is `tensorboard` in the run directory."""


class WandbConfig(Fact):
    """A run at Weights & Biases, or in a folder that `wandb sync` sends there later."""

    project: str = "wantrain"
    """Where W&B lists the run."""
    entity: str | None = None
    """The account or team; null is W&B's own default."""
    mode: Literal["online", "offline"] = "online"
    """offline: nothing is sent; `wandb sync` does so later."""
    all_ranks: bool = False
    """A run for every worker, in one group; else rank 0's alone, which has the job's loss and its own links."""


class PrometheusConfig(Fact):
    """An endpoint on every worker for Prometheus to scrape."""

    port: int = Field(default=9464, ge=0, le=65535)
    """Rank r listens on port + r; 0 takes whichever is free."""
    address: str = "127.0.0.1"
    """Whom it listens to: "0.0.0.0" for a Prometheus on another machine."""


class WatchConfig(Fact):
    """Who is told how the run goes, beside the run directory. A table, even an empty one, turns it on."""

    tensorboard: TensorBoardConfig | None = None
    """Event files for TensorBoard; a table [watch.tensorboard] turns it on."""
    wandb: WandbConfig | None = None
    """A run at Weights & Biases; a table [watch.wandb] turns it on."""
    prometheus: PrometheusConfig | None = None
    """An endpoint on every worker; a table [watch.prometheus] turns it on."""


_GPT, _HUGGING_FACE = class_tag(ModelConfig), class_tag(HuggingFaceModel)


def _which_model(value: Any) -> str:
    is_hf = isinstance(value, HuggingFaceModel) or (isinstance(value, dict) and "hf" in value)
    return _HUGGING_FACE if is_hf else _GPT


class RunConfig(Fact):
    """A whole run file."""

    name: str = "run"
    """What the run is called, in its directory's name and its report."""
    model: Annotated[
        Annotated[ModelConfig, Tag(_GPT)] | Annotated[HuggingFaceModel, Tag(_HUGGING_FACE)],
        Discriminator(_which_model),
    ]
    data: DataConfig = DataConfig()
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    buffers: BufferConfig = BufferConfig()
    watch: WatchConfig = WatchConfig()

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
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a run file (TOML), or the config.json of a run directory; `overrides` are texts like "a.b=c"."""
        read = read_json if str(path).endswith(".json") else read_toml
        data = with_nulls(cls, read(path, ConfigError))
        data = _overridden(cls, _with_profile(_with_model(data, Path(path)), Path(path)), overrides)
        data = _with_hugging_face(data, Path(path))
        return cls.parse(data, ConfigError, " ".join([str(path), *(f"--set {one}" for one in overrides)]))


def _overridden(cls: type[Fact], data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply overrides in their order. Paths among them are beside the caller; `model.file` replaces the whole model."""
    for override in overrides:
        key, value = split_override(override)
        if key == ("model", "file"):
            data = data | {"model": read_toml(find_config("models", value, ConfigError), ConfigError)}
        else:
            data = with_overrides(cls, data, [override])
    return _with_profile(data, Path("here").resolve())


def _with_profile(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Replace parallel.profile, a path beside the run file, by one that holds from anywhere."""
    parallel = data.get("parallel")
    if not isinstance(parallel, dict) or not isinstance(parallel.get("profile"), str):
        return data
    return data | {"parallel": parallel | {"profile": str((path.parent / parallel["profile"]).resolve())}}


def _with_hugging_face(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Read what a Hugging Face model's folder says: its shape, and its tokenizer where the run file names none."""
    model, text = data.get("model"), data.get("data", {})
    if not isinstance(model, dict) or "hf" not in model:
        return data
    model = resolve_source(model, path.parent)
    if isinstance(text, dict) and "tokenizer" not in text:
        own = find_file(model["hf"], "tokenizer.json")
        if own is None:
            raise ConfigError(f"{path}: model '{model['hf']}' has no tokenizer.json; name one as data.tokenizer")
        text = text | {"tokenizer": str(own)}
    return data | {"model": model, "data": text}


def _with_model(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Replace model.file, a path beside the run file, by the model file's keys; the run file's own keys win."""
    model = data.get("model")
    if not isinstance(model, dict) or "file" not in model:
        return data
    rest = {key: value for key, value in model.items() if key != "file"}
    return data | {"model": read_toml(path.parent / model["file"], ConfigError) | rest}
