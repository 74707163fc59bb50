"""Generated keys and configurations: every pair agrees, and private keys are their host's alone."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from wantrain.errors import ConfigError
from wantrain.launch import wireguard
from wantrain.launch.hosts import Hosts
from wantrain.netem.sandbox import search_path

needs_wg = pytest.mark.skipif(shutil.which("wg", path=search_path()) is None, reason="wg is missing (wireguard-tools)")

HOSTS = """
[wireguard]
network = "10.77.0.0/24"
[[host]]
workers = ["a-0", "a-1"]
ssh = "anna@a"
ssh_options = ["-p", "2222"]
endpoint = "a.example"
[[host]]
workers = ["b-0"]
ssh = "b"
endpoint = "2001:db8::2"
[[host]]
workers = ["c-0"]
ssh = "c"
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    path = tmp_path / "hosts.toml"
    path.write_text(HOSTS)
    return path


def values(text: str, key: str) -> list[str]:
    return re.findall(rf"^{key} = (.*)$", text, re.MULTILINE)


@needs_wg
def test_every_host_knows_the_others_by_their_public_keys(hosts: Path, tmp_path: Path) -> None:
    paths = wireguard.write_configs(Hosts.load(hosts), tmp_path / "out")
    texts = [path.read_text() for path in paths]
    assert [path.parent.name for path in paths] == ["a-0", "b-0", "c-0"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in paths)
    public = [
        subprocess.run(["wg", "pubkey"], input=values(text, "PrivateKey")[0], capture_output=True, text=True).stdout
        for text in texts
    ]
    for i, text in enumerate(texts):
        assert set(values(text, "PublicKey")) == {key.strip() for j, key in enumerate(public) if j != i}
        assert values(text, "Address") == [f"10.77.0.{i + 1}/24"]
        assert values(text, "AllowedIPs") == [f"10.77.0.{j + 1}/32" for j in range(3) if j != i]
        assert not [
            key for j, other in enumerate(texts) if j != i for key in values(other, "PrivateKey") if key in text
        ]
    shared = [set(values(text, "PresharedKey")) for text in texts]
    assert [len(shared[i] & shared[j]) for i, j in ((0, 1), (0, 2), (1, 2))] == [1, 1, 1]
    assert len(shared[0] | shared[1] | shared[2]) == 3


@needs_wg
def test_who_is_behind_a_nat_keeps_its_tunnels_open(hosts: Path) -> None:
    loaded = Hosts.load(hosts)
    assert loaded.wireguard is not None
    found = wireguard.configs(loaded, loaded.wireguard)
    assert values(found["c-0"], "Endpoint") == ["a.example:51820", "[2001:db8::2]:51820"]
    assert values(found["c-0"], "PersistentKeepalive") == ["25", "25"]
    assert values(found["a-0"], "Endpoint") == ["[2001:db8::2]:51820"]
    assert values(found["a-0"], "PersistentKeepalive") == []


@needs_wg
def test_keys_in_use_are_not_overwritten(hosts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(hosts=str(hosts), out=str(tmp_path / "out"))
    assert wireguard.run(args) == 0
    said = capsys.readouterr().out
    assert f"scp -P 2222 {tmp_path}/out/a-0/wantrain.conf anna@a:wantrain.conf" in said
    assert "UDP port 51820" in said
    with pytest.raises(ConfigError, match="is there already, with keys that hosts may use"):
        wireguard.run(args)


def test_without_the_program_or_the_section_it_says_so(
    hosts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="apt-get install wireguard-tools"):
        wireguard.write_configs(Hosts.load(hosts), tmp_path / "out")
    plain = Hosts.parse({"host": [{"workers": ["a"], "ssh": "a", "address": "10.0.0.1"}]}, ConfigError, "hosts.toml")
    with pytest.raises(ConfigError, match=r"has no \[wireguard\]"):
        wireguard.write_configs(plain, tmp_path / "out")
