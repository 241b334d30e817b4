"""`weightport batch`."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..converters.settings import Settings, options
from ..io.sizes import parse_size
from . import without_blas
from .options import add_options, given
from .terminal import print_result
from .values import natural, positive

if TYPE_CHECKING:
    from ..batch.jobs import Job
    from ..batch.outcome import Outcome
    from ..batch.workers import Workers

_SAVED = 10  # seconds between two writings of the reports


def add(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes to its parser."""
    from ..batch.jobs import Steps

    parser.description = (
        "Convert many checkpoints. What is done already is skipped, and one that fails stops no"
        " other; run it again to go on. Exit status 1 if any has failed."
    )
    option = parser.add_argument
    option(
        "jobs",
        nargs="+",
        metavar="JOBS",
        help="folders, globs, hub: names, or lists of jobs: .toml, .jsonl, .csv, .txt of Hub ids",
    )
    option(
        "-o",
        "--output",
        required=True,
        metavar="FOLDER",
        help="gets the results, batch.json, batch.csv and batch.html",
    )
    option("--workers", type=positive, metavar="N", help="default: what cores and memory allow")
    option(
        "--memory",
        type=parse_size,
        metavar="SIZE",
        help="that a job takes (default: 512MB, with --parity 16GB); of Dask, a worker's resource",
    )
    option("--dask", metavar="ADDRESS", help="of a scheduler, or local: the workers of a cluster")
    option(
        "--retries",
        type=natural,
        default=2,
        metavar="N",
        help="of a job whose connection failed or whose worker died (default: 2)",
    )
    option("--retry-failed", action="store_true", help="do only what failed last time")
    add_options(parser, Steps)
    add_options(parser, Settings)
    option("-q", "--quiet", action="store_true", help="print errors only")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    without_blas()
    from ..batch.report import table, to_dict, write_reports

    folder = Path(arguments.output).expanduser().absolute()
    jobs, notes = _jobs(arguments, folder)
    before: list[Outcome] = []
    if arguments.retry_failed:
        jobs, before = _failed_before(jobs, folder)
    found = {one.name: one for one in before}
    try:
        for outcome in _done(arguments, jobs, found, folder):
            found[outcome.name] = outcome
    finally:
        if not arguments.dry_run and found:
            notes += write_reports(folder, [*found.values()])
    outcomes = sorted(found.values(), key=lambda one: one.name)
    lines = [*table(outcomes), *(f"note: {note}" for note in notes)]
    if not arguments.dry_run:
        lines.append(f"wrote {folder}/batch.json")
    print_result(lambda: to_dict(outcomes), lines, arguments)
    return 1 if any(one.is_bad for one in outcomes) else 0


def _jobs(arguments: argparse.Namespace, folder: Path) -> tuple[list[Job], list[str]]:
    """The jobs, and what is to be said of those that are none."""
    from .. import __version__
    from ..batch.gather import gather
    from ..batch.jobs import Steps, absolute, placed

    typed = {**given(arguments, Settings), **given(arguments, Steps)}
    defaults = {**options(Settings), **options(Steps)}
    common = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in typed.items()
        if value not in (defaults[name].typed, [])
    }
    common.pop("dry_run", None)
    entries, notes = gather(arguments.jobs, folder)
    return placed(entries, folder, absolute(common, Path.cwd()), __version__), notes


def _failed_before(jobs: Sequence[Job], folder: Path) -> tuple[list[Job], list[Outcome]]:
    """The jobs that failed in the last batch, and what came of the others."""
    from ..batch.report import read_outcomes
    from ..errors import printable

    names = {printable(job.name, 10_000): job for job in jobs}
    before = [one for one in read_outcomes(folder) if one.name in names]
    failed = [names[one.name] for one in before if one.is_bad]
    return failed, [one for one in before if not one.is_bad]


def _done(
    arguments: argparse.Namespace, jobs: Sequence[Job], found: dict[str, Outcome], folder: Path
) -> Iterator[Outcome]:
    """The outcomes, as they come; from time to time the reports are written."""
    from ..batch.report import write_reports
    from ..batch.work import work

    if not jobs:
        return
    saved = time.monotonic()
    with _workers(arguments, jobs) as workers, _bars(arguments, len(jobs)) as bars:
        for outcome in work(
            jobs,
            workers,
            retries=arguments.retries,
            dry_run=arguments.dry_run,
            watch=bars.show if bars else lambda running: None,
        ):
            yield outcome
            if bars:
                bars.step(outcome)
            if not arguments.dry_run and time.monotonic() - saved > _SAVED:
                write_reports(folder, [*found.values()])
                saved = time.monotonic()


def _workers(arguments: argparse.Namespace, jobs: Sequence[Job]) -> AbstractContextManager[Workers]:
    from ..batch.workers import JOB_MEMORY, PARITY_MEMORY, dask, fitting, processes

    needs_models = any(job.steps.parity for job in jobs)
    memory = arguments.memory or (PARITY_MEMORY if needs_models else JOB_MEMORY)
    count = arguments.workers or min(fitting(memory), len(jobs))
    if arguments.dask:
        return dask(arguments.dask, count, arguments.memory, arguments.retries)
    return processes(count)


# --- bars -----------------------------------------------------------------------------------------


class _Bars:
    """One bar for all jobs, and one for each that is running."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._make = tqdm
        self._all = tqdm(total=total, unit=" jobs", leave=False, position=0)
        self._each: dict[str, Any] = {}
        self._failed = 0

    def step(self, outcome: Outcome) -> None:
        """A job has ended."""
        self._failed += outcome.is_bad
        if self._failed:
            self._all.set_postfix_str(f"{self._failed} failed")
        self._all.update()

    def show(self, running: Collection[Job]) -> None:
        """How far the jobs are that are running."""
        from ..batch.records import progress
        from ..errors import printable

        far = {job.name: progress(job) for job in running}
        for name in [name for name in self._each if far.get(name) is None]:
            self._each.pop(name).close()
        for name, place in far.items():
            if place is None:
                continue
            if name not in self._each:
                self._each[name] = self._make(
                    desc=printable(name, 30), unit="B", unit_scale=True, leave=False
                )
            bar = self._each[name]
            bar.n, bar.total = place
            bar.refresh()

    def close(self) -> None:
        """Take all away."""
        for bar in (*self._each.values(), self._all):
            bar.close()


@contextlib.contextmanager
def _bars(arguments: argparse.Namespace, total: int) -> Iterator[_Bars | None]:
    """Bars on a terminal, nothing in a pipe."""
    if arguments.quiet or not sys.stderr.isatty():
        yield None
        return
    bars = _Bars(total)
    try:
        yield bars
    finally:
        bars.close()
