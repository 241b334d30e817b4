"""Work in processes of its own, in the order in which it came.

A process gives its memory back, can be stopped, and takes nothing with it when a file makes it
fail. What goes to it and comes back is JSON, a line each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConversionError
from .limits import Limits
from .sessions import Session

_TICK = 0.25  # seconds between two looks
_PATIENCE = 20  # seconds that a process gets to tidy up
_LONGEST_LINE = 64 << 20  # bytes of an answer
PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Progress:
    """How a job goes on.

    Attributes:
        ahead: jobs that come before it; 0 once it runs.
        done: units done, of `total`; 0 of 0 before it says anything.
    """

    ahead: int = 0
    done: int = 0
    total: int = 0


class Queue:
    """Jobs that run one at a time, or a few, first come first served."""

    def __init__(self, waiting: int, width: int = 1) -> None:
        self._waiting = waiting
        self._width = width
        self._jobs: deque[Job] = deque()

    def join(self, job: Job) -> None:
        """Stand in the queue.

        Raises:
            ConversionError: it is full.
        """
        if len(self._jobs) >= self._width + self._waiting:
            raise ConversionError(f"{self._waiting} jobs wait already; try again later")
        self._jobs.append(job)

    def ahead(self, job: Job) -> int:
        """How many come before a job until it may run."""
        return max(self._jobs.index(job) - self._width + 1, 0)

    def leave(self, job: Job) -> None:
        """Let the next one have its turn."""
        with contextlib.suppress(ValueError):
            self._jobs.remove(job)


@dataclass(eq=False)
class Job:
    """One task of a session.

    Attributes:
        task: its name in `tasks.TASKS`.
        arguments: of the task, for JSON.
        token: of the visitor, for the Hub; it is in the process of the job and nowhere else.
        result: what it answered, at the end.
    """

    session: Session
    task: str
    arguments: Mapping[str, Any]
    token: str | None = field(default=None, repr=False)
    result: dict[str, Any] = field(default_factory=dict)
    _cancelled: bool = False

    def cancel(self) -> None:
        """Have it end as soon as it can."""
        self._cancelled = True

    async def run(
        self, queue: Queue, limits: Limits, environment: Mapping[str, str]
    ) -> AsyncIterator[Progress]:
        """Wait for its turn, work, and say how it goes; `result` is there at the end.

        Raises:
            ConversionError: the task failed, was cancelled, or took more than it may.
        """
        if self.session.job is not None:
            raise ConversionError("your page is busy with another job; cancel that, or wait")
        queue.join(self)
        self.session.job = self
        try:
            while ahead := queue.ahead(self):
                self._check()
                yield Progress(ahead)
                await asyncio.sleep(_TICK)
            async for progress in self._work(limits, environment):
                yield progress
        finally:
            queue.leave(self)
            self.session.job = None

    def _check(self) -> None:
        if self._cancelled:
            raise ConversionError("cancelled; nothing was left behind")

    async def _work(
        self, limits: Limits, environment: Mapping[str, str]
    ) -> AsyncIterator[Progress]:
        self._check()
        # -P: what lies in the folder it works in is data, whatever its name
        command = [sys.executable, "-P", "-m", "weightport.app.worker"]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=self.session.uploads,
            env=_with_weightport(environment),
            limit=_LONGEST_LINE,
        )
        started = time.monotonic()
        answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        reader = asyncio.create_task(_read(process, answers))
        try:
            request = {"task": self.task, "arguments": self.arguments, "token": self.token}
            await _tell(process, request)
            self.token = None
            yield Progress()
            while not (reader.done() and answers.empty()):
                self._check()
                if time.monotonic() - started > limits.seconds:
                    raise ConversionError(
                        f"it took more than {limits.seconds} seconds, which is the limit here"
                    )
                if self.session.nbytes() > limits.session_bytes:
                    raise ConversionError(
                        f"it takes more than {limits.session_bytes} bytes, which is the limit here"
                    )
                if progress := await _latest(answers, self.result):
                    yield progress
            self._conclude(await process.wait())
        finally:
            reader.cancel()
            await _stop(process)

    def _conclude(self, status: int) -> None:
        """Raise what the process said was wrong, or why it said nothing."""
        if "error" in self.result:
            raise ConversionError(str(self.result["error"]))
        if status < 0:
            raise ConversionError(
                f"the process was ended by signal {-status}: is there enough memory?"
            )
        if not self.result:
            raise ConversionError(f"the process ended with status {status} and no answer")


async def _tell(process: asyncio.subprocess.Process, request: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(json.dumps(request).encode() + b"\n")
        await process.stdin.drain()
        process.stdin.close()


async def _read(
    process: asyncio.subprocess.Process, answers: asyncio.Queue[dict[str, Any]]
) -> None:
    """Queue the lines that a process writes, until it ends."""
    assert process.stdout is not None
    async for line in process.stdout:
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict):
                await answers.put(answer)


async def _latest(
    answers: asyncio.Queue[dict[str, Any]], result: dict[str, Any]
) -> Progress | None:
    """The newest progress within a tick; an answer other than that goes into the result."""
    await asyncio.sleep(_TICK)
    found = None
    while not answers.empty():
        answer = answers.get_nowait()
        if "progress" in answer:
            done, total = answer["progress"]
            found = Progress(0, int(done), int(total))
        else:
            result.update(answer)
    return found


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End a process that has not ended, politely first: it removes what it began to write."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _PATIENCE)
    except TimeoutError:
        process.kill()
        await process.wait()


def _with_weightport(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which this very package is found, and nothing in the current folder."""
    others = environment.get("PYTHONPATH", "").split(os.pathsep)
    path = [str(PACKAGE), *(str(Path(other).absolute()) for other in others if other)]
    return {**environment, "PYTHONPATH": os.pathsep.join(path)}
