"""The documentation's build refuses links that lead nowhere; that it succeeds is .ci/run's to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import wantrain

ROOT = Path(__file__).resolve().parent.parent


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    """The very command of `make docs`, with its settings for links, on two small pages."""
    (command,) = re.findall(r"\.venv/bin/mkdocs (build.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert f".venv/bin/mkdocs {command}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text("site_name: small\n" + settings[settings.index("validation:") :])
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n\n[page](b.md#nowhere) [page](c.md)\n", encoding="utf-8")
    (tmp_path / "docs" / "b.md").write_text("# B\n", encoding="utf-8")
    argv = [sys.executable, "-m", "mkdocs", *command.split()]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "does not contain an anchor '#nowhere'" in done.stderr
    assert "'c.md', but the target is not found" in done.stderr


def test_every_module_of_the_reference_is_there() -> None:
    source = (ROOT / "docs" / "site_pages.py").read_text(encoding="utf-8")
    rooms = source[source.index("ROOMS = {") : source.index('"""The main modules')]
    modules = [one for line in rooms.splitlines()[1:] for one in re.findall(r'"([a-z_.]+)"[,)]', line)]
    assert len(modules) > 30
    for module in modules:
        assert Path(wantrain.__file__).parent.joinpath(*module.split(".")).with_suffix(".py").exists(), module
