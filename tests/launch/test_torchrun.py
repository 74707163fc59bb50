import sys

from tests.jobs import small_plan
from wantrain.launch.torchrun import single_host_argv, train_argv, with_this_python, worker_argv


def test_every_worker_is_started_with_its_own_rank_and_name() -> None:
    plan = small_plan(2, 2)
    train = train_argv("run.toml", "--plan", "plan.json")
    lines = [" ".join(worker_argv(plan, name, "10.0.0.1", 29500, train)) for name in plan.workers]
    assert lines[2] == (
        f"torchrun --nnodes 4 --nproc-per-node 1 --node-rank 2 --master-addr 10.0.0.1 --master-port 29500"
        f" -m wantrain train run.toml --plan plan.json --worker {plan.workers[2]}"
    )
    assert len(set(lines)) == 4


def test_one_host_starts_all_workers_at_once() -> None:
    argv = single_host_argv(small_plan(2, 2), 1234, train_argv("run.toml"))
    assert argv[:5] == ["torchrun", "--nnodes", "1", "--nproc-per-node", "4"]
    assert with_this_python(argv)[:3] == [sys.executable, "-m", "torch.distributed.run"]
