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
    assert Plan.model_validate(json.loads(as_json.stdout)["plan"]) == plan
    shown = wantrain("plan", "demo", cwd=tmp_path)
    assert all(name in shown.stdout for name in plan.workers)


def test_planning_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from wantrain.cli import main; status = main(['plan', 'demo', '--json']);"
        "sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


SEARCHED = ("plan", "--topology", "regions_us", "--model", "gpt_tiny", "--batch-size", "16")


def test_a_plan_without_a_run_file_is_searched_and_explained(tmp_path: Path) -> None:
    shown = wantrain(*SEARCHED, "--explain", "--tokens", "1e9", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    for word in ("busiest links", "workers", "would help: ", "naive", "1,000,000,000 tokens: ", " days, "):
        assert word in shown.stdout
    assert "currency" not in shown.stdout  # the topology has no prices


def test_two_plans_are_set_beside_each_other(tmp_path: Path) -> None:
    options = ("--stages", "2", "--replicas", "2", "--microbatch-size", "2")
    wantrain(*SEARCHED, *options, "--out", "two.json", cwd=tmp_path)
    done = wantrain(*SEARCHED, "--compare", "two.json", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    other, best = Plan.model_validate(found["compared"]["two.json"]), Plan.model_validate(found["plan"])
    assert (other.num_stages, len(other.replicas), other.microbatch_size) == (2, 2, 2)
    assert best.prediction is not None
    assert other.prediction is not None
    assert best.prediction.step_s <= other.prediction.step_s


def test_auto_gives_codecs_that_the_data_bears(tmp_path: Path) -> None:
    slow = (tmp_path / "slow.toml").write_text(
        '[[worker]]\nname = "w"\ncount = 4\nsite = "s"\n[[link]]\nwithin = "s"\nbandwidth = "5 Mbit/s"\n'
    )
    assert slow
    options = (
        "--topology",
        "slow.toml",
        "--model",
        "gpt_tiny",
        "--batch-size",
        "16",
        "--stages",
        "2",
        "--codec",
        "auto",
    )
    for seen, kind in (("once", "hadamard"), ("again", "aqsgd")):
        done = wantrain("plan", *options, "--data-seen", seen, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["plan"]["boundaries"][0]["forward_codec"].startswith(kind)


def test_pinned_and_excluded_workers_are_heeded(tmp_path: Path) -> None:
    options = ("--stages", "2", "--pin", "ohio-0=1", "--exclude", "oregon-0", "--exclude", "oregon-1", "--json")
    done = wantrain(*SEARCHED, *options, cwd=tmp_path)
    plan = Plan.model_validate(json.loads(done.stdout)["plan"])
    assert plan.stage_of(plan.rank_of("ohio-0")) == 1
    assert not any(name.startswith("oregon") for name in plan.workers)


def test_a_replan_says_what_moves(tmp_path: Path) -> None:
    wantrain(*SEARCHED, "--out", "old.json", cwd=tmp_path)
    done = wantrain(*SEARCHED, "--replan", "old.json", cwd=tmp_path)
    assert "the old plan takes" in done.stdout
    assert "moves 0 B" in done.stdout


def test_the_objective_cost_weighs_prices(tmp_path: Path) -> None:
    workers = "".join(
        f'[[worker]]\nname = "{name}"\ncount = 2\nsite = "s"\nflops = "{speed} GFLOP/s"\nprice_per_hour = {price}\n'
        for name, speed, price in (("dear", 20, 100.0), ("cheap", 10, 0.1))
    )
    (tmp_path / "t.toml").write_text(f'{workers}[[link]]\nwithin = "s"\nbandwidth = "1 Gbit/s"\n')
    options = ("plan", "--topology", "t.toml", "--model", "gpt_tiny", "--batch-size", "16", "--json")
    fast, thrifty = (
        json.loads(wantrain(*options, "--objective", objective, cwd=tmp_path).stdout)
        for objective in ("throughput", "cost")
    )
    assert any("dear" in name for replica in fast["plan"]["replicas"] for name in replica["workers"])
    assert all("cheap" in name for replica in thrifty["plan"]["replicas"] for name in replica["workers"])
    assert thrifty["price_per_step"] < fast["price_per_step"]


def test_what_can_not_be_planned_is_one_line_and_status_2(tmp_path: Path) -> None:
    for argv, said in (
        (["plan"], "nothing to plan"),
        (["plan", "demo", "--model", "gpt2"], "--model is for planning without a run file"),
        ([*SEARCHED, "--objective", "cost"], "names no prices"),
        (["plan", "demo", "--time-limit", "1"], "--time-limit is for planning without a run file"),
        (["plan", "demo", "--seed", "0"], "--seed is for planning without a run file"),
        ([*SEARCHED, "--data-seen", "once"], "--data-seen says what --codec auto may choose"),
        ([*SEARCHED, "--replan", "p.json", "--codec", "auto"], "can't be had with --codec auto"),
        ([*SEARCHED, "--replan", "p.json", "--objective", "cost"], "can't be had with --objective cost"),
        ([*SEARCHED, "--commands"], "--commands needs a run file"),
        ([*SEARCHED, "--pin", "nobody=0"], "pinned worker 'nobody' is not in topology"),
        ([*SEARCHED, "--pin", "nobody"], "expected WORKER=STAGE"),
        ([*SEARCHED, "--codec", "quantised:4"], "unknown codec"),
        ([*SEARCHED, "--compare", "none.json"], "none.json"),
        ([*SEARCHED, "--break-even"], "how fast worker"),
    ):
        done = wantrain(*argv, cwd=tmp_path)
        assert done.returncode == 2, argv
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
