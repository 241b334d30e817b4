"""Small things that all tabs are drawn with."""

from __future__ import annotations

from typing import Any

from ..reports.page import render
from .framework import gr

Shown = Any
"""A value for a component, or `gr.update(...)` of it."""

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
        html_template='<div role="status" aria-live="polite" class="wp-status">${value}</div>',
    )
