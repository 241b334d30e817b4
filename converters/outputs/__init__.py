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
        describe: fills in what the report of a dry run says.
    """

    write: Write
    is_repo: bool = False
    endings: tuple[str, ...] = ()
    describe: Callable[[Conversion, Settings], None] = lambda conversion, settings: None


OUTPUTS = {
    "diffusers": Output(diffusers.write, is_repo=True, describe=diffusers.describe),
    "kerascv": Output(kerascv.write, endings=kerascv.SUFFIXES),
    "kerashub": Output(kerashub.write, endings=kerashub.SUFFIXES),
    "ldm": Output(ldm.write, endings=(ldm.SUFFIX,)),
}
"""Name of a layout -> how it is written."""
