"""Jobs: what is asked for, and the place in the folder of results that each one gets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from ..converters.outputs import OUTPUTS
from ..converters.settings import Settings, option
from ..errors import ConversionError, printable
from ..mappings import embeddings, layouts
from ..pull import Reference

HUB = "hub:"
HIDDEN = "."
"""How names begin that are no results."""
REPORTS = ("batch.json", "batch.csv", "batch.html")
ACTIONS = ("convert", "inspect", "diff")
_ADAPTER = ".safetensors"
_CHANGING = ("vae", "lora", "embedding")  # options whose results hold other weights
_PATHS = ("base", *_CHANGING)  # options that name files


@dataclass(frozen=True)
class Steps:
    """What is done in a job beside what `Settings` say of its conversion."""

    do: str = option(
        "convert",
        "inspect the sources, or compare them with an earlier output",
        choices=ACTIONS,
    )
    base: str | None = option(
        None,
        "fills in what the sources lack: a repo, a folder such as ~/.keras/models, or a Hub id",
    )
    parity: bool = option(False, "run `weightport parity` on each result; it must pass")
    source_python: str | None = option(
        None, "the interpreter that has the source framework, for --parity", metavar="PYTHON"
    )
    push: str | None = option(
        None, "upload each result; {name} is the job's name", metavar="ORG/{name}"
    )
    push_pr: bool = option(
        False, "offer each result to the Hub repo of its sources, as a pull request"
    )
    private: bool = option(False, "make new Hub repos private")
    allow_unverified: bool = option(False, "push although no parity proves the conversion")
    keep: bool = option(True, "delete each result once it is on the Hub")


@dataclass(frozen=True)
class Entry:
    """A job as somebody names it, without a place yet.

    Attributes:
        where: it is named, for messages.
        sources: paths and `hub:` names.
        names: what its result may be called, the first that nobody else has.
        output: what it must be called.
        given: options, of `convert` and of `Steps`.
    """

    where: str
    sources: tuple[str, ...]
    names: tuple[str, ...]
    output: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """All that one job needs: paths, names and options, which any process can be sent.

    Attributes:
        name: of the job; no other one of the batch has it.
        folder: that gets the results.
        output: the path in it.
        options: of `weightport.convert`.
        version: of weightport, which is to be the worker's too.
    """

    name: str
    sources: tuple[str, ...]
    folder: str
    output: str
    options: Mapping[str, Any]
    steps: Steps
    version: str

    @property
    def target(self) -> Path:
        """The result, or how the names of its files begin."""
        return Path(self.folder, self.output)

    @property
    def repo_id(self) -> str | None:
        """The Hub repo that the result goes to."""
        if self.steps.push_pr:
            return self.source_repo
        if self.steps.push is None:
            return None
        return self.steps.push.replace("{name}", hub_name(self.name))

    @property
    def references(self) -> list[str]:
        """All that it takes from the Hub."""
        names = [*self.sources]
        for name in _PATHS:
            value = self.options.get(name) or ()
            names += [value] if isinstance(value, str) else value
        found = [name for name in names if name.startswith(HUB)]
        base = self.steps.base
        if base and not Path(base).is_dir() and Reference.parse(base):
            found.append(base)
        return found

    @property
    def source_repo(self) -> str | None:
        """The Hub repo that the sources are from, if it is one."""
        names = [source.removeprefix(HUB).split("/") for source in self.sources]
        if not all(source.startswith(HUB) for source in self.sources):
            return None
        repos = {"/".join(parts[:2]).partition("@")[0] for parts in names}
        return repos.pop() if len(repos) == 1 else None


def hub_name(name: str) -> str:
    """A name that the Hub takes."""
    return re.sub(r"[^\w.-]+|--+|\.\.+", "-", name, flags=re.ASCII).strip("-.")[:96]


def absolute(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Options whose paths lead from anywhere to what lies beside `folder`."""
    return {
        name: _from(value, folder, name) if name in _PATHS else value
        for name, value in options.items()
    }


def _from(value: Any, folder: Path, name: str) -> Any:
    if value is None or isinstance(value, Path):
        return value and str(folder / value)
    if not isinstance(value, str):
        return tuple(_from(one, folder, name) for one in value)
    if name == "base" and not (folder / value).expanduser().is_dir():
        return value  # of the Hub
    return path_from(value, folder)


def path_from(text: str, folder: Path) -> str:
    """A path as it is to be read from anywhere; `hub:` names as they are."""
    return text if text.startswith(HUB) else str(folder / Path(text).expanduser())


# --- places ---------------------------------------------------------------------------------------


def placed(
    entries: Sequence[Entry], folder: Path, common: Mapping[str, Any], version: str
) -> list[Job]:
    """The jobs, each with its own place in the folder.

    Args:
        common: options of all jobs; an entry's own go before them.

    Raises:
        ConversionError: two entries want the same place, or one outside the folder, or what they
            ask for does not go together.
    """
    asked = [{**common, **entry.given} for entry in entries]
    endings = [suffix(options) for options in asked]
    names = _chosen(entries, endings, folder)
    steps = {one.name for one in fields(Steps)}
    jobs = []
    for entry, options, ending, name in zip(entries, asked, endings, names, strict=True):
        job = Job(
            name=name.removesuffix(ending) if ending else name,
            sources=entry.sources,
            folder=str(folder),
            output=name,
            options={key: value for key, value in options.items() if key not in steps},
            steps=Steps(**{key: value for key, value in options.items() if key in steps}),
            version=version,
        )
        _check(job, entry)
        jobs.append(job)
    _check_push(jobs)
    return jobs


def suffix(options: Mapping[str, Any]) -> str:
    """How the name of a result ends; a repo's has no ending."""
    target = options.get("to", layouts.CANONICAL)
    asked = {name: options.get(name) or () for name in ("merge", "expand", "extract_embeddings")}
    if target in OUTPUTS and not any(asked.values()):
        return next(iter(OUTPUTS[target].endings), "")
    for form in embeddings.forms():
        if form.name == target and not Settings(to=target).is_of_adapters:
            return form.suffixes[0]
    return _ADAPTER


def _check(job: Job, entry: Entry) -> None:
    """Refuse what cannot be done with a job whatever its sources are."""
    steps = job.steps
    if steps.push and steps.push_pr:
        raise ConversionError(f"{entry.where}: --push and --push-pr: choose one")
    if steps.push_pr and job.source_repo is None:
        raise ConversionError(
            f"{entry.where}: --push-pr needs sources of one Hub repo (hub:owner/name)"
        )
    if not steps.keep and not (steps.push or steps.push_pr):
        raise ConversionError(f"{entry.where}: --no-keep would delete what --push has not uploaded")
    if steps.parity and suffix(job.options):
        raise ConversionError(
            f"{entry.where}: --parity compares repositories, and --to"
            f" {printable(job.options['to'])} writes none"
        )
    target = job.options.get("to", layouts.CANONICAL)
    if (steps.push or steps.push_pr) and target in OUTPUTS and not OUTPUTS[target].is_repo:
        raise ConversionError(
            f"{entry.where}: --push takes repositories and adapters, and --to {target} writes"
            " neither"
        )
    changed = [name for name in _CHANGING if job.options.get(name)]
    if steps.parity and changed:
        raise ConversionError(
            f"{entry.where}: --parity compares with what the sources hold, and --{changed[0]}"
            " changes that"
        )


def _check_push(jobs: Sequence[Job]) -> None:
    """Refuse to push two results to one place."""
    ids = Counter(job.repo_id for job in jobs if job.steps.push)
    for repo_id, count in ids.items():
        if count > 1:
            raise ConversionError(
                f"--push {printable(repo_id)}: {count} jobs would go there; write ORG/{{name}}"
            )


def _chosen(entries: Sequence[Entry], endings: Sequence[str], folder: Path) -> list[str]:
    """The path of each result in the folder: what it must be called, or the first of its names that
    neither is another's, nor contains it, nor lies inside."""
    fixed = {
        index: _inside(entry.output, folder, entry.where)
        for index, entry in enumerate(entries)
        if entry.output is not None
    }
    _check_distinct(fixed, entries)
    levels = {index: 0 for index in range(len(entries)) if index not in fixed}
    while True:
        names = dict(fixed)
        for index, level in levels.items():
            names[index] = _name(entries[index].names, level, index) + endings[index]
        clashing = _clashing(names) & levels.keys()
        if not clashing:
            return [names[index] for index in range(len(entries))]
        for index in clashing:
            levels[index] += 1


def _name(names: Sequence[str], level: int, index: int) -> str:
    """A name of an entry; after the last one its number tells it apart."""
    if level < len(names):
        return names[level]
    return f"{names[-1]}-{index + 1}{'-' * (level - len(names))}"


def _clashing(names: Mapping[int, str]) -> set[int]:
    """Whose name another one has, or is a folder of another's."""
    by_name: dict[str, list[int]] = {}
    for index, name in names.items():
        by_name.setdefault(name, []).append(index)
    found = {index for same in by_name.values() if len(same) > 1 for index in same}
    for index, name in names.items():
        for above in PurePosixPath(name).parents:
            if str(above) in by_name:
                found |= {index, *by_name[str(above)]}
    return found


def _check_distinct(names: Mapping[int, str], entries: Sequence[Entry]) -> None:
    """Refuse two entries that must be called the same, or one inside of the other."""
    clashing = sorted(_clashing(names))
    if not clashing:
        return
    mine, other = clashing[0], clashing[1]
    raise ConversionError(
        f"{entries[other].where}: the output {printable(names[other])} is in the way of that of"
        f" {entries[mine].where}"
    )


def _inside(output: str, folder: Path, where: str) -> str:
    """The path of an output in the folder.

    Raises:
        ConversionError: it lies elsewhere, or is kept for reports.
    """
    path = Path(output)
    if path.is_absolute() and path.is_relative_to(folder):
        path = path.relative_to(folder)
    parts = path.parts
    if path.is_absolute() or not parts or ".." in parts:
        raise ConversionError(f"{where}: `output` {printable(output)} lies outside {folder}")
    if any(part.startswith(HIDDEN) for part in parts) or path.name in REPORTS:
        raise ConversionError(f"{where}: `output` {printable(output)}: batches keep such names")
    return path.as_posix()
