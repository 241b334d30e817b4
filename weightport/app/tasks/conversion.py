"""A conversion: its plan, itself, and where its result goes."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...converters.settings import Settings, options
from ...errors import ConversionError, one_line
from ...io import dtypes
from ..report import Report
from . import Arguments, shown
from .archives import all_opened, opened
from .inspection import inspected

if TYPE_CHECKING:
    from ...converters.conversion import Conversion

_ADAPTERS = (".safetensors",)
_FLAG = re.compile(r"--([a-z][a-z-]+)")


def plan(arguments: Arguments, report: Report) -> dict[str, Any]:
    """Say what sources are, what a conversion would do, and what it leaves open."""
    from ...api import convert as run
    from ...converters.conversion import total_nbytes
    from ...hub.secrets import hide

    files = [inspected(source) for source in arguments["sources"]]
    found: dict[str, Any] = {"files": files, "lines": [], "error": None, "nbytes": 0}
    sources = all_opened(arguments["sources"])
    base = arguments["base"] and opened(arguments["base"])
    given = arguments["options"]
    output = _named(Path("..", "out", "plan"), given["to"], [file["kind"] for file in files])
    try:
        planned = run(sources, output, base=base, dry_run=True, **given)
        found["lines"] = _lines(planned)
        found["nbytes"] = total_nbytes(planned, dtypes.NAMES.get(given["dtype"], dtypes.KEEP))
    except ConversionError as error:
        found["error"] = shown(hide(one_line(error)), 2000)
    sentences = [*found["lines"], *([found["error"]] if found["error"] else [])]
    for file in files:
        sentences += [str(fact) for part in file["parts"] for fact in part["facts"]]
        sentences += file["lines"]
    found["questions"] = questions(sentences)
    return found


def convert(arguments: Arguments, report: Report) -> dict[str, Any]:
    """Convert, and put the result where it is wanted: into a file to download, a folder of this
    machine, or a repository on the Hub."""
    from ...api import convert as run

    sources = all_opened(arguments["sources"])
    base = arguments["base"] and opened(arguments["base"])
    kinds = [inspected(source)["kind"] for source in arguments["sources"]]
    output = _named(Path(arguments["output"]), arguments["options"]["to"], kinds)
    conversion = run(
        sources,
        output,
        base=base,
        progress=report.progress,
        **arguments["options"],
    )
    answer: dict[str, Any] = {"lines": _lines(conversion), "output": output.name}
    if arguments["pack"]:
        report.begin()
        answer["file"] = os.fspath(_packed(output, Path(arguments["pack"]), report))
    if arguments["push"]:
        report.begin()
        answer |= push({"repo": os.fspath(output), **arguments["push"]}, report)
    return answer


def push(arguments: Arguments, report: Report) -> dict[str, Any]:
    """Upload a converted repo with the visitor's own token."""
    from ...push import push as upload

    pushed = upload(progress=report.progress, **arguments)
    return {"url": pushed.url, "pushed": len(pushed.files), "warnings": pushed.warnings}


def questions(sentences: Iterable[str]) -> dict[str, list[str]]:
    """The options that sentences name, each with those that do: what evidence leaves open is said
    with the option that decides it."""
    flags = {
        (option.flag or f"--{name.replace('_', '-')}")[2:]: name
        for name, option in options(Settings).items()
    }
    found: dict[str, list[str]] = {}
    for sentence in sentences:
        for flag in _FLAG.findall(sentence):
            if flag in flags and sentence not in found.setdefault(flags[flag], []):
                found[flags[flag]].append(sentence)
    return found


def _lines(conversion: Conversion) -> list[str]:
    """What a conversion does, but for where its result lies, which is not for the page."""
    from ...converters.conversion import describe

    *lines, _ = describe(conversion)
    return [shown(line) for line in lines]


def _named(output: Path, to: str, kinds: Sequence[str]) -> Path:
    """An output with the ending that it needs, if it has none of those."""
    endings = _endings(to, kinds)
    if not endings or output.name.endswith(endings):
        return output
    return output.with_name(f"{output.name}{endings[0]}")


def _endings(to: str, kinds: Sequence[str]) -> tuple[str, ...]:
    """What the name of an output may end in; none for the folder of a repository."""
    from ...converters.outputs import OUTPUTS
    from ...mappings.embeddings import forms

    if "embedding" in kinds:
        return next((form.suffixes for form in forms() if form.name == to), _ADAPTERS)
    if to in OUTPUTS and "adapter" not in kinds:
        return OUTPUTS[to].endings
    return _ADAPTERS


def _packed(output: Path, folder: Path, report: Report) -> Path:
    """What was written as one file to download, in a folder; it moves there.

    Several files become an archive that is as large as they are, each put away once it is in.
    """
    written = sorted(path for path in output.parent.rglob("*") if path.is_file())
    if len(written) == 1:
        return written[0].rename(folder / written[0].name)
    total = sum(path.stat().st_size for path in written)
    packed = folder / f"{output.name.partition('.')[0]}.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for path in written:
            size = path.stat().st_size
            archive.write(path, path.relative_to(output.parent))
            path.unlink()
            report.progress(size, total)
    return packed
