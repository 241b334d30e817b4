"""*Parity*: a converted repository beside the framework that its weights came from."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

from ..desk import Desk
from ..framework import gr
from ..results import report_page
from ..sessions import RESULTS, Session
from ..sources import SourceField
from ..widgets import Shown, Tab, action, explained


def add(desk: Desk) -> Tab:
    """Draw the tab."""
    explained(
        "Runs a converted repository and the framework that its weights came from (KerasCV, ldm,"
        " open_clip or diffusers) on the same inputs, and reports how far they are apart. Where"
        " the framework is not installed, it says how to get it. A conversion that you downloaded"
        " is listed as its archive."
    )
    repo = SourceField(desk, "Converted repository", "parity-repo", most=1)
    sources = SourceField(desk, "Files that it was converted from", "parity")
    python = gr.Textbox(
        label="Interpreter that has the framework",
        info="Left empty, the one that runs this page.",
        elem_id="parity-python",
        visible=not desk.public,
    )
    size = gr.Slider(64, 512, value=128, step=64, label="Image size", elem_id="parity-size")
    images = gr.Checkbox(label="Also compare whole images", elem_id="parity-images")

    async def run(
        request: gr.Request,
        repo_uploads: list[str],
        repo_place: str,
        uploads: list[str],
        elsewhere: str,
        interpreter: str,
        image_size: float,
        whole: bool,
    ) -> AsyncIterator[tuple[Shown, Shown]]:
        def arguments(session: Session) -> dict[str, Any]:
            (converted,) = repo.named(session, repo_uploads, repo_place)
            return {
                "repo": converted,
                "sources": sources.named(session, uploads, elsewhere),
                "python": None if desk.public else (interpreter or "").strip() or None,
                "image_size": min(max(int(image_size), 64), 512) // 64 * 64,
                "images": bool(whole),
                "folder": os.fspath(session.fresh(RESULTS)),
            }

        steps = desk.work(request.session_hash, "parity", arguments, heavy=True, unit="checks")
        async for step in steps:
            yield step.status, "" if step.result is None else report_page("Parity", step.result)

    action(
        desk,
        "parity",
        "Compare with the source framework",
        run,
        [*repo.components, *sources.components, python, size, images],
    )
    return Tab([repo, sources])
