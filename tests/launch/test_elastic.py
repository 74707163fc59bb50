"""torchrun's own restarts: a job goes on from its last checkpoint by itself."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.small_run import write_run
from wantrain.netem.sandbox import die_with_parent
from wantrain.run_directory import RunDirectory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]

STEPS = 100

SECTIONS = f"""
[training]
steps = {STEPS}
batch_size = 8
num_lanes = 4
validation_samples = 8
[parallel]
topology = "two_sites"
num_stages = 2
timeout_s = 300
[checkpoint]
every = 5
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def workers_of(agent: subprocess.Popen[bytes]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def test_a_killed_worker_is_started_again_and_the_job_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path / "run.toml", SECTIONS)
    run = RunDirectory(tmp_path / "run")
    argv = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2"]
    argv += ["--max-restarts", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    argv += ["-m", "wantrain", "train", str(tmp_path / "run.toml"), "--run-dir", str(run.path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with (tmp_path / "log").open("wb") as log:
        agent = subprocess.Popen(argv, env=environment, stdout=log, stderr=log, preexec_fn=die_with_parent)
    try:
        deadline = time.monotonic() + 500
        while len(run.read_steps(0)) < 12:
            assert agent.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.05)
        os.kill(workers_of(agent)[-1], signal.SIGKILL)
        assert agent.wait(500) == 0, (tmp_path / "log").read_text()
    finally:
        agent.kill()
        agent.wait()
    assert re.search(r"^resumed from step \d+$", run.notes.read_text(), re.MULTILINE)
    assert [record.step for record in run.read_steps(0)] == list(range(STEPS))
