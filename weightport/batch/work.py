"""Gives jobs to workers and takes their outcomes, whatever becomes of a worker."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Future
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

from ..errors import one_line
from . import outcome as said
from .jobs import Job
from .outcome import Outcome
from .records import clear
from .run import run
from .workers import Workers

_INTERVAL = 0.2  # seconds between two looks at what is running


@dataclass(frozen=True)
class _Try:
    """A job that is given to a worker.

    Attributes:
        tries: how often it was tried before.
        waits: for another batch that is at it.
        is_suspect: whether it ran when a worker died.
    """

    job: Job
    tries: int = 0
    waits: bool = False
    is_suspect: bool = False


class _Work:
    """Jobs on their way.

    What other batches do comes when there is nothing else to do; then what may have killed a
    worker, each job alone, so that it is known which one does.
    """

    def __init__(self, jobs: Sequence[Job], workers: Workers, retries: int, dry_run: bool) -> None:
        self.workers = workers
        self.retries = max(0, retries - workers.retries)
        self.dry_run = dry_run
        self.fresh = deque(_Try(job) for job in jobs)
        self.waiting = deque[_Try]()
        self.suspects = deque[_Try]()
        self.running: dict[Future[Outcome], _Try] = {}
        self.finished = SimpleQueue[Future[Outcome]]()

    @property
    def is_left(self) -> bool:
        """Whether there is anything to do or to wait for."""
        return bool(self.fresh or self.waiting or self.suspects or self.running)

    def give(self) -> None:
        """Give the workers all that they have room for."""
        while len(self.running) < self.workers.room and (one := self._next()) is not None:
            try:
                raises = self.workers.retries > 0
                future = self.workers.submit(_run, one.job, self.dry_run, one.waits, raises)
            except BrokenExecutor:
                self.fresh.appendleft(one)
                if not self.running:  # else what was running says so
                    self.workers.renew()
                return
            self.running[future] = one
            future.add_done_callback(self.finished.put)

    def _next(self) -> _Try | None:
        is_alone = any(one.is_suspect for one in self.running.values())
        if is_alone:
            return None
        for queue in (self.fresh, self.waiting):
            if queue:
                return queue.popleft()
        return self.suspects.popleft() if self.suspects and not self.running else None

    def take(self) -> Iterator[Outcome]:
        """The outcomes that have come, if any has within a moment."""
        try:
            future = self.finished.get(timeout=_INTERVAL)
        except Empty:
            return
        one = self.running.pop(future, None)
        if one is None:  # of workers that have died since
            return
        try:
            found = _outcome(future)
        except BrokenExecutor:
            self.running[future] = one
            yield from self._lost()
        except CancelledError:
            yield _failed(one.job, "the workers were stopped; run it again to go on")
        except Exception as error:
            yield _failed(one.job, f"its workers ended without an answer: {one_line(error)}")
        else:
            if found.status == said.BUSY:
                self.waiting.append(replace(one, waits=True))
            elif found.may_pass and one.tries < self.retries:
                self.fresh.append(replace(one, tries=one.tries + 1))
            elif one.tries and found.status == said.DONE:  # by an earlier try
                yield replace(found, status=said.CONVERTED)
            else:
                yield found

    def _lost(self) -> Iterator[Outcome]:
        """What becomes of the jobs that were running, whose workers have died."""
        self.workers.renew()  # who interrupts this finds them still running, to be cleared away
        lost = [*self.running.values()]
        self.running.clear()
        for one in lost:
            if one.is_suspect:
                clear(one.job)
                yield _failed(
                    one.job, "its process was killed, twice; is there enough memory? (--memory)"
                )
            else:
                self.suspects.append(replace(one, is_suspect=True))


class _MayPass(Exception):
    """What makes a scheduler try a job again; holds its outcome."""


def _run(job: Job, dry_run: bool, waits: bool, raises: bool) -> Outcome:
    """Do a job.

    Raises:
        _MayPass: what went wrong may pass, and whoever called tries again then.
    """
    found = run(job, dry_run=dry_run, wait=waits)
    if raises and found.may_pass:
        raise _MayPass(found)
    return found


def _outcome(future: Future[Outcome]) -> Outcome:
    try:
        return future.result()
    except _MayPass as error:
        found: Outcome = error.args[0]
        return found


def _failed(job: Job, error: str) -> Outcome:
    return Outcome(job.name, said.FAILED, sources=job.sources, error=f"{job.name}: {error}")


def work(
    jobs: Sequence[Job],
    workers: Workers,
    *,
    retries: int,
    dry_run: bool,
    watch: Callable[[Collection[Job]], None],
) -> Iterator[Outcome]:
    """The outcome of each job, as they come.

    Args:
        retries: how often a job is tried again where what went wrong may pass.
        watch: called again and again with the jobs that workers have.
    """
    going = _Work(jobs, workers, retries, dry_run)
    try:
        while going.is_left:
            going.give()
            yield from going.take()
            watch([one.job for one in going.running.values()])
    except BaseException:
        workers.stop()
        for one in (*going.running.values(), *going.suspects):
            clear(one.job)
        raise
