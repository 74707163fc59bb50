"""`wantrain simulate`, its handler called as the command line calls it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wantrain.errors import TopologyError, UserError
from wantrain.model_config import ModelConfig
from wantrain.plan import Plan
from wantrain.profile import gpt_profile
from wantrain.resources import find_config
from wantrain.scheduler.disturbance import StandstillError
from wantrain.scheduler.solve import make_plan
from wantrain.simulating import run
from wantrain.topology import Topology

PROFILE = gpt_profile(ModelConfig(num_layers=4, hidden=64, num_heads=4, seq_len=64), 2)


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    topology = Topology.load(find_config("topologies", "two_sites", TopologyError))
    plan = make_plan(topology, PROFILE, batch_size=16, model="tiny", num_stages=2, num_replicas=2)
    plan.save(folder / "plan.json")
    PROFILE.save(folder / "profile.json")
    return folder / "plan.json"


def asked(plan_file: Path, **options: Any) -> argparse.Namespace:
    given: dict[str, Any] = {
        "plan": str(plan_file),
        "profile": str(plan_file.with_name("profile.json")),
        **dict.fromkeys(("topology", "model", "jitter", "picture", "trace")),
        "set": [],
        "slow": [],
        "gone": [],
        "blocking": False,
        "json": True,
    }
    return argparse.Namespace(**given | options)


def figures(capsys: pytest.CaptureFixture[str], plan_file: Path, **options: Any) -> dict[str, Any]:
    assert run(asked(plan_file, **options)) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_as_it_stands_it_is_the_plans_own_prediction(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, plan_file)
    prediction = Plan.load(plan_file).prediction
    assert prediction is not None
    assert found["step_s"] == pytest.approx(prediction.step_s)
    assert found["planned_step_s"] == prediction.step_s
    assert sum(found["parts_s"].values()) == pytest.approx(found["step_s"])


def test_a_slower_link_or_worker_slows_the_step(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_is = figures(capsys, plan_file)["step_s"]
    assert figures(capsys, plan_file, set=["east->west=1 Mbit/s", "west->east=1 Mbit/s"])["step_s"] > 2 * as_is
    assert figures(capsys, plan_file, set=["a-0->b-0=3 s", "west->east=3 s", "east->west=3 s"])["step_s"] > 6
    assert figures(capsys, plan_file, slow=["a-0=50"])["step_s"] > as_is
    assert figures(capsys, plan_file, blocking=True)["step_s"] >= as_is


def test_setting_a_site_also_sets_what_is_said_of_its_workers(plan_file: Path, tmp_path: Path, capsys: Any) -> None:
    text = find_config("topologies", "two_sites", TopologyError).read_text(encoding="utf-8")
    network = tmp_path / "own.toml"
    network.write_text(text + '\n[[link]]\nbetween = ["a-0", "b-0"]\nbandwidth = "1 Gbit/s"\nlatency = "0 ms"\n')
    slow = ["east->west=2 s", "west->east=2 s"]
    own = figures(capsys, plan_file, topology=str(network), set=slow)
    assert own["step_s"] == pytest.approx(figures(capsys, plan_file, set=slow)["step_s"], rel=0.05)


def test_it_is_told_in_lines_and_drawn_and_traced(plan_file: Path, tmp_path: Path, capsys: Any) -> None:
    files = {"picture": str(tmp_path / "step.svg"), "trace": str(tmp_path / "step.json")}
    assert run(asked(plan_file, json=False, set=["east->west=10 Mbit/s"], **files)) == 0
    told = capsys.readouterr().out
    assert "the plan's own prediction" in told
    assert "computes longest: computing" in told
    assert "busiest link    a-" in told
    assert "<svg" in Path(files["picture"]).read_text(encoding="utf-8")
    assert json.loads(Path(files["trace"]).read_text(encoding="utf-8"))["traceEvents"]


def test_a_worker_that_is_gone_is_the_answer(plan_file: Path) -> None:
    with pytest.raises(StandstillError, match="the step never ends: 'b-0' is gone at 0 s"):
        run(asked(plan_file, gone=["b-0=0"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"set": ["east->west"]}, "can't set 'east->west' (expected text like"),
        ({"set": ["a=b=1 s"]}, "can't set 'a=b=1 s' (expected text like"),
        ({"set": ["east->c=1 Mbit/s"]}, "can't set 'east->c=1 Mbit/s': no worker or site is called 'c'"),
        ({"set": ["east->west=12"]}, "can't set 'east->west=12': a link's rate or latency has no unit"),
        ({"set": ["east->west=0 Mbit/s"]}, "can't set 'east->west=0 Mbit/s': rate must be above zero"),
        ({"set": ["a-0->a-0=1 Mbit/s"]}, "has no link from 'a-0' to 'a-0'"),
        ({"slow": ["a-0"]}, "--slow takes a worker and a number (got 'a-0', expected text like 'worker=2')"),
        ({"slow": ["x=2"]}, "the plan has no worker 'x'"),
        ({"gone": ["a-0=nan"]}, "--gone takes a worker and a number"),
        ({"jitter": 3}, "has jitter"),
        ({"picture": "step.gif"}, "a picture is a file that ends in .svg or .png (got 'step.gif')"),
        ({"picture": "/nowhere/step.svg"}, "can't write /nowhere/step.svg"),
        ({"topology": "two_sits"}, "did you mean 'two_sites'?"),
        ({"topology": "lan"}, "has no worker"),
        ({"profile": None}, "what the layers of 'tiny' cost is not known; give --model or --profile"),
        ({"profile": None, "model": "gpt2"}, "the plan is for 6 layers (the profile has 14)"),
        ({"plan": "none.json"}, "can't read none.json"),
    ],
)
def test_wrong_input_gets_one_line(plan_file: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        run(asked(plan_file, **options))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_simulating_needs_neither_torch_nor_matplotlib_nor_numba(plan_file: Path) -> None:
    code = (
        "import sys; from tests.test_simulating import asked; from pathlib import Path;"
        f"from wantrain.simulating import run; run(asked(Path({str(plan_file)!r})));"
        "sys.exit(bool({'torch', 'matplotlib', 'numba'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
