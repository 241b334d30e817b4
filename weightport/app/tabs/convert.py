"""*Convert*: a plan with its evidence first, then the conversion, and where its result goes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from ...converters.settings import Settings, options
from ...errors import ConversionError
from ...hub.secrets import remember
from ...reports.page import render
from ..desk import Desk
from ..framework import gr
from ..gate import address
from ..options import (
    ALWAYS,
    OptionField,
    field,
    given,
    option_fields,
    shown_evidence,
)
from ..sessions import Session
from ..sources import SourceField, where
from ..widgets import EVENT, Shown, Tab, explained, live
from .convert_result import ResultFields

_OUT = "out"


class ConvertTab:
    """The fields of the tab, and what its buttons do."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        explained(
            "First look at the plan: it says what the files are, what would be written and what is"
            " left to choose. Then convert."
        )
        self.sources = SourceField(desk, "Files", "convert")
        self._base = gr.Textbox(
            label=f"Base, for what the files lack: {where(desk)}, or the name of an upload",
            elem_id="convert-base",
        )
        with gr.Row():
            described = options(Settings)
            self._always = {name: field(name, described[name]) for name in ALWAYS}
        self._plan = gr.Button("1. Show the plan (writes nothing)", elem_id="convert-plan")
        self._planned = live("convert-planned")
        self._evidence = gr.HTML(elem_id="convert-evidence")
        self._all = gr.Checkbox(label="Show all options", elem_id="convert-all")
        self._fields = option_fields()
        self._result = ResultFields(desk)
        with gr.Row():
            self._run = gr.Button("2. Convert", variant="primary", elem_id="convert-run")
            self._cancel = gr.Button("Cancel", variant="stop", elem_id="convert-cancel")
        self._status = live("convert-status")
        self._converted = gr.HTML(elem_id="convert-result")
        self._connect()

    def _connect(self) -> None:
        inputs = [
            *self.sources.components,
            self._base,
            *self._always.values(),
            *(one.component for one in self._fields),
        ]
        groups = [part for one in self._fields for part in (one.group, one.evidence)]
        self._asked = gr.State([])  # options that the evidence leaves open
        self._seen = gr.State()  # what the plan on the page is of
        self._plan.click(
            self._show_plan,
            [self._all, *inputs],
            [self._planned, self._evidence, self._asked, self._seen, *groups],
            **EVENT,
        )
        self._all.change(
            self._show_options,
            [self._all, self._asked],
            [one.group for one in self._fields],
            **EVENT,
        )
        self.converted = self._run.click(
            self._convert,
            [self._seen, *self._result.components, *inputs],
            [self._status, self._converted, self._result.token],
            **EVENT,
        )
        self._cancel.click(self._stop, [], [], **EVENT)

    def _asks(self, session: Session, values: tuple[Any, ...]) -> dict[str, Any]:
        """What the fields ask for, as the tasks take it."""
        uploads, elsewhere, base, *rest = values
        chosen = dict(zip(self._always, rest, strict=False))
        others = rest[len(chosen) :]
        names = [one.name for one in self._fields]
        asked = given(self._fields, dict(zip(names, others, strict=True)))
        sources = self.sources.named(session, uploads, elsewhere)
        base = (base or "").strip()
        place = self._desk.place(base) if base and base not in session.files else base or None
        return {"sources": sources, "base": place, "options": {**chosen, **asked}}

    async def _show_plan(
        self, request: gr.Request, all_shown: bool, *values: Any
    ) -> AsyncIterator[tuple[Shown, ...]]:
        asks: dict[str, Any] = {}

        def arguments(session: Session) -> Mapping[str, Any]:
            asks.update(self._asks(session, values))
            return asks

        async for step in self._desk.work(request.session_hash, "plan", arguments):
            if step.result is None:
                unchanged = [gr.skip() for _ in range(3 + 2 * len(self._fields))]
                yield (step.status, *unchanged)
                continue
            questions = step.result["questions"]
            groups = [part for one in self._fields for part in _asked(one, questions, all_shown)]
            page = render("app/plan.html", **step.result)
            seen = None if step.result["error"] else asks
            yield (step.status, page, list(questions), seen, *groups)

    def _show_options(self, all_shown: bool, asked: list[str]) -> list[Shown]:
        return [gr.update(visible=all_shown or one.name in asked) for one in self._fields]

    async def _convert(
        self, request: gr.Request, oauth: gr.OAuthToken | None, seen: Any, *values: Any
    ) -> AsyncIterator[tuple[Shown, ...]]:
        count = len(self._result.components)
        wanted = self._result.wanted(values[:count], oauth.token if oauth else None)
        remember(wanted.token)

        def arguments(session: Session) -> Mapping[str, Any]:
            asked = self._asks(session, values[count:])
            if asked != seen:
                raise ConversionError("look at the plan of just these choices first")
            session.forget(_OUT)
            folder = session.folder / _OUT
            return {**asked, **wanted.arguments(session, folder)}

        steps = self._desk.work(
            request.session_hash, "convert", arguments, heavy=True, token=wanted.token
        )
        session = self._desk.sessions.of(request.session_hash)
        try:
            async for step in steps:
                if step.result is not None and "file" in step.result:
                    session.keep(Path(step.result["file"]))
                page = "" if step.result is None else _result_page(step.result, wanted.folder)
                yield step.status, page, ""
        finally:
            session.forget(_OUT)

    def _stop(self, request: gr.Request) -> None:
        self._desk.cancel(request.session_hash)


def _asked(one: OptionField, questions: Mapping[str, list[str]], all_shown: bool) -> list[Shown]:
    """Whether an option is shown, and the evidence beside it."""
    sentences = questions.get(one.name, [])
    evidence = shown_evidence(sentences) if sentences else ""
    return [gr.update(visible=all_shown or bool(sentences)), evidence]


def _result_page(result: Mapping[str, Any], folder: str | None) -> str:
    """What was converted, with what to do with it."""
    packed = Path(result["file"]) if "file" in result else None
    return render(
        "app/converted.html",
        lines=result["lines"],
        address=address(packed) if packed else None,
        name=packed.name if packed else None,
        nbytes=packed.stat().st_size if packed else 0,
        folder=folder,
        url=result.get("url"),
        pushed=result.get("pushed"),
        warnings=result.get("warnings", []),
    )


def add(desk: Desk) -> Tab:
    """Draw the tab."""
    drawn = ConvertTab(desk)
    return Tab([drawn.sources], [drawn.converted])
