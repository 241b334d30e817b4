"""What a file is, in lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..io.sizes import in_words
from .planning.keys import collapse

if TYPE_CHECKING:
    from .adapter_inspection import InspectedAdapter
    from .embedding_inspection import InspectedEmbedding
    from .inspection import Inspection


def describe(inspection: Inspection) -> Iterator[str]:
    """What a file is, in lines for people."""
    yield inspection.path
    if inspection.adapter is not None:
        yield from adapter_lines(inspection.adapter)
    if inspection.embedding is not None:
        yield from embedding_lines(inspection.embedding)
    for part in inspection.parts:
        mixed = len(part.dtypes) > 1
        dtypes = ", ".join(
            f"{dtype} ({count})" if mixed else dtype for dtype, count in part.dtypes.items()
        )
        yield ""
        yield f"{part.root or part.part}: {part.count} tensors, {in_words(part.nbytes)}, {dtypes}"
        yield f"  format      {part.format}"
        yield (
            "  part       "
            f" {part.part}{' of ' + ' or '.join(part.families) if part.families else ''}"
        )
        yield from (
            f"  {'because' if index == 0 else '':<11} {fact}"
            for index, fact in enumerate(part.evidence)
        )
        yield f"  becomes     {part.becomes}"
        yield from (
            f"  skipped     {count} tensors: {reason}" for reason, count in part.skipped.items()
        )
        for title, keys in (("missing", part.missing), ("unexpected", part.unexpected)):
            yield from (f"  {title:<11} {key}" for key in some(keys))
        for pattern, count, dtype, nbytes in part.tensors:
            yield f"    {count:>4} x {pattern}  {dtype}  {in_words(nbytes)}"


def adapter_lines(adapter: InspectedAdapter) -> Iterator[str]:
    """What an adapter changes, in lines."""
    yield ""
    yield f"an adapter of {' or '.join(adapter.families)}"
    yield from _titled("because", adapter.evidence)
    yield from _titled("names", [f"{name} ({n})" for name, n in adapter.conventions.items()])
    for component in dict.fromkeys(component for component, _, _ in adapter.flavours):
        flavours = [f"{n} x {title}" for name, title, n in adapter.flavours if name == component]
        kinds = [f"{kind} {n}" for name, kind, n in adapter.kinds if name == component]
        yield from _titled(component, [", ".join(flavours), ", ".join(kinds)])
    yield from _titled("ranks", [_rank(*entry) for entry in adapter.ranks])
    yield from _titled("DoRA", [f"{n} x by {axis}" for axis, n in adapter.magnitudes.items()])
    yield from _titled("embeddings", [f"{name} {list(s)}" for name, s in adapter.embeddings])
    yield from _titled("words", [", ".join(adapter.words)] if adapter.words else [])
    yield from _titled("says", [f"{key}: {value}" for key, value in adapter.metadata.items()])
    yield from _titled("unexpected", some(adapter.unmatched))


def embedding_lines(embedding: InspectedEmbedding) -> Iterator[str]:
    """What words an embedding holds, in lines."""
    yield ""
    yield f"a textual inversion of {' or '.join(embedding.families) or 'no known model'}"
    yield from _titled("because", embedding.evidence)
    yield from _titled("format", [embedding.format])
    for word in embedding.words:
        vectors = [
            f"{count} x {width}, {dtype}{f' ({role})' if role else ''}"
            for role, count, width, dtype in word.vectors
        ]
        yield from _titled("word", [f"{word.token}: {'; '.join(vectors)}"])
    yield from _titled("says", [f"{key}: {value}" for key, value in embedding.metadata.items()])


def _titled(title: str, facts: Sequence[str]) -> Iterator[str]:
    """Facts below one another, with a title before the first."""
    for index, fact in enumerate(facts):
        yield f"  {'' if index else title:<14} {fact}"


def _rank(rank: int, alpha: float | None, count: int) -> str:
    stated = "no alpha" if alpha is None else f"alpha {alpha:g}"
    return f"rank {rank}, {stated}: {count}"


def some(keys: Sequence[str], limit: int = 20) -> list[str]:
    """Keys, collapsed, and how many more there are."""
    patterns = [
        f"{pattern} ({len(group)})" if len(group) > 1 else pattern
        for pattern, group in collapse(keys)
    ]
    return (
        patterns
        if len(patterns) <= limit
        else [*patterns[:limit], f"... and {len(patterns) - limit} more patterns"]
    )
