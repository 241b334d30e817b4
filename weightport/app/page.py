"""The page: a heading, the visitor's uploads, and the tabs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConversionError
from ..reports.page import render
from .desk import Desk, problem
from .framework import gr
from .sources import SourceField
from .tabs import convert, inspect
from .widgets import EVENT, Shown, live

TABS: dict[str, Callable[[Desk], list[SourceField]]] = {
    "Inspect": inspect.add,
    "Convert": convert.add,
}
"""Title -> what draws the tab."""


def build(desk: Desk) -> gr.Blocks:
    """The page of a desk, not served yet."""
    page = gr.Blocks(title="weightport", analytics_enabled=False)
    with page:
        gr.HTML(render("app/heading.html", limits=desk.limits, public=desk.public))
        upload = gr.File(
            file_count="multiple",
            label="Upload files",
            elem_id="upload",
            height=140,
        )
        shelf = live("shelf")
        fields: list[SourceField] = []
        with gr.Tabs():
            for title, add in TABS.items():
                with gr.Tab(title, elem_id=f"tab-{title.lower().replace(' ', '-')}"):
                    fields += add(desk)
        choices = [field.uploads for field in fields]

        def take(request: gr.Request, uploads: Any) -> list[Shown]:
            """Give the visitor's session what was just uploaded."""
            session = desk.sessions.of(request.session_hash)
            try:
                for upload in uploads if isinstance(uploads, list) else ():
                    desk.sessions.take(session, str(upload["path"]))
                if session.nbytes() > desk.limits.session_bytes:
                    raise ConversionError(
                        "you keep more here than one visitor may; reload the page"
                    )
                said = render("app/uploads.html", files=_sizes(session.files))
            except ConversionError as error:
                said = problem(error)
            shown = gr.update(choices=list(session.files), info="Tick what to use.")
            return [gr.update(value=None), said, *(shown for _ in choices)]

        upload.upload(take, [upload], [upload, shelf, *choices], preprocess=False, **EVENT)

        def leave(request: gr.Request) -> None:
            """Delete what the visitor kept."""
            desk.sessions.close(request.session_hash)

        page.unload(leave)
    return page


def _sizes(files: dict[str, Path]) -> dict[str, int]:
    return {name: path.stat().st_size for name, path in files.items()}
