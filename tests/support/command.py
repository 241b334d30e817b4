"""Runs the `weightport` command, here or in a process of its own, and checks how it refuses."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py

from weightport.cli import main

COMMAND = (sys.executable, "-m", "weightport")


def heed_interrupts() -> None:
    """In a child, before it begins: a test run in the background ignores them, and so would it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Run:
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str


def run(*arguments: str | Path) -> Run:
    """Run the command in this process, which keeps its own way to end."""
    terminate = signal.getsignal(signal.SIGTERM)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        finally:
            signal.signal(signal.SIGTERM, terminate)
    return Run(status, out.getvalue(), err.getvalue())


def spawn(
    *arguments: str | Path,
    before: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Run:
    """Run the command in an interpreter of its own; `before` runs in its process first."""
    process = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        preexec_fn=before,
        env={**os.environ, **(environment or {})},
        check=False,
        timeout=120,
    )
    return Run(process.returncode, process.stdout, process.stderr)


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every path below a folder with type, size and time; a folder's own time counts as nothing."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = (
            (status.st_mode, 0, 0)
            if path.is_dir()
            else (status.st_mode, status.st_size, status.st_mtime_ns)
        )
    return found


def assert_refused(ended: Run, names: str | Path, reason: str) -> None:
    """One line on stderr that names a file and gives the reason, no traceback, no success."""
    assert ended.status == 1, ended
    assert ended.out == ""
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.endswith("\n"), ended.err
    line = ended.err[:-1]
    assert line.startswith("error: "), line
    assert line.isprintable(), repr(line)
    assert str(names) in line, f"{names} is not named: {line}"
    assert re.search(reason, line), f"no {reason!r} in: {line}"
    assert "run with --debug" not in line, f"not a reason a user can act on: {line}"


def refused(place: Path, *sources: str | Path, names: str | Path, reason: str) -> None:
    """Converting the sources, or planning to, is refused, and leaves everything in `place` as it
    was."""
    before = listing(place)
    for more in ([], ["--dry-run"]):
        assert_refused(run("convert", *sources, "-o", place / "out", *more), names, reason)
        assert listing(place) == before


def edited(file: Path, folder: Path, edit: Callable[[h5py.File], object]) -> Path:
    """A copy of an HDF5 file in a folder, changed."""
    copy = folder / file.name
    shutil.copyfile(file, copy)
    with h5py.File(copy, "r+") as opened:
        edit(opened)
    return copy
