"""wantrain's Trainer inside Ray Train's TorchTrainer, on a cluster that the program itself starts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import small_plan
from wantrain.errors import PlanError
from wantrain.integrations.ray_train import assign
from wantrain.training.checkpoint import read_manifest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 600.0
CRASH = """
        if step == 6 and ray.train.get_checkpoint() is None and ray.train.get_context().get_world_rank() == 1:
            os._exit(1)"""


def run_program(folder: Path, crash: bool = False) -> tuple[float, Path]:
    """Run the program of docs/ray.md; return the loss it ends with and its checkpoint."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "ray.md").read_text(), re.DOTALL)
    if crash:
        at = block.index("        torch.manual_seed(step)")
        block = block[:at].rstrip() + CRASH + "\n" + block[at:]
    script = folder / "train.py"
    script.write_text(block)
    (folder / "configs").symlink_to(ROOT / "configs")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, check=False,
        timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"loss ([\d.]+), checkpoint in (\S+)", done.stdout)
    assert found is not None, done.stdout
    return float(found[1]), Path(found[2])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, Path]:
    """Run the program without a crash."""
    return run_program(tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
@pytest.mark.alone  # Ray gives up on a node that takes half a minute to start
def test_the_program_in_the_docs_runs_and_leaves_a_whole_checkpoint(whole: tuple[float, Path]) -> None:
    loss, checkpoint = whole
    assert loss < 5.6  # ln 256 = 5.55 says nothing; the first step's loss is above it
    manifest = read_manifest(checkpoint)
    assert manifest.step == 8
    assert sorted(manifest.files) == [f"layer-{index:04d}.safetensors" for index in range(manifest.num_layers)]
    assert all((checkpoint / name).exists() for name in manifest.files)
    assert json.loads((checkpoint / "manifest.json").read_text())["num_layers"] == 4


@pytest.mark.slow
@pytest.mark.alone
def test_after_a_crash_it_goes_on_from_the_checkpoint_with_the_same_numbers(
    whole: tuple[float, Path], tmp_path: Path
) -> None:
    loss, checkpoint = run_program(tmp_path, crash=True)
    assert loss == whole[0]
    assert read_manifest(checkpoint).step == 8


def test_processes_are_the_workers_after_whom_their_nodes_are_called() -> None:
    plan = small_plan(2, 2)
    assert plan.workers == ("w-0", "w-1", "w-2", "w-3")
    assert assign(plan, [["CPU", "w-2"], ["w-0", "node"], ["GPU", "w-3"], ["w-1"]]) == [2, 0, 3, 1]
    assert assign(plan, [["x"], ["y"], ["x"], ["y"]]) == [0, 1, 2, 3]


def test_processes_that_are_not_the_plans_workers_are_refused() -> None:
    plan = small_plan(2, 2)
    with pytest.raises(PlanError, match="set num_workers to that"):
        assign(plan, [["w-0"], ["w-1"]])
    with pytest.raises(PlanError, match=r"no process is on the node of worker w-2, w-3"):
        assign(plan, [["w-0"], ["w-1"], ["w-0"], ["w-1"]])
