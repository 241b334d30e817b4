"""What is kept of a job that is done, and whether it still is.

A job is done when its result's `conversion.json` names the hashes that its sources have, the tables
that there are, and the options that it asks for. So that this costs no second reading of the
sources, a record in `.batch/` says what they were; it stands for a `conversion.json` where a result
is a file and has none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from ..converters.checkpoint import SourceFile, file_state
from ..converters.conversion import Conversion
from ..errors import ConversionError
from ..io import atomic
from ..io.documents import read_json
from ..io.locks import locked
from ..mappings.errors import MappingError
from ..mappings.library import load_table
from .jobs import Job

FOLDER = ".batch"
"""In the folder of results."""

REPORT = "conversion.json"
_UNSEEN = ("overwrite", "sync")  # options that no result shows
_SAFE = " !#$&'()*+,-./:;<=>?@[]^_`{|}~"  # as they are in a quoted path
_LONGEST = 150  # characters of a job's name in that of its files


@dataclass(frozen=True)
class Record:
    """A job that is done.

    Attributes:
        asked: its sources and options.
        read: path of a local file -> its state and sha256.
        commits: `hub:` name -> the commit that it was of.
        tables: name -> sha256.
        written: path of a file in the folder of results -> its size.
        pushed: Hub id -> address of the commit or the pull request.
        outcome: what came of it.
    """

    asked: Mapping[str, Any]
    read: Mapping[str, Mapping[str, Any]]
    commits: Mapping[str, str]
    tables: Mapping[str, str]
    written: Mapping[str, int]
    outcome: Mapping[str, Any]
    pushed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, job: Job) -> Record | None:
        """The record of a job; None if there is none that can be read."""
        path = record_path(job)
        try:
            content = read_json(path, "batch_record") if path.exists() else None
        except ConversionError:
            return None
        if content is None:
            return None
        for paths in ("read", "written"):
            content[paths] = {_named(name): value for name, value in content[paths].items()}
        return cls(**content)

    def save(self, job: Job) -> None:
        """Keep it, in place of an earlier one."""
        content = asdict(self)
        for paths in ("read", "written"):
            content[paths] = {_quoted(name): value for name, value in content[paths].items()}
        atomic.text(record_path(job), json.dumps(content))


def _quoted(path: str) -> str:
    """A path as text, whatever bytes it has."""
    return quote(os.fsencode(path), safe=_SAFE)


def _named(text: str) -> str:
    return os.fsdecode(unquote_to_bytes(text))


def record_path(job: Job) -> Path:
    """Where the record of a job is kept."""
    return Path(job.folder, FOLDER, f"{file_name(job.name)}.json")


def lock_path(job: Job) -> Path:
    """The file that whoever does a job has locked."""
    return Path(job.folder, FOLDER, f"{file_name(job.name)}.lock")


def clear(job: Job) -> None:
    """Remove what a process left of a job that was killed at it; what somebody is at stays."""
    with locked(lock_path(job)) as held:
        if held is not None:
            atomic.sweep(job.target.parent, Path(job.name).name)


def file_name(name: str) -> str:
    """A name for files of a job, whatever its own is."""
    quoted = quote(os.fsencode(name), safe=" ")
    if len(quoted) <= _LONGEST:
        return quoted
    return f"{quoted[:100]}-{sha256(quoted.encode()).hexdigest()[:16]}"


def asked(job: Job) -> dict[str, Any]:
    """What a job asks for, as JSON has it."""
    options = {name: value for name, value in job.options.items() if name not in _UNSEEN}
    content = {
        "sources": job.sources,
        "output": job.output,
        "base": job.steps.base,
        "options": {name: value for name, value in options.items() if value not in (None, (), [])},
    }
    text = json.dumps(content, default=str)  # half characters stay as they are escaped
    plain: dict[str, Any] = json.loads(text.replace("\\u", "\\\\u"))
    return plain


# --- still done? ----------------------------------------------------------------------------------


def still_done(job: Job, record: Record, commits: Mapping[str, str]) -> bool:
    """Whether what a job made is there, and would be made again the same.

    Args:
        commits: `hub:` name -> the commit that it is of now.
    """
    return (
        record.asked == asked(job)
        and record.commits == commits
        and current(record.tables)
        and all(_is_unchanged(path, one) for path, one in record.read.items())
        and (_is_away(job, record) or _is_there(job, record))
    )


def _is_away(job: Job, record: Record) -> bool:
    """Whether the result is on the Hub, and not kept here."""
    return not job.steps.keep and job.repo_id in record.pushed


def _is_there(job: Job, record: Record) -> bool:
    return are_there(Path(job.folder), record.written) and _is_reported(job, record)


def current(tables: Mapping[str, str]) -> bool:
    """Whether tables are what they were."""
    return all(_digest(name) == digest for name, digest in tables.items())


def _digest(name: str) -> str | None:
    if not re.fullmatch(r"\w+", name):
        return None
    try:
        return load_table(name).sha256
    except MappingError:
        return None


def are_there(folder: Path, files: Mapping[str, int]) -> bool:
    """Whether files are there, each as large as it should be."""
    try:
        return all((folder / name).stat().st_size == nbytes for name, nbytes in files.items())
    except OSError:
        return False


def _is_unchanged(path: str, known: Mapping[str, Any]) -> bool:
    """Whether a file is what it was: untouched, or of the same content."""
    try:
        if list(file_state(Path(path).stat())) == known["state"]:
            return True
        return known["sha256"] is not None and SourceFile(path).sha256() == known["sha256"]
    except (OSError, ConversionError):
        return False


def _is_reported(job: Job, record: Record) -> bool:
    """Whether the `conversion.json` of a repo, if it has one, names the sources and tables of the
    record."""
    path = job.target / REPORT
    if f"{job.output}/{REPORT}" not in record.written:
        return True
    try:
        report = read_json(path, "conversion")
    except ConversionError:
        return False
    known = {one["sha256"] for one in record.read.values() if one["sha256"]}
    return record.tables == report["tables"] and known <= digests_in(report)


def digests_in(report: Mapping[str, Any]) -> set[str]:
    """The sha256 of everything that a conversion read, as its report says."""
    entries = [report.get(name, []) for name in ("sources", "adapters", "embeddings")]
    return set(re.findall(r'"([0-9a-f]{64})"', json.dumps(entries)))


def as_reported(conversion: Conversion, folder: Path, renewed: Container[str] = ()) -> bool:
    """Whether a repo is what a planned conversion would write.

    Args:
        conversion: a dry run's.
        folder: the repo.
        renewed: names of files that may have been written anew.
    """
    try:
        report = read_json(folder / REPORT, "conversion")
    except ConversionError:
        return False
    planned = conversion.report
    sizes = {name: file["nbytes"] for name, file in report["files"].items() if name not in renewed}
    return (
        report["tables"] == planned["tables"]
        and report["options"] == planned["options"]
        and are_there(folder, sizes)
        and digests_in(report) == {file.sha256() for file in conversion.files}
    )


# --- what is kept ---------------------------------------------------------------------------------


def kept(
    job: Job,
    conversion: Conversion,
    commits: Mapping[str, str],
    local: Sequence[Path],
    downloaded: Sequence[Path],
) -> Record:
    """The record of a conversion that was written; what came of it is still to be said.

    Args:
        local: the files and folders that it was made of.
        downloaded: those of the Hub; which they are, their commit says.
    """
    family = conversion.architecture.name
    parts = [part for component in conversion.components.values() for part in component.parts]
    tables = [part.of_family(family).table for part in parts]
    files = conversion.files or [SourceFile(path) for path in _files_of(local)]
    own = [file for file in files if not _is_below(file.path, downloaded)]
    return Record(
        asked=asked(job),
        read={str(file.path.absolute()): _described(file, job) for file in own},
        commits=commits,
        tables={table.name: table.sha256 for table in tables},
        written={},
        outcome={},
    )


def _is_below(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _described(file: SourceFile, job: Job) -> dict[str, Any]:
    hashed = job.options.get("hashes", True)
    return {"state": list(file.state), "sha256": file.sha256() if hashed else None}


def _files_of(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from (inner for inner in sorted(path.rglob("*")) if inner.is_file())
        else:
            yield path


def sizes(job: Job, conversion: Conversion) -> dict[str, int]:
    """The files that a conversion wrote -> their sizes."""
    target = job.target
    files = [target]
    if target.is_dir():
        files = sorted(path for path in target.rglob("*") if path.is_file())
    elif not target.exists():  # a file for each part
        files = [Path(name) for name in conversion.report["files"]]
    return {str(path.relative_to(job.folder)): path.stat().st_size for path in files}


def progress(job: Job) -> tuple[int, int] | None:
    """How far a job is that somebody is at: bytes done, and in all."""
    try:
        done, total, _ = lock_path(job).read_text(encoding="utf-8").split(maxsplit=2)
        return int(done), int(total)
    except (OSError, ValueError):
        return None
