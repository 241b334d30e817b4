"""The client of the Hub, with its answers checked before it makes paths of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urljoin, urlsplit

from ..errors import printable
from .secrets import hide

LONGEST_WAIT = 20
"""Seconds that the Hub may ask to wait before a second try."""

LONGEST_SILENCE = 120
"""Seconds after which a server that says nothing is given up; downloads are tried again after the
client's own `HF_HUB_DOWNLOAD_TIMEOUT`, ten by default, five times."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"\w[\w.-]{0,199}", re.ASCII)
_PART = re.compile(r"bytes=(\d{1,18})-(\d{1,18})", re.ASCII)
_LISTS = re.compile(r"/api/models/[^?]+")


class UntrustedAnswer(ValueError):
    """An answer that no Hub gives; what it asks for is not done."""


def guard() -> None:
    """Have every answer checked that `huggingface_hub` gets from now on in this process, and what
    it logs printed without secrets."""
    from huggingface_hub.utils import _http

    http: Any = _http
    if hasattr(http, "set_client_factory"):
        made, replace = http._GLOBAL_CLIENT_FACTORY, http.set_client_factory
    else:  # before 1.0
        made, replace = http._GLOBAL_BACKEND_FACTORY, http.configure_http_backend
    if not isinstance(made, _Guarded):
        replace(_Guarded(made))
    for handler in logging.getLogger("huggingface_hub").handlers:
        if not any(isinstance(one, _WithoutSecrets) for one in handler.filters):
            handler.addFilter(_WithoutSecrets())


class _Guarded:
    """Makes sessions as another factory does, whose answers are checked."""

    def __init__(self, factory: Callable[[], Any]) -> None:
        self._factory = factory

    def __call__(self) -> Any:
        session = self._factory()
        if not hasattr(session, "event_hooks"):  # of requests, before 1.0
            session.hooks["response"].append(check_answer)
            return session
        session.event_hooks["response"].append(check_answer)
        if session.timeout.read is None:
            session.timeout = LONGEST_SILENCE
        return session


class _WithoutSecrets(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Replace secrets in what a record says."""
        record.msg = hide(record.getMessage())
        record.args = ()
        return True


def check_answer(response: Any, **_: Any) -> None:
    """Check what the client makes paths and waits of.

    Raises:
        UntrustedAnswer: a commit, an ETag, a redirect, a name of a file or a time to wait is none,
            or more comes than was asked for.
    """
    headers = response.headers
    asked = str(response.url)
    if (commit := headers.get("X-Repo-Commit")) and not _COMMIT.fullmatch(commit):
        raise UntrustedAnswer(_refused("commit", commit))
    tags = [headers.get("X-Linked-ETag")]
    if response.request.method == "HEAD":
        tags.append(headers.get("ETag"))
    for tag in filter(None, tags):
        if not _ETAG.fullmatch(tag.lstrip("W/").strip('"')):
            raise UntrustedAnswer(_refused("ETag", tag))
    if place := headers.get("Location"):
        _check_redirect(asked, place)
    if response.status_code == 429 or response.status_code >= 500:
        _check_wait(headers)
    if part := _PART.fullmatch(response.request.headers.get("Range") or ""):
        _check_part(response, int(part[2]) - int(part[1]) + 1)
    path = urlsplit(asked).path
    if response.request.method == "GET" and response.status_code == 200 and _LISTS.match(path):
        _check_lists(response)


def _check_redirect(asked: str, place: str) -> None:
    target = urlsplit(urljoin(asked, place))
    downgraded = urlsplit(asked).scheme == "https" and target.scheme != "https"
    if target.scheme not in ("http", "https") or downgraded or not target.netloc:
        raise UntrustedAnswer(_refused("redirect", place))


def _check_wait(headers: Any) -> None:
    asked = [headers.get("Retry-After") or ""]
    asked += re.findall(r";\s*t=(\d+)", headers.get("RateLimit") or "")
    for seconds in asked:
        if seconds.isdecimal() and (len(seconds) > 9 or int(seconds) > LONGEST_WAIT):
            raise UntrustedAnswer(
                f"the Hub asks to wait {printable(seconds, 20)} seconds; run it again later"
            )


def _check_part(response: Any, nbytes: int) -> None:
    """Check that no more comes than was asked for."""
    length = response.headers.get("Content-Length", "")
    is_larger = not length.isdecimal() or int(length) > nbytes
    if response.status_code == 200 or (response.status_code == 206 and is_larger):
        raise UntrustedAnswer("its server sends more than the part of a file that was asked for")


def _check_lists(response: Any) -> None:
    """Check a commit and names of files in the answer to a question about a repository."""
    try:
        if hasattr(response, "read"):
            response.read()
        content = response.json()
    except (ValueError, RecursionError):
        return  # the client says so
    if isinstance(content, dict) and not _COMMIT.fullmatch(str(content.get("sha", "0" * 40))):
        raise UntrustedAnswer(_refused("commit", content["sha"]))
    for name in _names(content):
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\\" in name or not name.isprintable():
            raise UntrustedAnswer(_refused("file name", name))


def _names(content: Any) -> Iterator[str]:
    entries = content.get("siblings") if isinstance(content, dict) else content
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            yield str(entry.get("rfilename", entry.get("path", "")))


def _refused(what: str, value: object) -> str:
    shown = printable(hide(str(value)), 60)
    return f"its server answers with a {what} that is none (`{shown}`); nothing of it was kept"
