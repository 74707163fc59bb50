"""The README is true: its example runs, its table is what was measured, its links and commands exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import write_results
from network_setting import Setting
from wantrain.cli import SUBCOMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

ENVIRONMENT = {"cores": 2, "processor": "a processor", "torch": "2.13.0", "when": "2026-01-02T03:04:05", "commit": "c"}

STEP = {
    "setting": Setting(62.5e6).as_dict(),
    "system": "torch 1F1B",
    "series": "2026-01-02",
    "step_s": 10.2,
    "processor_s": [0.5] * 8,
    "stolen": 0.0,
    "environment": ENVIRONMENT,
}

LINKS = {
    "topology": "long.toml",
    "bytes": 64_000_000,
    "count": 10,
    "dilation": 1.0,
    "channel": {
        "transport": {"num_connections": 7},
        "row_mbit_per_s": {"median": 911.2},
        "single_mbit_per_s": {"median": 801.0},
    },
    "one_connection": {"row_mbit_per_s": {"median": 216.4}},
    "environment": ENVIRONMENT,
}


def test_the_table_is_what_was_measured() -> None:
    assert write_results.main(["--check"]) == 0, "run python benchmarks/write_results.py"


def test_without_results_the_table_says_so(tmp_path: Path) -> None:
    assert write_results.table(folder=tmp_path) == write_results.NOTHING


def test_the_newest_record_of_a_setting_counts(tmp_path: Path) -> None:
    older = STEP | {"step_s": 7.7, "series": "2026-01-01"}
    (tmp_path / "network.jsonl").write_text(json.dumps(older) + "\n" + json.dumps(STEP) + "\n", encoding="utf-8")
    (tmp_path / "links.jsonl").write_text(json.dumps(LINKS) + "\n", encoding="utf-8")
    text = write_results.table(folder=tmp_path)
    assert "| 8 × 16 | 500 Mbit/s | torch 1F1B | 4 | 10.20 | 10.20–10.20 | 1 | 1606 | 50% |" in text
    assert "| long | 10 × 64 MB | 911 | 801 | 7 | 216 |" in text
    assert "7.7" not in text


def test_the_page_has_a_section_for_each_result_file(tmp_path: Path) -> None:
    (tmp_path / "links.jsonl").write_text(json.dumps(LINKS) + "\n", encoding="utf-8")
    page = write_results.page(tmp_path)
    assert "## Links" in page
    assert "## Predicted" not in page
    stored = write_results.page()
    for name, (title, _) in write_results.SECTIONS.items():
        assert (f"## {title}" in stored) == (write_results.RESULTS / f"{name}.jsonl").exists()


def test_every_picture_of_the_page_is_there_and_every_picture_is_shown() -> None:
    shown = set(re.findall(r"!\[[^]]+\]\(([^)]+)\)", write_results.page()))
    assert shown == {f"pictures/{path.name}" for path in (ROOT / "docs" / "pictures").iterdir()}


def test_a_missing_marker_is_said() -> None:
    with pytest.raises(SystemExit, match="lacks a marker"):
        write_results.with_table("no marker", "")


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_every_command_is_named() -> None:
    assert {one.name for one in SUBCOMMANDS} == set(re.findall(r"\| `wantrain ([a-z]+)", README))


def test_the_example_trains(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    apart = ["--redirects", "1", "--log-dir", str(tmp_path / "logs")]  # one file a rank, since their lines would mix
    done = subprocess.run(
        [*torchrun, *apart, str(script)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = [path.read_text().split() for path in sorted(tmp_path.rglob("stdout.log"))]
    assert sorted(words[0] for words in printed) == ["a-0", "a-1", "b-0", "b-1"]
    losses = [words[1::2] for words in printed]
    assert len(losses[0]) == 3
    assert all(one == losses[0] for one in losses)
