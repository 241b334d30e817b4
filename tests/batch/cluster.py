"""A Dask cluster of processes: a scheduler and three workers on loopback."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import DEVNULL, Popen

from .results import wait_for

WORKERS = 3


class Cluster:
    """A scheduler and its workers, each a process."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "scheduler.json"
        self.scheduler = self._start("scheduler", "--port", "0", "--host", "127.0.0.1")
        wait_for(self.file.exists)
        options = ("--nthreads", "1", "--no-nanny", "--local-directory", str(folder))
        self.workers = [self._start("worker", *options) for _ in range(WORKERS)]

    def _start(self, kind: str, *options: str) -> Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--no-dashboard"]
        command += ["--scheduler-file", str(self.file), *options]
        return Popen(command, stdout=DEVNULL, stderr=DEVNULL)

    @property
    def address(self) -> str:
        return str(json.loads(self.file.read_text())["address"])

    def close(self) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()
