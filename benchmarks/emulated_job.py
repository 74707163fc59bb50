"""Run a plan for a few steps on its emulated WAN, a process for each worker; what the measuring benchmarks share.

Layers and optimizer either sleep for the seconds that the profile says (`EmulatedLayer`, so that eight workers fit on
two cores) or are a GPT's own (`model`). Pipeline, codecs, gradient reduction and network are the real ones in both.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import ProcessorTime, tied
from wantrain.errors import RunError
from wantrain.model_config import ModelConfig
from wantrain.netem.sandbox import run_in_sandbox_argv
from wantrain.plan import Plan
from wantrain.profile import ModelProfile
from wantrain.timeline import Timeline, merge
from wantrain.topology import Topology

if TYPE_CHECKING:
    from torch import nn

    from wantrain.models.emulated import EmulatedLayer, EmulatedUpdate
    from wantrain.training.trainer import Trainer

_MASTER_PORT = 29500

NUM_UNSETTLED = 2
"""Steps that don't count."""


@dataclass(frozen=True)
class EmulatedJob:
    """What to run. Seconds of layers follow from the profile's operations and the topology's speeds."""

    plan: Plan
    topology: Topology
    profile: ModelProfile
    sample_shape: tuple[int, ...]
    """Of the activation that one sample leaves behind a stage."""
    steps: int = 7
    dilation: float = 4.0
    model: ModelConfig | None = None
    """A GPT to train in earnest; None: layers sleep."""
    device: str = "cpu"
    """What all workers compute on."""
    dtype: str = "fp32"
    """Or bf16: autocast, as a run file's."""
    is_shaped: bool = True
    """False: no emulated network, but this machine's own loopback, where no sandbox can be made."""
    is_reference: bool = False
    """Whether codecs run on the reference kernels, as on a machine without the fast ones."""
    peer: str | None = None
    """Another's program that trains the plan's replicas instead, by its name in `peers/ddp.py`; one stage."""


@dataclass(frozen=True)
class Measured:
    """What a job gave: seconds of each of rank 0's steps, undilated, and the last step's events (a peer: none)."""

    steps_s: list[float]
    timeline: Timeline
    stolen: float
    """Share of the machine's processors that went to other machines meanwhile."""
    busy: float
    """Share of them in use during the settled steps (another's program: all); near 1, the machine held the job up."""

    @property
    def settled_s(self) -> list[float]:
        """The steps without the first two, in which samples may be seen for the first time."""
        return self.steps_s[NUM_UNSETTLED:]


def run(job: EmulatedJob) -> Measured:
    """Run a job to its end; raise RunError where a worker fails, which has said why on standard error."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job")
        file.write_bytes(pickle.dumps(job))
        argv = [sys.executable, str(Path(__file__).resolve()), "--inside", str(file)]
        before = ProcessorTime.now()
        done = subprocess.run(tied(run_in_sandbox_argv(argv) if job.is_shaped else argv), check=False)
        if done.returncode == signal.SIGKILL:
            raise RunError("a worker was killed, most likely for want of memory; take fewer, or fewer microbatches")
        if done.returncode:
            raise RunError(f"a worker ended with status {done.returncode}; its words stand above")
        stolen = ProcessorTime.now().stolen_since(before)
        said = [json.loads(_answer(file, rank).read_text()) for rank in range(job.plan.world_size)]
    if job.peer:
        return Measured(
            said[0]["steps_s"], merge("measured", job.plan.workers, job.steps - 1, []), stolen, said[0]["busy"]
        )
    first_s = min(one["began_at"] for one in said)
    events = [
        event._replace(
            start_s=event.start_s + (one["began_at"] - first_s) / job.dilation,
            end_s=event.end_s + (one["began_at"] - first_s) / job.dilation,
        )
        for one in said
        for event in Timeline.from_dict(one["timeline"], "a worker's answer").events
    ]
    timeline = merge("measured", job.plan.workers, job.steps - 1, events)
    return Measured(said[0]["steps_s"], timeline, stolen, said[0]["busy"])


def _job(file: str) -> EmulatedJob:
    job: EmulatedJob = pickle.loads(Path(file).read_bytes())
    return job


def _answer(file: str | Path, rank: int) -> Path:
    return Path(file).with_name(f"rank-{rank}.json")


def _inside(file: str) -> int:
    """Build the network, inside the sandbox, and start a process for each worker of the plan."""
    from wantrain.netem.emulate import EmulatedNetwork
    from wantrain.netem.program import worker_environment

    job = _job(file)
    plan = job.plan
    argv = [sys.executable, str(Path(__file__).resolve()), "--work", file]
    with EmulatedNetwork(job.topology, job.dilation) if job.is_shaped else nullcontext() as network:
        processes = []
        for rank, name in enumerate(plan.workers):
            place = {"RANK": rank, "WORLD_SIZE": plan.world_size, "MASTER_PORT": _MASTER_PORT, "OMP_NUM_THREADS": 1}
            env = {key: str(value) for key, value in place.items()}
            if network is None:
                env = {**os.environ, "WANTRAIN_WORKER": name, "MASTER_ADDR": "127.0.0.1"} | env
                processes.append(subprocess.Popen(tied(argv), env=env))
            else:
                env = {**worker_environment(network, name), "MASTER_ADDR": network.address(plan.workers[0])} | env
                processes.append(network.popen(name, argv, env=env))
        return max(abs(process.wait()) for process in processes)  # a signal's is negative


def _work(file: str) -> None:
    """Be one worker: train, then write the steps and the last one's events beside the job."""
    from wantrain.training.loop import set_up_process

    set_up_process(1)
    job, worker = _job(file), os.environ["WANTRAIN_WORKER"]
    if job.is_reference:
        use_reference_kernels()
    answer = _answer(file, job.plan.rank_of(worker))
    answer.write_text(json.dumps(_peer_steps(job, worker) if job.peer else _own_steps(job, worker)))
    if job.peer:
        os._exit(0)  # with torch's PowerSGD hook every second program aborts as it ends


def _own_steps(job: EmulatedJob, worker: str) -> dict[str, Any]:
    trainer = _trainer(job, worker)
    plan = job.plan
    per_lane = plan.batch_size // plan.num_lanes
    own = [lane * per_lane + i for lane in plan.replicas[trainer.replica].lanes for i in range(per_lane)]
    batch = _batch(job, own)
    steps_s, before = [], ProcessorTime.now()
    for step in range(job.steps):
        if step == NUM_UNSETTLED:
            before = ProcessorTime.now()
        trainer.step(batch, own)
        steps_s.append(trainer.step_s)
    busy = ProcessorTime.now().busy_since(before)
    timeline = merge("measured", plan.workers, job.steps - 1, trainer.recorder.events())
    began_at = trainer.recorder.wall_clock_s
    trainer.close()
    return {"steps_s": steps_s, "busy": busy, "began_at": began_at, "timeline": timeline.to_dict()}


def _peer_steps(job: EmulatedJob, worker: str) -> dict[str, Any]:
    import torch

    from peers import ddp

    assert job.peer is not None
    layers = _asleep(job, worker, 0, len(job.profile.layers))
    optimizer = _update_asleep(job, worker, [layer.weight for layer in layers])
    batch = torch.zeros(job.plan.batch_size // len(job.plan.replicas), 1, dtype=torch.int64)
    before = ProcessorTime.now()
    steps_s = ddp.train(job.peer, layers, optimizer, batch, job.plan.microbatch_size, job.steps)
    busy = ProcessorTime.now().busy_since(before)
    return {"steps_s": [seconds / job.dilation for seconds in steps_s], "busy": busy}


def _asleep(job: EmulatedJob, worker: str, first: int, end: int) -> list[EmulatedLayer]:
    from wantrain.models.emulated import EmulatedLayer

    each_s = job.dilation / job.topology.worker(worker).flops_per_s
    each_s *= job.plan.microbatch_size / job.profile.microbatch_size
    return [
        EmulatedLayer(
            job.sample_shape,
            layer.forward_flops * each_s,
            layer.backward_flops * each_s,
            layer.parameter_bytes // 4,
            layer.weight_flops * each_s,
        )
        for layer in job.profile.layers[first:end]
    ]


def _update_asleep(job: EmulatedJob, worker: str, parameters: Iterable[nn.Parameter]) -> EmulatedUpdate:
    from wantrain.models.emulated import EmulatedUpdate
    from wantrain.scheduler.cost_model import optimizer_flops

    own = list(parameters)
    flops = sum(parameter.numel() for parameter in own) * optimizer_flops(job.profile)
    return EmulatedUpdate(own, job.dilation * flops / job.topology.worker(worker).flops_per_s)


def use_reference_kernels() -> None:
    """Let codecs in this process find no other backend than the reference."""
    from wantrain_kernels import backends

    backends.is_available = lambda name: name == "reference"  # type: ignore[assignment]


def _trainer(job: EmulatedJob, worker: str) -> Trainer:
    import torch

    from wantrain.models import gpt
    from wantrain.models.emulated import emulated_loss
    from wantrain.pipeline.boundary_codecs import CodecSettings
    from wantrain.training.trainer import Trainer

    def real(first: int, end: int) -> Sequence[nn.Module]:
        assert job.model is not None
        return gpt.build_layers(job.model, first, end, 0)

    is_asleep = job.model is None
    return Trainer(
        partial(_asleep, job, worker) if is_asleep else real,
        job.plan,
        device=job.device,
        autocast=partial(torch.autocast, job.device, torch.bfloat16) if job.dtype == "bf16" else nullcontext,
        loss=emulated_loss if is_asleep else gpt.loss,
        optimizer=partial(_update_asleep, job, worker) if is_asleep else partial(torch.optim.AdamW, fused=True),
        tied=(lambda _: ()) if is_asleep else gpt.tied_parameters,
        worker=worker,
        dilation=job.dilation,
        layers_are_dilated=is_asleep,
        timeout_s=300.0,
        codec_settings=CodecSettings(sample_shape=job.sample_shape),
    )


def _batch(job: EmulatedJob, samples: Sequence[int]) -> Any:
    """Return the samples' tokens: any, for layers that sleep; else random ones, the same in every step."""
    import torch

    from wantrain.training.trainer import Batch

    if job.model is None:
        nothing = torch.zeros(len(samples), 1, dtype=torch.int64)
        return Batch(list(samples), nothing, nothing)
    generator = torch.Generator().manual_seed(0)
    shape = (job.plan.batch_size, job.model.seq_len + 1)
    tokens = torch.randint(job.model.vocab_size, shape, generator=generator)[list(samples)]
    return Batch(list(samples), tokens[:, :-1], tokens[:, 1:])


if __name__ == "__main__":
    import emulated_job  # what a job was pickled as, not this script

    what, path = sys.argv[1:]
    if what == "--inside":
        sys.exit(emulated_job._inside(path))
    emulated_job._work(path)
