from pathlib import Path

import pytest

from wantrain.probe import machine


def test_a_machine_is_the_same_to_all_its_workers() -> None:
    assert machine.host_id() == machine.host_id() != ""


def test_free_memory_is_less_than_all() -> None:
    total = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    assert 0 < machine.free_memory_bytes() < total * 1024


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("300000000\n")
    (tmp_path / "memory.current").write_text("100000000\n")
    assert machine.free_memory_bytes() == 200_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory_bytes() > 200_000_000


def test_the_processor_has_a_name() -> None:
    assert machine.processor_name().strip()
