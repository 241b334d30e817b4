"""One job: a function of its description, which any process can run."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import weightport

from ..api import convert, inspect, parity
from ..converters.compare import compare, describe
from ..converters.conversion import Conversion
from ..converters.outputs.ldm_residue import residue_path
from ..converters.settings import Settings
from ..errors import ConversionError, one_line
from ..hub.errors import may_pass
from ..hub.secrets import hide
from ..hub.upload import CARD, commit_address
from ..io.locks import locked
from ..mappings.families import families
from ..mappings.layouts import CANONICAL
from ..pull import at_commit, fetch, fetch_all, glancing
from ..push import push, read_parity, read_report, unverified
from . import outcome as said
from .jobs import HUB, Job
from .outcome import Outcome
from .records import REPORT, Record, as_reported, kept, lock_path, sizes, still_done

_INTERVAL = 0.25  # seconds between two words about progress
_WIDTH = 120  # bytes of what a lock says


def run(job: Job, *, dry_run: bool = False, wait: bool = False) -> Outcome:
    """Do a job; whatever goes wrong is said in what is returned.

    Args:
        dry_run: look and plan, write nothing.
        wait: for another batch that is at the same job; else it is said to be busy.
    """
    started = time.perf_counter()
    try:
        _check_version(job)
        found = _planned(job) if dry_run else _ACTIONS[job.steps.do](job, wait)
    except Exception as error:
        found = _failed(Outcome(job.name, said.FAILED), error)
    seconds = round(time.perf_counter() - started, 3)
    return replace(found, sources=job.sources, seconds=seconds)


def _failed(outcome: Outcome, error: Exception) -> Outcome:
    """The outcome of a job that an error has ended."""
    line = hide(one_line(error))
    return replace(outcome, status=said.FAILED, error=line, may_pass=may_pass(error))


def _check_version(job: Job) -> None:
    here = weightport.__version__
    if here != job.version:
        raise ConversionError(
            f"{socket.gethostname()}: this worker has weightport {here}, and the batch"
            f" {job.version}; install the same everywhere"
        )


# --- converting -----------------------------------------------------------------------------------


@dataclass
class _Told:
    """Tells whoever looks how far a job is, in the file that it has locked."""

    descriptor: int
    done: int = 0
    last: float = 0.0

    def __call__(self, count: int, total: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last >= _INTERVAL:
            self.last = now
            self.say(total)

    def say(self, total: int) -> None:
        """Say how many bytes are done."""
        who = f"{socket.gethostname()}:{os.getpid()}"
        line = f"{self.done} {total} {who}"[: _WIDTH - 1]
        os.pwrite(self.descriptor, f"{line:<{_WIDTH - 1}}\n".encode(), 0)


def _convert(job: Job, wait: bool) -> Outcome:
    """Convert, and do what is asked for besides; unless that is done already."""
    place = lock_path(job)
    place.parent.mkdir(parents=True, exist_ok=True)
    with locked(place, wait) as descriptor:
        if descriptor is None:
            return Outcome(job.name, said.BUSY)
        told = _Told(descriptor)
        told.say(0)
        return _locked(job, told)


def _locked(job: Job, told: _Told) -> Outcome:
    inputs = _Inputs.of(job)
    record = Record.load(job)
    if record is not None and still_done(job, record, inputs.commits):
        outcome = replace(Outcome.from_dict(record.outcome), status=said.DONE, error=None)
    elif (before := _pushed_before(job, inputs)) is not None:
        outcome, record = before
        replace(record, outcome=outcome.to_dict()).save(job)
        return outcome
    else:
        outcome, record = _made(job, inputs, told)
        record = replace(record, outcome=outcome.to_dict())
        record.save(job)
    try:
        if job.steps.parity:
            outcome = _compared(job, inputs, outcome)
        if job.repo_id is not None and not outcome.is_bad:
            outcome, record = _pushed(job, outcome, record)
    except Exception as error:  # what was converted stays, and is said
        return _failed(outcome, error)
    if not outcome.is_bad:
        replace(record, outcome=outcome.to_dict()).save(job)
        if not job.steps.keep:
            _discard(job, record)
    return outcome


def _discard(job: Job, record: Record) -> None:
    """Delete a result that is on the Hub; its record says that it was made."""
    if job.target.is_dir():
        shutil.rmtree(job.target)
    for path in (residue_path(job.target), *(Path(job.folder, name) for name in record.written)):
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Inputs:
    """What a job takes, of the Hub at the commits of now.

    Attributes:
        commits: `hub:` name -> commit.
        pinned: the same -> the names of what it stands for, at this commit.
    """

    job: Job
    commits: Mapping[str, str]
    pinned: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, job: Job) -> _Inputs:
        """Look up the commits of what is on the Hub."""
        found = {name: at_commit(name) for name in job.references}
        commits = {name: str(several[0].revision) for name, several in found.items()}
        pinned = {name: [str(one) for one in several] for name, several in found.items()}
        return cls(job, commits, pinned)

    @property
    def named(self) -> list[str]:
        """The sources; those of the Hub at their commits."""
        return [name for source in self.job.sources for name in self.pinned.get(source, [source])]

    @property
    def sources(self) -> list[Path]:
        """Where the sources lie; those of the Hub are fetched."""
        return [fetch(name) if name.startswith(HUB) else Path(name) for name in self.named]

    @property
    def downloaded(self) -> list[Path]:
        """Where that lies which is of the Hub."""
        return [fetch(name) for several in self.pinned.values() for name in several]

    def convert(self, told: _Told | None = None, *, dry_run: bool = False) -> Conversion:
        """Convert them as the job asks for."""
        base = self.job.steps.base
        if base is not None and base in self.pinned:
            (base,) = self.pinned[base]
        return convert(
            self.sources,
            self.job.target,
            base=base,
            dry_run=dry_run,
            progress=told,
            **self.job.options,
        )


def _made(job: Job, inputs: _Inputs, told: _Told) -> tuple[Outcome, Record]:
    """The conversion: made now, or found as it would be made."""
    target = job.target
    conversion = None
    status = said.CONVERTED
    if (target / REPORT).is_file():
        planned = inputs.convert(dry_run=True)
        if as_reported(planned, target):
            conversion = planned
            status = said.DONE
    if conversion is None:
        if os.path.lexists(target) and not job.options.get("overwrite"):
            raise _in_the_way(job)
        with _folder_for(job):
            conversion = inputs.convert(told)
    downloaded = inputs.downloaded
    record = kept(job, conversion, inputs.commits, inputs.sources, downloaded)
    record = replace(record, written=sizes(job, conversion))
    return _described(job, conversion, status, sum(record.written.values())), record


def _pushed_before(job: Job, inputs: _Inputs) -> tuple[Outcome, Record] | None:
    """The conversion that lies in the Hub's repo for the result and nowhere else, if it would be
    made again the same."""
    repo_id = job.repo_id
    if repo_id is None or job.steps.push_pr or os.path.lexists(job.target):
        return None
    with glancing():
        try:
            place = fetch_all(repo_id)
            report = read_report(place)
            parity = read_parity(place)
        except ConversionError:  # there is none yet, or it is damaged
            return None
        if report is None:
            return None
        planned = inputs.convert(dry_run=True)
        is_proven = not job.steps.parity or unverified(report, parity) is None
        if not is_proven or not as_reported(planned, place, renewed=[CARD]):
            return None
        url = commit_address(repo_id, place.name)
        outcome = _described(job, planned, said.DONE)
        record = kept(job, planned, inputs.commits, inputs.sources, inputs.downloaded)
    parity_passed = True if job.steps.parity else None
    return replace(outcome, pushed=url, parity=parity_passed), replace(
        record, pushed={repo_id: url}
    )


@contextlib.contextmanager
def _folder_for(job: Job) -> Iterator[None]:
    """The folder that the result goes into, which goes again if there is none."""
    folder = job.target.parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        while folder != Path(job.folder):
            with contextlib.suppress(OSError):  # others lie in it
                folder.rmdir()
            folder = folder.parent


def _described(
    job: Job, conversion: Conversion, status: str, written: int | None = None
) -> Outcome:
    """What is to be said of a conversion."""
    parts = []
    for name, component in conversion.components.items():
        for part in component.parts:
            of_which = "" if part.part == name else f" ({part.part})"
            parts.append(f"{name}{of_which}: {part.checkpoint.format}")
    reports = {}
    if (job.target / REPORT).is_file():
        reports = {"conversion": f"{job.output}/{REPORT}"}
    return Outcome(
        job.name,
        status,
        output=job.output,
        family=families()[conversion.family].title,
        parts=tuple(dict.fromkeys(parts)),
        becomes=str(job.options.get("to", CANONICAL)),
        read=sum(file.size for file in conversion.files) or None,
        written=written,
        notes=tuple(conversion.notes),
        lacks=tuple(conversion.lacks),
        reports=reports,
    )


# --- and then -------------------------------------------------------------------------------------


def _compared(job: Job, inputs: _Inputs, outcome: Outcome) -> Outcome:
    """The outcome with that of parity, which is run unless it has passed before."""
    report = read_report(job.target)
    assert report is not None
    proven = unverified(report, read_parity(job.target)) is None
    failed = []
    if not proven:
        found = parity(
            job.target,
            inputs.sources,
            component=job.options.get("component"),
            ema=job.options.get("ema", False),
            report=job.target,
            source_python=job.steps.source_python or sys.executable,
        )
        failed = [f"{check.name} {check.verdict}" for check in found.checks if not check.passed]
        proven = found.passed
    reports = {**outcome.reports, "parity": f"{job.output}/parity.html"}
    outcome = replace(outcome, reports=reports, parity=proven)
    if proven:
        return outcome
    return replace(
        outcome,
        status=said.FAILED,
        error=f"{job.target}: parity failed ({', '.join(failed)}); parity.html in it shows where",
    )


def _pushed(job: Job, outcome: Outcome, record: Record) -> tuple[Outcome, Record]:
    """The outcome and the record with where the result was uploaded to, now or before."""
    repo_id = str(job.repo_id)
    if repo_id not in record.pushed:
        made = push(
            job.target,
            repo_id,
            private=job.steps.private or None,
            create_pr=job.steps.push_pr,
            license=job.options.get("license"),
            base_model=job.options.get("base_model"),
            allow_unverified=job.steps.allow_unverified,
        )
        record = replace(record, pushed={**record.pushed, repo_id: made.url})
        notes = tuple(dict.fromkeys([*outcome.notes, *made.warnings]))
        outcome = replace(outcome, notes=notes)
    return replace(outcome, pushed=record.pushed[repo_id]), record


# --- looking --------------------------------------------------------------------------------------


def _planned(job: Job) -> Outcome:
    """What would become of a job; nothing is written, and of the Hub only headers are read."""
    inputs = _Inputs.of(job)
    record = Record.load(job)
    if record is not None and still_done(job, record, inputs.commits):
        return replace(Outcome.from_dict(record.outcome), status=said.DONE, error=None)
    if job.steps.do != "convert":
        return _inspect(job, wait=False)
    if (before := _pushed_before(job, inputs)) is not None:
        return before[0]
    with glancing():
        conversion = inputs.convert(dry_run=True)
        if (job.target / REPORT).is_file() and as_reported(conversion, job.target):
            return _described(job, conversion, said.DONE)
        if os.path.lexists(job.target) and not job.options.get("overwrite"):
            raise _in_the_way(job)
        return _described(job, conversion, said.PLANNED)


def _in_the_way(job: Job) -> ConversionError:
    return ConversionError(
        f"{job.target}: already exists, of other sources, tables or options; --overwrite"
        " replaces it"
    )


def _inspect(job: Job, wait: bool) -> Outcome:
    """What each of the sources is, from its headers alone."""
    inputs = _Inputs.of(job)
    family = job.options.get("family")
    found = [inspect(source, family=family) for source in inputs.named]
    parts = [part for one in found for part in one.parts]
    titles = dict.fromkeys(" or ".join(part.families) for part in parts if part.families)
    kinds = [f"{part.part}: {part.format}" for part in parts]
    kinds += [f"an adapter of {' or '.join(one.adapter.families)}" for one in found if one.adapter]
    kinds += ["a textual inversion" for one in found if one.embedding]
    return Outcome(
        job.name,
        said.INSPECTED,
        family=", ".join(titles) or None,
        parts=tuple(dict.fromkeys(kinds)),
        read=sum(part.nbytes for part in parts) or None,
        found={"inspected": [one.to_dict() for one in found]},
    )


def _diff(job: Job, wait: bool) -> Outcome:
    """Whether an earlier result holds what the sources hold."""
    inputs = _Inputs.of(job)
    record = Record.load(job)
    results = [job.target]
    if not job.target.exists() and record is not None:
        results = [Path(job.folder, name) for name in record.written]
    settings = Settings(family=job.options.get("family"), ema=job.options.get("ema", False))
    found = compare(inputs.sources, results, settings, lambda done, total: None, whole=False)
    is_same = not found.differences and found.families[0] == found.families[1]
    return Outcome(
        job.name,
        said.SAME if is_same else said.DIFFERENT,
        output=job.output,
        family=families()[found.families[0]].title,
        notes=tuple(describe(found)),
        found={"compared": found.to_dict()},
    )


_ACTIONS = {"convert": _convert, "inspect": _inspect, "diff": _diff}
