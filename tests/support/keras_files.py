"""Real KerasCV files, which a script makes in a Keras environment for the tests; kept in
the environment, in the folder `made`."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .forks import Forks

ROOT = Path(__file__).resolve().parents[2]
MAKE = ROOT / "scripts" / "make_kerascv.py"
SCRIPTS = (  # what the files depend on
    MAKE,
    ROOT / "scripts" / "kerascv_images.py",
    ROOT / "scripts" / "kerascv_models.py",
    ROOT / "weightport" / "parity" / "runners" / "kerascv_build.py",
)
ENVIRONMENTS = {"k2": "keras2", "k3": "keras3", "openclip": "openclip"}


class KerasFiles:
    """The output folder of one run of `make_kerascv.py`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, Any] = json.loads((folder / "made.json").read_text())

    def path(self, component: str, kind: str) -> Path:
        """The file or folder of a component in one format; KeyError if this Keras cannot write
        it."""
        names = {
            (file["component"], file["format"]): str(file["path"]) for file in self.made["files"]
        }
        return self.folder / names[component, kind]

    def truth(self, component: str) -> dict[str, np.ndarray[Any, Any]]:
        """Every weight by structural path, such as
        `res_block.3.entry_flow.padded_conv2d.conv2d.weight`."""
        return _read(self.folder / self.made["truth"][component])


def keras_files(environment: str, *arguments: str) -> KerasFiles:
    """What `make_kerascv.py` makes in the environment `k2` or `k3`; made once, then found there.

    Skips the test where the environment is missing; `scripts/test` creates both.
    """
    folder = _made_by_these_scripts(environment) / _hash("\0".join(arguments).encode())
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # what another process makes is waited for
        if not folder.exists():
            _make(environment, arguments, folder)
    return KerasFiles(folder)


@cache
def keras(environment: str) -> Forks:
    """The Python of an environment with KerasCV imported."""
    return Forks(interpreter(environment), ["kerascv_models"], MAKE.parent)


def interpreter(environment: str) -> Path:
    """The Python of an environment; skips the test where it is missing."""
    name = ENVIRONMENTS[environment]
    default = ROOT / ".venvs" / name / "bin" / "python"
    python = Path(os.environ.get(f"WEIGHTPORT_{name.upper()}_PYTHON", default))
    if not python.exists():
        pytest.skip(
            f"{python} is missing; run scripts/test once, or set WEIGHTPORT_{name.upper()}_PYTHON"
        )
    return python


@cache
def _made_by_these_scripts(environment: str) -> Path:
    """The folder of all that they make there; what others made goes."""
    python = interpreter(environment)
    made = python.parents[1] / "made"
    folder = made / _hash(*(path.read_bytes() for path in SCRIPTS), _packages(python))
    folder.mkdir(parents=True, exist_ok=True)
    for other in made.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


@cache
def _packages(python: Path) -> bytes:
    code = (
        "import importlib.metadata as m; print(sorted({(d.name, d.version) for d in"
        " m.distributions()}))"
    )
    return subprocess.run([python, "-c", code], check=True, stdout=subprocess.PIPE).stdout


def _make(environment: str, arguments: tuple[str, ...], folder: Path) -> None:
    """Run the script into a folder of our own, which appears under its name when it is complete."""
    building = folder.with_suffix(".part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    run = keras(environment).script(MAKE, building, *arguments)
    if run.status != 0:
        shutil.rmtree(building, ignore_errors=True)
        raise RuntimeError(f"{MAKE.name} {' '.join(arguments)} failed:\n{run.err[-4000:]}")
    building.rename(folder)


def _read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(path) as arrays:
        return dict(arrays)
