"""What a browser may ask the server for: the page, its events, uploads, and what its own visit
made. Everything else that Gradio can answer is refused, its endpoints for files among it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .limits import Limits
from .sessions import RESULTS, Sessions

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

_API = "/gradio_api"
_UPLOAD = f"{_API}/upload"
_OPEN = re.compile(
    "/|/(config|theme.css|favicon.ico|manifest.json|robots.txt)/?|/(assets|static|svelte)/.*"
    "|/(login|logout)(/.*)?"
    f"|{_API}/(startup-events|app_id|upload|upload_progress|cancel|queue/(join|data))"
    rf"|{_API}/heartbeat/\w+"
)
_LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")
_SHOWN = {".png": "image/png", ".html": "text/html"}  # in the page itself
_AS_DATA = {  # nothing in a result runs or fetches anything
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "private, no-store",
    "Content-Security-Policy": "sandbox; default-src 'none'; img-src data:;"
    " style-src 'unsafe-inline'; font-src data:",
}
_RESERVE = 1_000_000_000  # bytes of the disk that uploads leave free
_LONGEST_EVENT = 4 << 20  # bytes of what the page sends of its fields


class Gate:
    """Stands before Gradio as a layer of the web server.

    Args:
        application: what is behind it.
        public: whether others than this machine's user can reach the server.
    """

    def __init__(
        self, application: Application, sessions: Sessions, limits: Limits, public: bool
    ) -> None:
        self._application = application
        self._sessions = sessions
        self._limits = limits
        self._public = public

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or let it through."""
        if scope["type"] == "lifespan":
            await self._application(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, *refusal)
        elif scope["path"].startswith(f"/{RESULTS}/"):
            await self._give(scope, receive, send)
        elif scope["path"] == _UPLOAD:
            await self._application(scope, receive, _Arrivals(self._sessions, send))
        else:
            await self._application(scope, receive, send)

    def _refusal(self, scope: Message, headers: dict[bytes, str]) -> tuple[int, str] | None:
        """Status and reason, if a request is not to be answered."""
        # another page that the user has open could find its way here by the name of its own host
        if not self._public and not _LOOPBACK.fullmatch(headers.get(b"host", "")):
            return 403, "this page is for this machine alone"
        path = scope["path"]
        if not _OPEN.fullmatch(path) and not path.startswith(f"/{RESULTS}/"):
            return 404, "there is nothing here"
        if scope["method"] != "POST":
            return None
        length = headers.get(b"content-length", "")
        if not length.isdecimal():
            return 411, "say how long it is"
        if path != _UPLOAD:
            return (413, "too long") if int(length) > _LONGEST_EVENT else None
        if int(length) > self._limits.session_bytes:
            return 413, "too large"
        if shutil.disk_usage(self._sessions.root).free - int(length) < _RESERVE:
            return 507, "the disk is full; try again later"
        return None

    async def _give(self, scope: Message, receive: Receive, send: Send) -> None:
        """A result, to who knows its name."""
        from starlette.responses import FileResponse

        path = self._sessions.result(scope["path"].removeprefix(f"/{RESULTS}/").split("/"))
        if path is None or scope["method"] not in ("GET", "HEAD"):
            await _answer(send, 404, "there is nothing here")
            return
        shown = _SHOWN.get(path.suffix) if scope["query_string"] == b"shown" else None
        response = FileResponse(
            path,
            media_type=shown or "application/octet-stream",
            filename=path.name,
            content_disposition_type="inline" if shown else "attachment",
            headers=_AS_DATA,
        )
        await response(scope, receive, send)


class _Arrivals:
    """Takes what was uploaded out of the places that Gradio gives files, which those who know
    their content can name, to one that nobody can guess, and answers with that."""

    def __init__(self, sessions: Sessions, send: Send) -> None:
        self._sessions = sessions
        self._send = send
        self._start: Message = {}
        self._body = b""

    async def __call__(self, message: Message) -> None:
        """Take a piece of Gradio's answer; sends it when it is whole."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        if self._start["status"] == 200:
            self._body = json.dumps([self._moved(path) for path in json.loads(self._body)]).encode()
        kept = [pair for pair in self._start["headers"] if pair[0].lower() != b"content-length"]
        length = str(len(self._body)).encode()
        await self._send({**self._start, "headers": [*kept, (b"content-length", length)]})
        await self._send({"type": "http.response.body", "body": self._body})

    def _moved(self, path: str) -> str:
        return str(self._sessions.arrived(Path(path)))


def address(path: Path) -> str:
    """The address of a result, from the page."""
    session, _, secret, name = path.parts[-4:]
    return quote(f"{RESULTS}/{session}/{secret}/{name}")


async def _answer(send: Send, status: int, reason: str) -> None:
    body = reason.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
