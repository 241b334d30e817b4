"""What an adapter holds, from its header and its alphas."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..adapters.modules import Adapter, Module
from ..errors import printable
from ..mappings.conventions import conventions
from ..mappings.facts import facts
from ..mappings.families import families
from .checkpoint import Tensor
from .layouts.adapters import AdapterFile
from .planning.keys import brief

_MOST = 10  # trigger words


@dataclass(frozen=True)
class InspectedAdapter:
    """What an adapter changes.

    Attributes:
        families: whose models it fits; the nearest if it fits none.
        evidence: how they are known, one sentence each.
        conventions: whose names it has -> number of modules.
        flavours: (component, flavour, number of modules).
        kinds: (component, the end of the modules' names, number of modules).
        ranks: (rank, alpha, number of modules); no alpha is None.
        magnitudes: of DoRA, `rows` or `input channels` -> number of modules.
        embeddings: (name, shape) of those in the file.
        words: what prompts name it by, as the training says.
        metadata: what else the trainer says.
        unmatched: names that belong to no module.
    """

    families: tuple[str, ...]
    evidence: tuple[str, ...]
    conventions: dict[str, int]
    flavours: tuple[tuple[str, str, int], ...]
    kinds: tuple[tuple[str, str, int], ...]
    ranks: tuple[tuple[int, float | None, int], ...]
    magnitudes: dict[str, int]
    embeddings: tuple[tuple[str, tuple[int, ...]], ...]
    words: tuple[str, ...]
    metadata: dict[str, str]
    unmatched: tuple[str, ...]


def inspect_adapter(file: AdapterFile, family: str | None) -> InspectedAdapter:
    """Describe an adapter.

    Raises:
        ConversionError: a module is incomplete or contradicts itself.
    """
    found = file.fitting(family)
    first = found[0]
    modules = list(first.modules.values())
    ranked = Counter((one.rank, one.alpha) for one in modules if one.rank)
    decomposed = [one for one in modules if one.is_decomposed]
    said = file.checkpoint.metadata
    return InspectedAdapter(
        families=tuple(families()[one.family].title for one in found),
        evidence=tuple(_evidence(found)),
        conventions=dict(Counter(conventions()[one.convention].title for one in modules)),
        flavours=_counted((one.component, one.title) for one in modules),
        kinds=_counted((one.component, _kind(one)) for one in modules),
        ranks=tuple((rank, alpha, count) for (rank, alpha), count in ranked.most_common()),
        magnitudes=dict(Counter(_axis(one) for one in decomposed)),
        embeddings=tuple((name, one.shape) for name, one in first.bundled.items()),
        words=_words(said),
        metadata={
            key: printable(said[key]) for key in facts("adapters")["says"]["keys"] if key in said
        },
        unmatched=first.unmatched,
    )


def _counted(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str, int], ...]:
    counts = Counter(pairs)
    return tuple((component, what, count) for (component, what), count in counts.items())


def _evidence(found: list[Adapter[Tensor]]) -> list[str]:
    """How the family is known, and what it is not sure of."""
    first = found[0]
    title = families()[first.family].title
    count = len(first.modules)
    if first.unmatched:
        return [
            f"nearest: {title}; {len(first.unmatched)} tensors belong to none of its modules:"
            f" {brief(first.unmatched)}"
        ]
    if not first.fits and not first.is_of_other_widths:
        name, why = next(iter(first.flaws.items()))
        return [f"nearest: {title}; `{printable(name)}` {why}"]
    if first.is_of_other_widths:
        return [f"all {count} modules are those of {title}, of other widths"]
    facts = [f"all {count} modules are those of {title}, and of its widths"]
    if len(found) > 1:
        others = " and ".join(families()[one.family].title for one in found[1:])
        facts.append(f"they are those of {others} as well: --family decides")
    return facts


def _kind(module: Module[Tensor]) -> str:
    """The ends of the names of its layers, less their numbers."""
    paths = [part.path.split(".") for part in module.parts]
    ends = [next(word for word in reversed(path) if not word.isdigit()) for path in paths]
    return " + ".join(ends)


def _axis(module: Module[Tensor]) -> str:
    return "rows" if module.is_by_row else "input channels"


def _words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The trigger phrase, or the tags that most training images had."""
    says = facts("adapters")["says"]
    if says["phrase"] in metadata:
        return (printable(metadata[says["phrase"]]),)
    try:
        folders = json.loads(metadata.get(says["tags"], "{}"))
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({str(tag): int(number) for tag, number in tags.items()})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return ()
    return tuple(printable(tag.strip()) for tag, _ in counts.most_common(_MOST))
