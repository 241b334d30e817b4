"""*Inspect*: what files are, why, and what they lack."""

from __future__ import annotations

from collections.abc import AsyncIterator

from ...reports.page import render
from ..desk import Desk
from ..framework import gr
from ..sources import SourceField
from ..widgets import EVENT, Shown, Tab, explained, live


def add(desk: Desk) -> Tab:
    """Draw the tab."""
    explained(
        "Says what each file is, why, what is missing, and what it would become, from its headers"
        " alone. Nothing is written."
    )
    sources = SourceField(desk, "Files", "inspect")
    button = gr.Button("Inspect", variant="primary", elem_id="inspect-run")
    status = live("inspect-status")
    result = gr.HTML(elem_id="inspect-result")

    async def run(
        request: gr.Request, uploads: list[str], elsewhere: str
    ) -> AsyncIterator[tuple[Shown, Shown]]:
        steps = desk.work(
            request.session_hash,
            "inspect",
            lambda session: {"sources": sources.named(session, uploads, elsewhere)},
        )
        async for step in steps:
            found = "" if step.result is None else render("app/files.html", **step.result)
            yield step.status, found

    button.click(run, sources.components, [status, result], **EVENT)
    return Tab([sources])
