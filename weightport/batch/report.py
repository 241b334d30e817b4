"""What came of a batch: a table for a terminal, `batch.json`, `batch.csv` and `batch.html`."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import weightport

from ..errors import ConversionError, printable
from ..io import atomic
from ..io.documents import read_json
from ..io.sizes import in_words
from ..reports.page import render
from . import outcome as said
from .outcome import Outcome

JSON, CSV, HTML = "batch.json", "batch.csv", "batch.html"
_COLUMNS = (
    "name", "status", "family", "parts", "becomes", "output", "read", "written", "seconds",
    "parity", "pushed", "notes", "lacks", "error", "sources",
)  # fmt: skip
_NAME = 48  # characters of a name in the table


def to_dict(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Plain data, ready for JSON."""
    return {
        "weightport_version": weightport.__version__,
        "jobs": [one.to_dict() for one in outcomes],
    }


def read_outcomes(folder: Path) -> list[Outcome]:
    """The outcomes of the last batch of a folder.

    Raises:
        ConversionError: there was none, or its `batch.json` is damaged.
    """
    path = folder / JSON
    if not path.is_file():
        raise ConversionError(f"{folder}: has no {JSON}, so no batch has ended there yet")
    return [Outcome.from_dict(fields) for fields in read_json(path, "batch")["jobs"]]


def write_reports(folder: Path, outcomes: Sequence[Outcome]) -> list[str]:
    """Write the three files; returns why one is lacking."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic.text(folder / JSON, json.dumps(to_dict(outcomes), indent=1) + "\n")
    atomic.text(folder / CSV, _csv(outcomes))
    try:
        page = html(outcomes)
    except ConversionError as error:  # without Jinja2
        return [f"no {HTML}: {error}"]
    atomic.text(folder / HTML, page)
    return []


def _csv(outcomes: Sequence[Outcome]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(_COLUMNS)
    for one in outcomes:
        fields = one.to_dict()
        rows.writerow([_cell(fields[column]) for column in _COLUMNS])
    return text.getvalue()


def _cell(value: Any) -> Any:
    return "; ".join(value) if isinstance(value, list) else value


def html(outcomes: Sequence[Outcome]) -> str:
    """The page.

    Raises:
        ConversionError: Jinja2 is not installed.
    """
    return render(
        "batch.html",
        jobs=[one.to_dict() for one in outcomes],
        bad=said.BAD,
        counts=counts(outcomes),
        summary=summary(outcomes),
        size=in_words,
        version=weightport.__version__,
    )


def counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Status -> number of jobs; what is bad comes last."""
    found = Counter(one.status for one in outcomes)
    return dict(sorted(found.items(), key=lambda entry: (entry[0] in said.BAD, entry[0])))


def summary(outcomes: Sequence[Outcome]) -> str:
    """The batch in a sentence."""
    kinds = [f"{count} {status}" for status, count in counts(outcomes).items()]
    jobs = "1 job" if len(outcomes) == 1 else f"{len(outcomes)} jobs"
    return f"{jobs}: {', '.join(kinds)}"


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The batch in lines, one a job, and what there is to say of it below; failures come last."""
    width = min(_NAME, max((len(printable(one.name)) for one in outcomes), default=0))
    for one in sorted(outcomes, key=lambda one: one.is_bad):
        name = f"{printable(one.name, _NAME):<{width}}"
        yield f"{name}  {one.status:<11}  {_what(one)}".rstrip()
        if one.error:
            yield f"{'':<{width}}  {one.error}"
        if one.pushed:
            yield f"{'':<{width}}  pushed: {one.pushed}"
    yield summary(outcomes)


def _what(one: Outcome) -> str:
    """What a job is and becomes, in a few words."""
    words = [one.family or "", ", ".join(_parts(one))]
    if one.becomes and one.output:
        words.append(f"-> {one.output} ({one.becomes})")
    if one.parity is not None:
        words.append(f"parity {'passed' if one.parity else 'failed'}")
    size = one.written if one.written is not None else one.read
    if size is not None:
        words.append(in_words(size))
    if one.seconds >= 0.05:
        words.append(f"{one.seconds:.1f} s")
    return "  ".join(filter(None, words))


def _parts(one: Outcome) -> Iterator[str]:
    """The parts of the sources, those of one format together."""
    by_format: dict[str, list[str]] = {}
    for part in one.parts:
        name, _, kind = part.partition(": ")
        by_format.setdefault(kind, []).append(name)
    for kind, names in by_format.items():
        yield f"{', '.join(names)} ({kind})" if kind else ", ".join(names)
