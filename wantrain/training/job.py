"""From a run file to everything that a run needs: topology, plan, run directory."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from wantrain.config import RunConfig
from wantrain.data import Samples, TokenFile
from wantrain.errors import ConfigError, DataError, PlanError, TopologyError
from wantrain.fact import write_text
from wantrain.hf_profile import counted_profile
from wantrain.overrides import split_override
from wantrain.plan import Plan
from wantrain.profile import ModelProfile
from wantrain.resources import find_config
from wantrain.run_directory import RunDirectory
from wantrain.scheduler.cost_model import predict_and_play
from wantrain.scheduler.solve import make_plan
from wantrain.topology import Topology


class Job(NamedTuple):
    """A run file, resolved."""

    config: RunConfig
    topology: Topology
    plan: Plan


def load_config(
    given: str, data: str | None = None, topology: str | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """Read a run file (a path, or the name of a shipped one) with the command line's overrides.

    `data` and `topology` are short for data.source and parallel.topology; raises ConfigError where both are said.
    """
    short = {"data.source": ("--data", data), "parallel.topology": ("--topology", topology)}
    said = {".".join(split_override(one)[0]) for one in overrides}
    for key, (option, value) in short.items():
        if value is not None and key in said:
            raise ConfigError(f"{option} and --set {key} say the same thing; give one of them")
    more = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, (_, value) in short.items() if value is not None]
    return RunConfig.load(find_config("runs", given, ConfigError), [*overrides, *more])


def load_topology(given: str) -> Topology:
    """Read a topology by path, or by the name of a shipped one."""
    return Topology.load(find_config("topologies", given, TopologyError))


def profile_of(config: RunConfig) -> ModelProfile:
    """Return what the run file's model costs, as it was measured, or else counted; recomputing is part of it.

    Raises ConfigError where what was measured is another model, or other microbatches.
    """
    profile = _plain_profile(config)
    return profile.with_recomputing() if config.training.recompute else profile


def _plain_profile(config: RunConfig) -> ModelProfile:
    size, path = config.training.microbatch_size, config.parallel.profile
    if path is None:
        return counted_profile(config.model, size)
    profile = ModelProfile.load(path)
    profile.require(config.model)
    if profile.microbatch_size != size:
        raise ConfigError(
            f"{path} is of microbatches of {profile.microbatch_size} (the run file has {size});"
            f" measure with --microbatch-size {size}"
        )
    return profile


def plan_for(config: RunConfig, topology: Topology) -> Plan:
    """Make the plan that a run file asks for."""
    return make_plan(topology, profile_of(config), **plan_choices(config, topology))


def plan_choices(config: RunConfig, topology: Topology) -> dict[str, Any]:
    """Return what a run file asks of its plan, as make_plan has it."""
    training, parallel = config.training, config.parallel
    return {
        "model": config.name,
        "batch_size": training.batch_size,
        "num_lanes": training.num_lanes,
        "num_stages": parallel.num_stages,
        "num_replicas": parallel.num_replicas,
        "schedule": parallel.schedule,
        "max_in_flight": parallel.max_in_flight,
        "forward_codec": parallel.forward_codec,
        "backward_codec": parallel.backward_codec,
        "gradient_codec": parallel.gradient_codec,
        "bucket_bytes": parallel.bucket_bytes,
        "max_codec_error": parallel.max_codec_error,
        "buffer_bytes": _buffer_bytes(config, topology),
    }


def _buffer_bytes(config: RunConfig, topology: Topology) -> int:
    """Return what message buffers may take of the memory that the topology speaks of: the host's, or the devices'."""
    is_host = any(worker.device == "cpu" for worker in topology.workers)
    return config.buffers.ram_bytes if is_host else config.buffers.device_bytes


def check_plan(config: RunConfig, plan: Plan) -> None:
    """Raise PlanError where a plan was made for another model or batch than the run file's."""
    training = config.training
    for what, planned, asked in (
        ("layers", plan.num_layers, config.model.num_layers_total),
        ("samples a batch", plan.batch_size, training.batch_size),
        ("samples a microbatch", plan.microbatch_size, training.microbatch_size),
        ("lanes", plan.num_lanes, training.num_lanes),
    ):
        if planned != asked:
            raise PlanError(f"the plan is for {planned} {what} (the run file has {asked}); make the plan anew")


def cache_folder() -> Path:
    """Return where token files are kept: XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wantrain"


def open_data(config: RunConfig) -> tuple[TokenFile, Samples, Samples]:
    """Return the token file, the samples to train on and the held-out ones that are validated on."""
    tokens = TokenFile.open(config.data, cache_folder())
    held_out = tokens.validation(config.model).spread(config.training.validation_samples)
    return tokens, tokens.training(config.model), held_out


def judged(held_out: Samples, plan: Plan) -> Samples:
    """Return the held-out samples that a model is judged on: as many as the replicas' microbatches hold evenly."""
    size = plan.microbatch_size * len(plan.replicas)
    count = len(held_out) // size * size
    if not count:
        raise DataError(
            f"{len(held_out)} held-out samples are fewer than one microbatch for each replica ({size});"
            " raise validation_samples, or give more text"
        )
    return held_out.first(count)


def resolve(config: RunConfig, plan_path: str | None = None) -> Job:
    """Load the topology and load or make the plan."""
    topology = load_topology(config.parallel.topology)
    if plan_path is None:
        return Job(config, topology, plan_for(config, topology))
    plan = Plan.load(plan_path)
    check_plan(config, plan)
    for name in plan.workers:
        topology.worker(name)
    return Job(config, topology, plan)


def new_run_directory(config: RunConfig, path: str | None, resume: bool) -> RunDirectory:
    """Return the run directory that was asked for; raise ConfigError where it is taken, or has nothing to resume."""
    run = RunDirectory(path or f"runs/{config.name}-{datetime.now():%Y%m%d-%H%M%S}")
    if resume:
        if not run.config.exists():
            raise ConfigError(f"nothing to resume in {run.path}; give the run's directory with --run-dir")
    elif run.path.exists() and any(run.path.iterdir()):
        raise ConfigError(f"{run.path} is not empty; give another directory with --run-dir, or go on with --resume")
    return run


def write_run_directory(run: RunDirectory, job: Job) -> None:
    """Write what is known before the first step: run file, plan, topology, predicted timeline."""
    write_text(run.config, job.config.model_dump_json(indent=1) + "\n")
    job.plan.save(run.plan)
    write_text(run.topology, find_topology_text(job))
    _, played = predict_and_play(job.plan, job.topology, profile_of(job.config))
    played.timeline().save(run.predicted)


def find_topology_text(job: Job) -> str:
    """Return the topology file as it was written, comments and all."""
    return find_config("topologies", job.config.parallel.topology, TopologyError).read_text(encoding="utf-8")


def write_summary(run: RunDirectory, **figures: object) -> None:
    """Add figures to the run's summary."""
    known = json.loads(run.summary.read_text(encoding="utf-8")) if run.summary.exists() else {}
    write_text(run.summary, json.dumps(known | figures, indent=1) + "\n")
