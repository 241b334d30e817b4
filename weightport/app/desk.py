"""Where the tabs hand in their work: it finds the visitor's session, queues the job, and says how
it goes."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConversionError, one_line, printable
from ..hub.secrets import hide
from ..pull import Reference
from ..reports.page import render
from .jobs import Job, Progress, Queue
from .limits import Limits
from .sessions import Session, Sessions

_SECRET = re.compile("TOKEN|SECRET|PASSWORD|KEY|CREDENTIAL|^HF_HOME$|CACHE")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
_QUICK = 2  # jobs that only look, at once


@dataclass(frozen=True)
class Step:
    """How work goes on.

    Attributes:
        status: for the page, escaped.
        result: what the task answered, at the end; None before, and when it failed.
        ended: whether this is the last step.
    """

    status: str
    result: dict[str, Any] | None = None
    ended: bool = False


class Desk:
    """What all tabs of a server share.

    Attributes:
        public: whether others than this machine's user can reach the server.
        logs_in: whether visitors can log in to the Hub here.
    """

    def __init__(
        self, sessions: Sessions, limits: Limits, public: bool, logs_in: bool = False
    ) -> None:
        self.sessions = sessions
        self.limits = limits
        self.public = public
        self.logs_in = logs_in
        self._heavy = Queue(limits.waiting)
        self._quick = Queue(limits.waiting, width=_QUICK)

    async def work(
        self,
        key: str | None,
        task: str,
        arguments: Callable[[Session], Mapping[str, Any]],
        *,
        heavy: bool = False,
        token: str | None = None,
        unit: str = "bytes",
    ) -> AsyncIterator[Step]:
        """Do a task of `tasks.TASKS` for the page of a key; what goes wrong is a status.

        Args:
            arguments: makes the task's arguments, of what the session has.
            heavy: only one such task runs at a time.
            unit: what the progress counts.
        """
        try:
            session = self.sessions.of(key)
            job = Job(session, task, arguments(session), token)
            queue = self._heavy if heavy else self._quick
            yield Step(waiting(Progress(), unit))
            async for progress in job.run(queue, self.limits, self._environment(session)):
                yield Step(waiting(progress, unit))
            yield Step(done(), job.result["result"], ended=True)
        except (ConversionError, OSError) as error:
            yield Step(problem(error), ended=True)

    def cancel(self, key: str | None) -> None:
        """Stop what runs or waits for the page of a key."""
        session = self.sessions.of(key)
        if session.job is not None:
            session.job.cancel()

    def place(self, text: str) -> str:
        """What a visitor names, as a task takes it: something on the Hub, or, on this machine
        alone, a path.

        Raises:
            ConversionError: it is neither.
        """
        text = text.strip()
        path = Path(text).expanduser()
        if not self.public and not text.startswith("hub:") and path.exists():
            return str(path.absolute())
        reference = Reference.parse(text)
        if reference is not None:
            return str(reference)
        what = "not a Hub id (owner/name, or owner/name@revision/file)"
        if self.public:
            raise ConversionError(f"{printable(text)}: {what}; files of this server are not read")
        raise ConversionError(f"{printable(text)}: no such file or folder, and {what}")

    def _environment(self, session: Session) -> dict[str, str]:
        """The variables of a job's process; of strangers without the server's own secrets and
        caches."""
        own = dict(os.environ)
        if self.public:
            own = {name: value for name, value in own.items() if not _SECRET.search(name)}
            own["HF_HOME"] = str(session.folder / "hub")
        temporary = session.folder / "temporary"
        temporary.mkdir(exist_ok=True)
        return {**own, "TMPDIR": str(temporary)}


def output_name(text: str) -> str:
    """A name for a result.

    Raises:
        ConversionError: it is no plain name.
    """
    if not _NAME.fullmatch(text.strip()):
        raise ConversionError(
            f"{printable(text)}: not a name for a result; use letters, digits, dots and dashes"
        )
    return text.strip()


# --- for the page, escaped ------------------------------------------------------------------------


def waiting(progress: Progress, unit: str) -> str:
    """How a job goes on."""
    return render("app/progress.html", progress=progress, unit=unit)


def done() -> str:
    """That a job is done."""
    return render("app/done.html")


def problem(error: Exception) -> str:
    """What went wrong, in the line that the command would print."""
    return render("app/problem.html", line=hide(one_line(error)))
