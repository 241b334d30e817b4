"""Real files of keras-hub, which a script makes in a Keras environment for the tests, where they
are kept."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from .forks import Forks
from .kept import kept
from .keras_files import ROOT, interpreter

MAKE = ROOT / "scripts" / "make_kerashub.py"
ENVIRONMENT = "k3"

Variables = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Path of a variable in a file -> dtype, shape, bytes."""


class KerasHubFiles:
    """The output folder of one run of `make_kerashub.py`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = json.loads((folder / "made.json").read_text())["files"]

    def path(self, kind: str) -> Path:
        """The file or folder of one format."""
        return self._folder / str(self._files[kind])

    def computed(self) -> dict[str, np.ndarray[Any, Any]]:
        """Inputs and outputs of every model, by name."""
        with np.load(self._folder / "computed.npz") as arrays:
            return dict(arrays)


def kerashub_files(*arguments: str) -> KerasHubFiles:
    """What `make_kerashub.py` makes; made once, then found. Skips where keras-hub is missing."""
    given = "\0".join(arguments).encode()
    return KerasHubFiles(kept(interpreter(ENVIRONMENT), [MAKE], given, partial(_make, arguments)))


@cache
def kerashub() -> Forks:
    """A Python with keras-hub imported."""
    return Forks(interpreter(ENVIRONMENT), ["make_kerashub"], MAKE.parent)


def variables(file: Path) -> Variables:
    """Everything that a file of Keras holds."""
    found: Variables = {}

    def take(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            dtype = str(item.attrs.get("dtype", item.dtype.str))
            found[name] = dtype, item.shape, item[()].tobytes()

    with h5py.File(file) as opened:
        opened.visititems(take)
    return found


def _make(arguments: tuple[str, ...], folder: Path) -> None:
    run = kerashub().script(MAKE, folder, *arguments)
    if run.status != 0:
        raise RuntimeError(f"{MAKE.name} {' '.join(arguments)} failed:\n{run.err[-4000:]}")
