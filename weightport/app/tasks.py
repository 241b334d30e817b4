"""What a worker does: each task takes plain data, and answers with plain data.

Paths in it come from the server, which made them or checked them; what is there to read is as
untrusted as on the command line.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..converters.conversion import Conversion
from ..converters.inspection import InspectedPart, Inspection
from ..converters.settings import Settings, options
from ..errors import ConversionError, one_line, printable
from ..io.sizes import in_words
from .report import Report

Arguments = Mapping[str, Any]
Task = Callable[[Arguments, Report], dict[str, Any]]

_ADAPTERS = (".safetensors",)
_SHOWN = 2000  # lines of one part's tensors
_FLAG = re.compile(r"--([a-z][a-z-]+)")


def inspect(arguments: Arguments, report: Report) -> dict[str, Any]:
    """Say what each of some sources is; those that cannot be read say why."""
    return {"files": [_inspected(source) for source in arguments["sources"]]}


def plan(arguments: Arguments, report: Report) -> dict[str, Any]:
    """Say what sources are, what a conversion would do, and what it leaves open."""
    from ..api import convert
    from ..converters.conversion import total_nbytes
    from ..hub.secrets import hide

    files = [_inspected(source) for source in arguments["sources"]]
    found: dict[str, Any] = {"files": files, "lines": [], "error": None, "nbytes": 0}
    given = arguments["options"]
    output = _named(Path("..", "out", "plan"), given["to"], [file["kind"] for file in files])
    try:
        planned = convert(
            arguments["sources"], output, base=arguments["base"], dry_run=True, **given
        )
        found["lines"] = _lines(planned)
        found["nbytes"] = total_nbytes(planned, Settings(dtype=given["dtype"]).dtype)
    except ConversionError as error:
        found["error"] = hide(one_line(error))
    sentences = [*found["lines"], *([found["error"]] if found["error"] else [])]
    for file in files:
        sentences += [str(fact) for part in file["parts"] for fact in part["facts"]]
        sentences += file["lines"]
    found["questions"] = questions(sentences)
    return found


def convert(arguments: Arguments, report: Report) -> dict[str, Any]:
    """Convert, and put the result where it is wanted: into a file to download, a folder of this
    machine, or a repository on the Hub."""
    from .. import api

    kinds = [_inspected(source)["kind"] for source in arguments["sources"]]
    output = _named(Path(arguments["output"]), arguments["options"]["to"], kinds)
    conversion = api.convert(
        arguments["sources"],
        output,
        base=arguments["base"],
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
    from ..push import push as upload

    pushed = upload(progress=report.progress, **arguments)
    return {"url": pushed.url, "pushed": len(pushed.files), "warnings": pushed.warnings}


TASKS: dict[str, Task] = {"inspect": inspect, "plan": plan, "convert": convert}


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


# --- what a file is -------------------------------------------------------------------------------


def _inspected(source: str) -> dict[str, Any]:
    """A source described: its parts, or lines for what has none, or what is wrong with it."""
    from .. import api
    from ..converters.inspection_description import adapter_lines, embedding_lines
    from ..hub.secrets import hide

    name = printable(source, 300)
    file: dict[str, Any] = {"name": name, "kind": "model", "parts": [], "lines": [], "error": None}
    try:
        found = api.inspect(source)
    except Exception as error:
        file["error"] = hide(one_line(error))
        return file
    file["kind"] = _kind(found)
    file["parts"] = [_part(part) for part in found.parts]
    lines: Iterable[str] = ()
    if found.adapter is not None:
        lines = adapter_lines(found.adapter)
    if found.embedding is not None:
        lines = embedding_lines(found.embedding)
    file["lines"] = [printable(line, 1000) for line in lines if line]
    return file


def _kind(found: Inspection) -> str:
    if found.adapter is not None:
        return "adapter"
    return "model" if found.embedding is None else "embedding"


def _part(part: InspectedPart) -> dict[str, Any]:
    """A component in words: titles with facts, and the tree of its tensors."""
    from ..converters.inspection_description import some

    families = f" of {' or '.join(part.families)}" if part.families else ""
    dtypes = ", ".join(f"{dtype} ({count})" for dtype, count in part.dtypes.items())
    facts = {
        "Format": [part.format],
        "Part": [f"{part.part}{families}"],
        "Because": part.evidence,
        "Becomes": [part.becomes],
        "Left out": [f"{count} tensors: {reason}" for reason, count in part.skipped.items()],
        "Missing": some(part.missing),
        "Unexpected": some(part.unexpected),
    }
    rows = [(title, printable(fact, 1000)) for title, known in facts.items() for fact in known]
    return {
        "title": printable(part.root or part.part, 200),
        "size": f"{part.count} tensors, {in_words(part.nbytes)}, {printable(dtypes)}",
        "rows": rows,
        "facts": [fact for _, fact in rows],
        "tree": tree(part.tensors[:_SHOWN]),
        "hidden": max(len(part.tensors) - _SHOWN, 0),
    }


def tree(tensors: Sequence[tuple[str, int, str, int]], depth: int = 6) -> list[dict[str, Any]]:
    """Collapsed keys as a tree by their first names, each branch with its number of tensors.

    Args:
        tensors: (collapsed key, number of tensors, dtype, bytes).
        depth: of the tree; the rest of a longer name stays in one.
    """
    branches: dict[str, list[tuple[str, int, str, int]]] = {}
    leaves = []
    for pattern, count, dtype, nbytes in tensors:
        first, _, rest = pattern.partition(".")
        if rest and depth:
            branches.setdefault(first, []).append((rest, count, dtype, nbytes))
        else:
            leaves.append(_node(pattern, count, nbytes, dtype))
    found = []
    for name, below in branches.items():
        count = sum(entry[1] for entry in below)
        nbytes = sum(entry[3] for entry in below)
        if len(below) == 1:  # a branch of one is a line
            rest, _, dtype, _ = below[0]
            found.append(_node(f"{name}.{rest}", count, nbytes, dtype))
        else:
            found.append({**_node(name, count, nbytes), "below": tree(below, depth - 1)})
    return found + leaves


def _node(name: str, count: int, nbytes: int, dtype: str = "") -> dict[str, Any]:
    size = in_words(nbytes)
    return {"name": printable(name, 200), "count": count, "size": size, "dtype": dtype, "below": []}


# --- results --------------------------------------------------------------------------------------


def _lines(conversion: Conversion) -> list[str]:
    """What a conversion does, but for where its result lies, which is not for the page."""
    from ..converters.conversion import describe

    *lines, _ = describe(conversion)
    return [printable(line, 1000) for line in lines]


def _named(output: Path, to: str, kinds: Sequence[str]) -> Path:
    """An output with the ending that it needs, if it has none of those."""
    endings = _endings(to, kinds)
    if not endings or output.name.endswith(endings):
        return output
    return output.with_name(f"{output.name}{endings[0]}")


def _endings(to: str, kinds: Sequence[str]) -> tuple[str, ...]:
    """What the name of an output may end in; none for the folder of a repository."""
    from ..converters.outputs import OUTPUTS
    from ..mappings.embeddings import forms

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
