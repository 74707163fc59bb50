"""Replicas that average their gradients: wantrain's and torch's, on one emulated network."""

import argparse

import pytest

from bench_data_parallel import PARTS, entries_of
from bench_planning import measure
from peers.ddp import HOOKS

SMALL = argparse.Namespace(model="gpt_tiny", uplink="100 Mbit/s", latency_ms=1.0, dilation=1.0, steps=3, samples=4)


@pytest.mark.parametrize("part", PARTS)
def test_every_system_has_a_job_of_the_same_work(part: str) -> None:
    stages, replicas, systems = PARTS[part][:3]
    entries = entries_of(part, SMALL)
    assert [entry.name for entry in entries] == list(systems)
    for entry in entries:
        assert (entry.job.plan.num_stages, len(entry.job.plan.replicas)) == (stages, replicas)
        assert (entry.job.peer is None) == (entry.name not in HOOKS)
        assert entry.job.plan.batch_size == 4 * replicas
        assert entry.job.plan.microbatch_size == 4


@pytest.mark.alone
@pytest.mark.slow
def test_torch_and_wantrain_train_replicas_and_fewer_bits_take_less() -> None:
    chosen = ["torch DDP", "torch DDP, fp16 hook", "torch DDP, PowerSGD hook", "torch DDP, wantrain hook"]
    chosen += ["wantrain gradients 4 bit"]
    entries = {entry.name: entry for entry in entries_of("replicas", SMALL) if entry.name in chosen}
    measure(list(entries.values()), 1)
    assert [len(entries[name].steps_s) for name in chosen] == [1] * len(chosen)
    assert entries["wantrain gradients 4 bit"].measured_s < entries["torch DDP"].measured_s
    assert entries["torch DDP, fp16 hook"].measured_s < entries["torch DDP"].measured_s
    assert entries["torch DDP, wantrain hook"].measured_s < 0.4 * entries["torch DDP"].measured_s
