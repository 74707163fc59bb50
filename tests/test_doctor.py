"""`wantrain doctor`: every finding has a state, and what is not fine has a remedy or needs none."""

from __future__ import annotations

import argparse
import json
import os
import time

import pytest

from wantrain import doctor
from wantrain.doctor import Finding


def run_doctor(as_json: bool = False) -> int:
    return doctor.run(argparse.Namespace(json=as_json, peer=None, hosts=None))


def test_this_machine_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever runs the tests has Python and torch, so nothing that is needed is missing."""
    assert run_doctor(as_json=True) == 0
    found = {one["what"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["Python"]["state"] == found["torch"]["state"] == "ok"
    assert found["private namespaces"]["state"] == "ok" or found["private namespaces"]["remedy"]
    assert "cores" in found["machine"]["detail"]


def test_a_missing_need_is_status_1_and_shows_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding("torch", "missing", "not installed", "pip install torch"), Finding("disk", "ok", "2 GB")]
    monkeypatch.setattr(doctor, "examine", lambda: iter(findings))
    assert run_doctor() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("✗ torch")
    assert lines[1].endswith("→ pip install torch")
    assert lines[2].startswith("✓ disk")


def test_what_is_only_limited_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: iter([Finding("GPU", "limited", "none")]))
    assert run_doctor() == 0


def test_missing_programs_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    finding = doctor._programs()
    assert (finding.state, finding.detail) == ("limited", "ip, tc missing")
    assert "iproute2" in finding.remedy


def test_a_single_core_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert doctor._machine().state == "limited"


def test_a_name_service_that_loses_questions_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def lost_at_last(place: tuple[str, int], _flags: int) -> tuple[str, str]:
        asked.append(place[0])
        if len(asked) == 3:
            time.sleep(0.1)
        return place[0], "0"

    monkeypatch.setattr("socket.getnameinfo", lost_at_last)
    assert doctor._names().state == "ok"
    asked.clear()
    monkeypatch.setattr(doctor, "_SLOW_ANSWERS_S", 0.05)
    finding = doctor._names()
    assert (finding.state, len(asked)) == ("limited", 3)
    assert "/etc/hosts" in finding.remedy
