"""What files are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import one_line, printable
from ...io.sizes import in_words
from ..report import Report
from . import Arguments, shown
from .archives import opened

if TYPE_CHECKING:
    from ...converters.inspection import InspectedPart, Inspection

_SHOWN = 2000  # lines of one part's tensors


def inspect(arguments: Arguments, report: Report) -> dict[str, Any]:
    """Say what each of some sources is; those that cannot be read say why."""
    return {"files": [inspected(source) for source in arguments["sources"]]}


def inspected(source: str) -> dict[str, Any]:
    """A source described: its parts, or lines for what has none, or what is wrong with it."""
    from ... import api
    from ...converters.inspection_description import adapter_lines, embedding_lines
    from ...hub.secrets import hide

    name = printable(source, 300)
    file: dict[str, Any] = {"name": name, "kind": "model", "parts": [], "lines": [], "error": None}
    try:
        found = api.inspect(opened(source))
    except Exception as error:
        file["error"] = shown(hide(one_line(error)), 2000)
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
    from ...converters.inspection_description import some

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
