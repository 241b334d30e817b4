"""Real KerasCV files, which a script makes in a Keras environment for the tests, where they are
kept."""

from __future__ import annotations

import json
import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .forks import Forks
from .kept import kept

ROOT = Path(__file__).resolve().parents[2]
MAKE = ROOT / "scripts" / "make_kerascv.py"
BUILD = ROOT / "weightport" / "parity" / "runners" / "kerascv_build.py"
MODELS = (ROOT / "scripts" / "kerascv_models.py", BUILD)  # what they are
SCRIPTS = (MAKE, ROOT / "scripts" / "kerascv_images.py", *MODELS)
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
    given = "\0".join(arguments).encode()
    make = partial(_make, environment, arguments)
    return KerasFiles(kept(interpreter(environment), SCRIPTS, given, make))


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


def _make(environment: str, arguments: tuple[str, ...], folder: Path) -> None:
    run = keras(environment).script(MAKE, folder, *arguments)
    if run.status != 0:
        raise RuntimeError(f"{MAKE.name} {' '.join(arguments)} failed:\n{run.err[-4000:]}")


def _read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(path) as arrays:
        return dict(arrays)
