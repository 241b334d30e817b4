"""What a worker writes for its server: a line of JSON each."""

from __future__ import annotations

import json
import time
from typing import Any, TextIO

_PAUSE = 0.2  # seconds between two lines of progress


class Report:
    """Writes lines to the server; progress no more often than anyone looks."""

    def __init__(self, lines: TextIO) -> None:
        self._lines = lines
        self._done = 0
        self._written = 0.0

    def line(self, content: dict[str, Any]) -> None:
        """Write an answer."""
        print(json.dumps(content), file=self._lines, flush=True)

    def progress(self, done: int, total: int) -> None:
        """Take (units just done, units in all)."""
        self._done += done
        now = time.monotonic()
        if now - self._written > _PAUSE:
            self._written = now
            self.line({"progress": [self._done, total]})

    def begin(self) -> None:
        """Count from nothing again."""
        self._done = 0
