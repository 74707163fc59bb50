import json
import subprocess
import sys
from pathlib import Path

from wantrain.plan import Plan


def wantrain(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "wantrain", *argv], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_plan_prints_writes_and_names_the_command_of_each_host(tmp_path: Path) -> None:
    done = wantrain("plan", "demo", "--out", "plan.json", "--commands", cwd=tmp_path)
    plan = Plan.load(tmp_path / "plan.json")
    assert done.returncode == 0
    for rank, name in enumerate(plan.workers):
        assert f"--node-rank {rank}" in done.stdout
        assert f"--worker {name}" in done.stdout
    as_json = wantrain("plan", "demo", "--json", cwd=tmp_path)
    assert Plan.model_validate(json.loads(as_json.stdout)) == plan
    shown = wantrain("plan", "demo", cwd=tmp_path)
    assert all(name in shown.stdout for name in plan.workers)


def test_planning_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from wantrain.cli import main; status = main(['plan', 'demo', '--json']);"
        "sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
