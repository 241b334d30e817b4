"""Runs one conversion again and again and disturbs it each time at another place.

    python interrupt.py fail|kill|kill-by-time OUTPUT SOURCE...

A step is a file opened for writing, a folder made or a move, in the folder of the output, or a
sync. `fail`: the next step in turn meets a full disk. `kill`: the process is killed just before it
(not before syncs: they change nothing). `kill-by-time`: it is killed at a point of time. An output
that is there already is to be overwritten. Prints a line of JSON for each run and for the
undisturbed one that ends the series: the exit status, what was printed, what is in the folder of
the output, and whether the output is none, old, new or broken.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py  # noqa: F401 - imported here so that no run has to

import weightport.runtime.manifest  # noqa: F401
from weightport.cli import main

MOMENTS = 10
_fsync = os.fsync


class Steps:
    """Calls `action` at the step number `left`, counted from 1; never for 0."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.left, self.action = str(folder), 0, lambda: None
        sys.addaudithook(self._audit)

    def count_syncs(self) -> None:
        """Count syncs too."""

        def fsync(fd: Any) -> None:
            self.take()
            _fsync(fd)

        os.fsync = fsync

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.left:
            return
        path = str(arguments[0]) if arguments else ""
        if event == "open":
            counts = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and path.startswith(
                self.folder
            )
        elif event == "os.mkdir":
            counts = path.startswith(self.folder) and not Path(path).is_dir()
        else:
            counts = event == "ctypes.dlsym" and arguments[1] == "renameat2"
        if counts:
            self.take()

    def take(self) -> None:
        """Count a step."""
        self.left = max(0, self.left - 1)
        if self.left == 0 and self.action:
            action, self.action = self.action, None
            action()


def run(
    arguments: list[str], prepare: Callable[[], None] = lambda: None, delay: float | None = None
) -> dict[str, Any]:
    """One conversion in a forked process; killed after `delay` seconds."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        child = os.fork()
        if child == 0:
            os.dup2(err.fileno(), 2)
            prepare()
            os._exit(main(arguments))
        if delay is not None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        err.seek(0)
        return {"status": status, "err": err.read()}


def digest(output: Path) -> str | None:
    """A digest of everything in the output; None if it is not there."""
    if not output.exists():
        return None
    files = (
        sorted(path for path in output.rglob("*") if path.is_file())
        if output.is_dir()
        else [output]
    )
    whole = hashlib.sha256()
    for path in files:
        whole.update(
            f"{path.relative_to(output)}\0".encode() + hashlib.sha256(path.read_bytes()).digest()
        )
    return whole.hexdigest()


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def disturb(mode: str, output: Path, sources: list[str]) -> None:
    steps = Steps(output.parent)
    if mode == "fail":
        steps.count_syncs()
    before, old = set(output.parent.iterdir()), digest(output)
    options = [
        "--quiet",
        *(["--to", "kerascv"] if output.suffix else []),
        *(["--overwrite"] if old else []),
    ]
    arguments = ["convert", *sources, *options, "-o", str(output)]

    def remove(path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def report(ended: dict[str, Any]) -> bool:
        state = {old: "old", new: "new", None: "none"}.get(digest(output), "broken")
        left = sorted(path.name for path in set(output.parent.iterdir()) - before)
        print(json.dumps(ended | {"left": left, "state": state}), flush=True)
        if not old:
            remove(output)
        return ended["status"] == 0

    def prepare(step: int) -> None:
        steps.left, steps.action = step, full_disk if mode == "fail" else kill

    main([*arguments, "--dry-run"])  # fills caches that all runs share
    elsewhere = output.with_name(f"new {output.name}")
    started = time.monotonic()
    run([*arguments[:-1], str(elsewhere)])
    duration, new = time.monotonic() - started, digest(elsewhere)
    remove(elsewhere)
    if mode == "kill-by-time":
        for moment in range(MOMENTS):
            report(run(arguments, delay=duration * moment / MOMENTS))
        report(run(arguments))
    else:
        for step in itertools.count(1):
            if report(run(arguments, partial(prepare, step))):
                break


if __name__ == "__main__":
    disturb(sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3:])
