"""wantrain's own pipeline on emulated stages, as `bench_network.py` lets it take turns with others."""

from __future__ import annotations

import torch

from network_setting import Setting, System
from wantrain.codecs.codec import prepare_codecs
from wantrain.comm.groups import join
from wantrain.pipeline.boundary_codecs import CodecSettings
from wantrain.pipeline.connect import Connections
from wantrain.pipeline.executor import Executor, Microbatch
from wantrain.pipeline.recorder import Recorder
from wantrain.pipeline.stage import EmulatedStage
from wantrain.timeline import COMPUTE_KINDS

_PATIENCE_S = 600.0


class WantrainPipeline:
    """One rank of wantrain's pipeline with a system's codecs; it meets its peers at MASTER_ADDR and MASTER_PORT."""

    def __init__(self, system: System, setting: Setting, rank: int) -> None:
        plan = setting.plan(system)
        prepare_codecs(plan.codecs)  # as a Trainer does: else a step that counts would wait for kernels to be compiled
        self._membership = join(plan.world_size, rank, _PATIENCE_S)
        self._dilation = setting.dilation
        self._recorder = Recorder(rank, setting.dilation)
        self._connections = Connections.open(
            plan, self._membership, self._recorder, _PATIENCE_S, settings=CodecSettings(sample_shape=setting.shape[1:])
        )
        stage = EmulatedStage(
            setting.forward_s * setting.dilation,
            setting.backward_s * setting.dilation,
            setting.shape,
            setting.shape if rank > 0 else (),
            setting.weights_s * setting.dilation if system.is_split else 0.0,
        )
        self._executor = Executor(
            plan.actions(0)[rank],
            stage,
            self._recorder,
            upstream=self._connections.upstream,
            downstream=self._connections.downstream,
        )
        nothing = torch.zeros(1, 1, dtype=torch.int64)
        is_first, is_last = rank == 0, rank == setting.stages - 1
        self._batch = [
            Microbatch([m], nothing if is_first else None, nothing if is_last else None)
            for m in range(setting.microbatches)
        ]

    def step(self) -> None:
        """Play one step; the next one holds the same samples."""
        self._recorder.begin_step()
        self._executor.play(self._batch, upcoming=list(range(len(self._batch))))

    @property
    def coding_s(self) -> float:
        """Seconds of the last step's encoding and decoding on this rank, as they passed."""
        coded_s: float = self._recorder.seconds("encode", "decode") * self._dilation
        return coded_s

    def worked(self, begin_s: float) -> list[tuple[str, float, float]]:
        """Return when it computed in the last step, undilated, from the step's begin."""
        return [(e.kind, e.start_s, e.end_s) for e in self._recorder.events() if e.kind in COMPUTE_KINDS]

    def close(self) -> None:
        """Part from the peers, once they are done too."""
        self._connections.close(_PATIENCE_S)
        self._membership.leave(_PATIENCE_S)
