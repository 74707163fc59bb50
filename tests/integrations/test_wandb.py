"""A W&B run in offline mode is read back from its file, with W&B's own record types."""

import json
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import small_plan
from tests.watched import Watched
from wantrain.errors import ConfigError
from wantrain.integrations.wandb import WeightsAndBiases
from wantrain.plan import Plan
from wantrain.training.metrics import RunFacts

wandb = pytest.importorskip("wandb")

BLOCK = 32768
"""Of LevelDB's log format."""


def stored(file: Path) -> list[Any]:
    """Return the records of a .wandb file: W&B's header, then protobufs in LevelDB's log format (blocks of 32 KiB)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    records, pieces, at = [], b"", 7
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # no room for a piece's head: the block's end is filled up
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        pieces += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            records.append(Record.FromString(pieces))
            pieces = b""
    return records


def history(records: list[Any]) -> list[dict[str, Any]]:
    """Return what was logged, in order."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def test_the_losses_read_back_are_the_runs(watched: Watched) -> None:
    (file,) = (watched.run.path / "wandb").glob("offline-run-*/run-*.wandb")
    records = stored(file)
    rows, steps = history(records), watched.run.read_steps(0)
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(one.step, one.loss) for one in steps]
    held_out = [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]
    assert held_out == [(one.step, one.validation_loss) for one in watched.run.read_validations()]
    peer = Plan.load(watched.run.plan).workers[1]
    assert [row[f"sent_bytes/{peer}"] for row in rows if "loss" in row] == [one.sent[peer].wire_bytes for one in steps]
    (begun,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["training"]["batch_size"] == 8
    assert config["plan"]["replicas"][0]["workers"][1] == peer
    assert begun.run_id == (watched.run.path / "wandb" / "rank-0.id").read_text().strip()
    assert any(record.WhichOneof("record_type") == "exit" for record in records)  # it was ended, not dropped


def test_a_server_that_cannot_be_reached_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wantrain.integrations.wandb._INIT_WITHIN_S", 2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with pytest.raises(ConfigError, match=r"can't begin a run at W&B .*set mode = \"offline\"") as caught:
        WeightsAndBiases().begin(RunFacts("run", 0, small_plan(1, 1), folder=tmp_path))
    assert "\n" not in str(caught.value)
    wandb.teardown()  # ends W&B's own process


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"needs the package wandb \(not installed\)"):
        WeightsAndBiases()
