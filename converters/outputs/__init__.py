"""One module for each layout that is written; each has a function `write`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from ..conversion import Conversion
from ..settings import Settings


class Layout(Protocol):
    """What a module of this folder offers.

    Attributes:
        SUFFIXES: what the names of its files may end in; a repository is a folder.
    """

    SUFFIXES: tuple[str, ...]

    def write(
        self,
        conversion: Conversion,
        output: Path,
        settings: Settings,
        progress: Callable[[int, int], None],
    ) -> None:
        """Write the output; fills in the conversion's report."""


class Output(NamedTuple):
    """How a layout is written.

    Attributes:
        name: of its module.
        is_repo: whether a repository is: its files are named by variant, and it reports its sources
            and says what it lacks.
    """

    name: str
    is_repo: bool = False

    @property
    def layout(self) -> Layout:
        """Its module, which is imported when it is first asked for."""
        return cast(Layout, import_module(f".{self.name}", __package__))

    @property
    def endings(self) -> tuple[str, ...]:
        """What the names of its files may end in; a repository is a folder."""
        return () if self.is_repo else self.layout.SUFFIXES

    def describe(self, conversion: Conversion, settings: Settings) -> None:
        """Fill in what the report of a dry run says; only a repository has one."""
        if self.is_repo:
            from .diffusers import describe

            describe(conversion, settings)


OUTPUTS = {
    "diffusers": Output("diffusers", is_repo=True),
    "kerascv": Output("kerascv"),
    "kerashub": Output("kerashub"),
    "ldm": Output("ldm"),
}
"""Name of a layout -> how it is written."""
