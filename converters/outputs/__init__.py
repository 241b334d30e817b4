"""One module for each layout that is written; each has a function `write`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..conversion import Conversion
from ..settings import Settings
from . import diffusers, kerascv, kerashub, ldm

Write = Callable[[Conversion, Path, Settings, Callable[[int, int], None]], None]
"""(conversion, output, settings, progress): writes the output, fills in the conversion's report."""


@dataclass(frozen=True)
class Output:
    """How a layout is written.

    Attributes:
        is_repo: whether a repository is: its files are named by variant, and it reports its sources
            and says what it lacks.
        endings: what the names of its files may end in; a repository is a folder.
    """

    write: Write
    is_repo: bool = False
    endings: tuple[str, ...] = ()


OUTPUTS = {
    "diffusers": Output(diffusers.write, is_repo=True),
    "kerascv": Output(kerascv.write, endings=kerascv.SUFFIXES),
    "kerashub": Output(kerashub.write, endings=kerashub.SUFFIXES),
    "ldm": Output(ldm.write, endings=(".safetensors",)),
}
"""Name of a layout -> how it is written."""
