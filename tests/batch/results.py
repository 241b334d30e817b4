"""What batches leave in their folders, and while they run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

from weightport.batch.jobs import Job
from weightport.batch.outcome import Outcome
from weightport.batch.run import run
from weightport.io import atomic

SECONDS = 120  # for anything to happen


def statuses(folder: Path) -> dict[str, str]:
    """Name of each job -> what `batch.json` says became of it."""
    content = json.loads((folder / "batch.json").read_text())
    return {job["name"]: job["status"] for job in content["jobs"]}


def content_of(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of everything below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def finished(folder: Path) -> dict[str, int]:
    """The jobs that are done -> the inode of a file that each has written."""
    found = {}
    for path in folder.glob(".batch/*.json"):
        written = json.loads(path.read_text())["written"]
        found[path.stem] = (folder / unquote(min(written))).stat().st_ino
    return found


def left_in_part(folder: Path) -> list[str]:
    """What a batch that has ended must not leave."""
    hidden = [path.name for path in folder.glob(".*") if path.name != ".batch"]
    return [*hidden, *(path.name for path in folder.glob(".batch/*.lock"))]


def at_work(folder: Path) -> list[int]:
    """The processes that have a job, as their locks say."""
    found = []
    for lock in folder.glob(".batch/*.lock"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            found.append(int(lock.read_text().split()[2].rpartition(":")[2]))
    return found


def wait_for(happens: Callable[[], object]) -> None:
    """Return when something has happened."""
    end = time.monotonic() + SECONDS
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def killed_by_3(job: Job, *_: object) -> Outcome:
    """Do a job; the one that is called 3 ends its process while it writes."""
    if job.name == "3":
        with atomic.folder(job.target):
            os.kill(os.getpid(), signal.SIGKILL)
    return run(job)
