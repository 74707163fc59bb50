"""Growing files of lines, metrics and logs: each line is read once, and an earlier launch's log is kept."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

_MARK_BYTES = 64


class Tail:
    """Reads what was added to a file of lines since the last look.

    A resumed run rewrites its metrics without the steps that it does again. So the last bytes read are compared at
    every look: where they are no longer there, the file is read from its beginning and `restarted` is true.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._mark = b""
        self.restarted = False

    def read(self) -> list[dict[str, Any]]:
        """Return the whole lines added since the last call, as JSON; a file that isn't there yet has none."""
        return [json.loads(line) for line in self.read_bytes().splitlines()]

    def read_bytes(self) -> bytes:
        """Return the whole lines added since the last call as they are."""
        self.restarted = False
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset - len(self._mark))
                if file.read(len(self._mark)) != self._mark:
                    self.restarted, self._offset = True, 0
                    file.seek(0)
                added = file.read()
        except FileNotFoundError:
            return b""
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._mark = whole[-_MARK_BYTES:] if whole or self.restarted else self._mark
        return whole


def keep_earlier(log: Path) -> None:
    """Put an earlier launch's log aside, under the time of its last line."""
    if log.exists():
        log.rename(log.with_name(f"{log.stem}.{datetime.fromtimestamp(log.stat().st_mtime):%Y%m%d-%H%M%S}.log"))
