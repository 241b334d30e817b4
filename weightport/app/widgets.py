"""Small things that all tabs are drawn with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConversionError, printable
from ..reports.page import render
from .desk import Desk
from .framework import gr
from .sources import SourceField

Shown = Any
"""A value for a component, or `gr.update(...)` of it."""


@dataclass
class Tab:
    """What the page must know of a tab.

    Attributes:
        fields: that list uploads.
        makes: the events after which there is more to list.
    """

    fields: list[SourceField]
    makes: list[Any] = field(default_factory=list)


EVENT: dict[str, Any] = {
    "show_progress": "hidden",
    "concurrency_limit": None,
    "api_visibility": "private",
}
"""How every event is: its own status says how it goes, and the desk has the queue."""


def explained(text: str) -> None:
    """A paragraph that says what something will do."""
    gr.HTML(render("app/paragraph.html", text=text))


def live(name: str) -> Any:
    """A place for a status, which screen readers read out when it changes."""
    return gr.HTML(
        "",
        elem_id=name,
        html_template=render("app/live.html"),
    )


def whole_number(text: str | None, name: str, least: int, most: int) -> int | None:
    """What stands in a field for a whole number; None if nothing does.

    Raises:
        ConversionError: it is none, or out of bounds.
    """
    typed = (text or "").strip()
    if not typed:
        return None
    if not typed.isdecimal() or len(typed) > _DIGITS or not least <= int(typed) <= most:
        raise ConversionError(
            f"{name}: {printable(typed)} is not a whole number from {least} to {most}"
        )
    return int(typed)


_DIGITS = 19


def action(
    desk: Desk, name: str, title: str, run: Callable[..., Any], inputs: Sequence[Any]
) -> Any:
    """A button that starts a job, one that stops it, and places for its status and result.

    Args:
        name: of the tab in the page.
        run: an event's function, an iterator of (status, result).
    """
    with gr.Row():
        start = gr.Button(title, variant="primary", elem_id=f"{name}-run")
        stop = gr.Button("Cancel", variant="stop", elem_id=f"{name}-cancel")
    status = live(f"{name}-status")
    result = gr.HTML(elem_id=f"{name}-result")

    def cancel(request: gr.Request) -> None:
        desk.cancel(request.session_hash)

    stop.click(cancel, [], [], **EVENT)
    return start.click(run, list(inputs), [status, result], **EVENT)
