"""Folders that are filled once, and what programs of Keras' environments gave: the same files for
the same program, packages and input, so they are kept in the environment, in the folder `made`."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

Fill = Callable[[Path], object]


def filled_once(folder: Path, fill: Fill) -> Path:
    """A folder that appears under its name when it is complete; what another process fills is
    waited for."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            filling = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(filling, ignore_errors=True)
            filling.mkdir()
            fill(filling)
            filling.rename(folder)
    return folder


def kept(python: Path, scripts: Sequence[Path], given: bytes, fill: Fill) -> Path:
    """The folder that these scripts fill from what is given, kept in the environment of `python`.

    Args:
        python: the environment's interpreter.
        scripts: the program, and the modules beside it that decide what it does.
        given: all else that decides it, but for how XLA is told to compile.
        fill: runs the program.
    """
    flags = os.environ.get("XLA_FLAGS", "").encode()
    return filled_once(_made_by(python, *scripts) / _hash(given, flags), fill)


def content_of(path: Path) -> list[str]:
    """Hashes of a file, of a folder's files, or of the files whose names begin so."""
    beginnings = [path] if path.exists() else sorted(path.parent.glob(f"{path.name}*"))
    files = [file for beginning in beginnings for file in (beginning, *beginning.rglob("*"))]
    return [_hash(file.read_bytes()) for file in sorted(files) if file.is_file()]


@cache
def _made_by(python: Path, *scripts: Path) -> Path:
    """The folder of all that these scripts made; what other versions of them made goes."""
    versions = [path.read_bytes() for path in scripts]
    made = python.parents[1] / "made" / scripts[0].stem
    folder = made / _hash(*versions, _packages(python))
    folder.mkdir(parents=True, exist_ok=True)
    for other in made.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


@cache
def _packages(python: Path) -> bytes:
    code = (
        "import importlib.metadata as m; print(sorted({(d.name, d.version) for d in"
        " m.distributions()}))"
    )
    # -I: where the tests stand is no part of the environment
    command = [str(python), "-I", "-c", code]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
