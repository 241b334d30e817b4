"""The field that names what a tab works on: uploads of this visit, or something elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ConversionError
from .desk import Desk
from .framework import gr
from .sessions import Session

NONE = "Upload files above; they appear here."
"""What a list of no uploads says."""


class SourceField:
    """Check boxes for the uploads, and lines for what lies elsewhere.

    Args:
        title: what it asks for.
        name: of the field in the page, for its element's id.
        most: how many it takes; None for any number.
    """

    def __init__(self, desk: Desk, title: str, name: str, most: int | None = None) -> None:
        self._desk = desk
        self._title = title
        self._most = most
        self.uploads = gr.CheckboxGroup(
            [], label=f"{title}: your uploads", elem_id=f"{name}-uploads", info=NONE
        )
        self.elsewhere = gr.Textbox(
            label=f"{title}: {where(desk)}",
            elem_id=f"{name}-elsewhere",
            lines=1,
            max_lines=8,
            placeholder="owner/name or owner/name@revision/file, one a line",
        )

    @property
    def components(self) -> list[Any]:
        """The inputs of an event, in the order that `named` takes them."""
        return [self.uploads, self.elsewhere]

    def named(self, session: Session, uploads: Sequence[str], elsewhere: str) -> list[str]:
        """What was chosen, as a task takes it.

        Raises:
            ConversionError: nothing or too much was chosen, or something that is not there.
        """
        found = [session.file(name).name for name in uploads or ()]
        found += [self._desk.place(line) for line in (elsewhere or "").splitlines() if line.strip()]
        if not found:
            raise ConversionError(f"{self._title}: choose an upload, or name {where(self._desk)}")
        if self._most is not None and len(found) > self._most:
            raise ConversionError(f"{self._title}: choose {self._most}, not {len(found)}")
        return found


def where(desk: Desk) -> str:
    """What may be named that was not uploaded."""
    return "a Hub id" if desk.public else "a Hub id or a path on this machine"
