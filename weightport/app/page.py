"""The page: a heading, the visitor's uploads, and the tabs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConversionError
from ..reports.page import render
from .desk import Desk, problem
from .framework import gr
from .sessions import Session
from .sources import NONE
from .tabs import compare, convert, images, inspect, parity, schedulers
from .widgets import EVENT, Shown, Tab, explained, live

TABS: dict[str, Callable[[Desk], Tab]] = {
    "Inspect": inspect.add,
    "Convert": convert.add,
    "Compare": compare.add,
    "Parity": parity.add,
    "Try it": images.add,
    "Schedulers": schedulers.add,
}
"""Title -> what draws the tab."""

_TICK = "Tick what to use."


def build(desk: Desk) -> gr.Blocks:
    """The page of a desk, not served yet."""
    page = gr.Blocks(title="weightport", analytics_enabled=False)
    with page:
        gr.HTML(render("app/heading.html", limits=desk.limits, public=desk.public))
        if desk.logs_in:
            explained(
                "Log in to push to the Hub without typing a token. That loads this page anew, and"
                " what you keep here is deleted, so do it first."
            )
            gr.LoginButton(elem_id="login")
        upload = gr.File(
            file_count="multiple",
            label="Upload files",
            elem_id="upload",
            height=140,
        )
        shelf = live("shelf")
        clear = gr.Button("Delete all that I keep here", size="sm", elem_id="clear")
        drawn = []
        with gr.Tabs():
            for title, add in TABS.items():
                with gr.Tab(title, elem_id=f"tab-{title.lower().replace(' ', '-')}"):
                    drawn.append(add(desk))
        choices = [field.uploads for tab in drawn for field in tab.fields]

        def listed(session: Session) -> list[Shown]:
            """What the visitor keeps, in words and in every field that lists it."""
            said = render("app/uploads.html", files=_sizes(session.files))
            shown = gr.update(choices=list(session.files), info=_TICK if session.files else NONE)
            return [said, *(shown for _ in choices)]

        def take(request: gr.Request, uploads: Any) -> list[Shown]:
            """Give the visitor's session what was just uploaded."""
            session = desk.sessions.of(request.session_hash)
            try:
                for upload in uploads if isinstance(uploads, list) else ():
                    desk.sessions.take(session, str(upload["path"]))
                if session.nbytes() > desk.limits.session_bytes:
                    session.clear()
                    raise ConversionError("that is more than you may keep here; all was deleted")
                said, *fields = listed(session)
            except ConversionError as error:
                _, *fields = listed(session)
                said = problem(error)
            return [gr.update(value=None), said, *fields]

        def delete(request: gr.Request) -> list[Shown]:
            """Delete all that the visitor keeps."""
            session = desk.sessions.of(request.session_hash)
            try:
                session.clear()
            except ConversionError as error:
                _, *fields = listed(session)
                return [problem(error), *fields]
            return listed(session)

        def relist(request: gr.Request) -> list[Shown]:
            """List what a job added."""
            return listed(desk.sessions.of(request.session_hash))

        def leave(request: gr.Request) -> None:
            """Delete what the visitor kept."""
            desk.sessions.close(request.session_hash)

        lists = [shelf, *choices]
        upload.upload(take, [upload], [upload, *lists], preprocess=False, **EVENT)
        clear.click(delete, [], lists, **EVENT)
        for event in (event for tab in drawn for event in tab.makes):
            event.then(relist, [], lists, **EVENT)
        page.unload(leave)
    return page


def _sizes(files: dict[str, Path]) -> dict[str, int]:
    return {name: path.stat().st_size for name, path in files.items()}
