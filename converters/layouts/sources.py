"""Opens what the user names: the only place that chooses among the layouts."""

from __future__ import annotations

from typing import Protocol

from ..checkpoint import Checkpoint
from . import diffusers, kerascv, ldm
from .source import Source
from .unsupported import refuse_unsupported


class Layout(Protocol):
    """What a module of this folder offers."""

    def reads(self, source: Source) -> bool:
        """Whether the source is in this layout."""

    def parts(self, source: Source) -> list[Checkpoint]:
        """The components that the source holds.

        Raises:
            ConversionError: nothing readable is there.
        """


LAYOUTS: dict[str, Layout] = {"kerascv": kerascv, "ldm": ldm, "diffusers": diffusers}
"""Name -> the module; asked in this order."""


def open_source(source: Source) -> list[Checkpoint]:
    """The components that a path holds.

    Raises:
        ConversionError: nothing readable is there, or a model that is not supported.
    """
    if source.raw is not None:
        refuse_unsupported(source.raw)
    layout = next(layout for layout in LAYOUTS.values() if layout.reads(source))
    return layout.parts(source)
