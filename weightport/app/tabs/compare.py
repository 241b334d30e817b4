"""*Compare*: two checkpoints in any two layouts, tensor by tensor."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from ...reports.page import render
from ..desk import Desk
from ..framework import gr
from ..sessions import Session
from ..sources import SourceField
from ..widgets import Shown, Tab, action, explained


def add(desk: Desk) -> Tab:
    """Draw the tab."""
    explained(
        "Reads two checkpoints, in any two layouts, and says which tensors differ and by how much."
        " Nothing is written."
    )
    first = SourceField(desk, "First", "compare-a", most=1)
    second = SourceField(desk, "Second", "compare-b", most=1)

    async def run(
        request: gr.Request,
        uploads: list[str],
        elsewhere: str,
        others: list[str],
        other_place: str,
    ) -> AsyncIterator[tuple[Shown, Shown]]:
        def arguments(session: Session) -> dict[str, Any]:
            (a,) = first.named(session, uploads, elsewhere)
            (b,) = second.named(session, others, other_place)
            return {"a": a, "b": b}

        async for step in desk.work(request.session_hash, "compare", arguments, heavy=True):
            found = "" if step.result is None else render("app/comparison.html", **step.result)
            yield step.status, found

    action(desk, "compare", "Compare", run, [*first.components, *second.components])
    return Tab([first, second])
