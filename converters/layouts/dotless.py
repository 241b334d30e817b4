"""Names without dots, as LitEma and others write averages: `diffusion_modelinput_blocks00weight`.

They are read by the names of the weights beside them, or by the keys of known parts where they are
alone; there numbers may be others than those of stock models.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import cache

from ...errors import ConversionError
from ...mappings.names import leftovers
from ..checkpoint import Tensor
from ..planning.candidates import candidates
from ..planning.keys import brief
from .groups import Group, split

_FEWEST = 8  # names under one front
_OF_LEFTOVERS = "the moving average of what is left out"
_UNREAD = "the moving average of something that is not known"
_NUMBERS = re.compile(r"\d+")

Tensors = Mapping[str, Tensor]


def read_dotless(
    groups: list[Group], rest: Tensors, skipped: dict[str, str], wanted: bool
) -> tuple[list[Group], dict[str, Tensor]]:
    """Groups of the tensors without dots in their names; and what is left of the rest.

    Args:
        groups: the parts beside them.
        rest: tensors that belong to no part.
        skipped: gets those that are averages of nothing that is converted.
        wanted: whether averages are asked for; then each must be known.

    Raises:
        ConversionError: some of the names cannot be read.
    """
    found: list[Group] = []
    left = dict(rest)
    for front, leaves in _dotless(rest).items():
        names = _by_weights(leaves, groups)
        alone = not names
        if alone:
            names = _by_tables(leaves)
        if not names:
            continue
        unread = {leaf: tensor for leaf, tensor in leaves.items() if leaf not in names}
        of_leftovers = _of_leftovers(unread)
        unknown = [tensor.name for leaf, tensor in unread.items() if leaf not in of_leftovers]
        if unknown and (alone or wanted):
            raise ConversionError(
                f"{len(unknown)} averages belong to no tensor of a known part: {brief(unknown)}"
            )
        skipped |= {leaves[leaf].name: _OF_LEFTOVERS for leaf in of_leftovers}
        skipped |= dict.fromkeys(unknown, _UNREAD)
        read = {front + name: leaves[leaf] for leaf, name in names.items()}
        found += split(read).groups
        for tensor in leaves.values():
            del left[tensor.name]
    return found, left


def _dotless(rest: Tensors) -> dict[str, dict[str, Tensor]]:
    """Front -> last segment -> tensor, where many lie right under one front."""
    counted = Counter(name[: name.rfind(".") + 1] for name in rest)
    found: dict[str, dict[str, Tensor]] = {
        front: {} for front, count in counted.items() if count >= _FEWEST
    }
    if not found:
        return found
    for name, tensor in rest.items():
        at = name.rfind(".") + 1
        if name[:at] in found:
            found[name[:at]][name[at:]] = tensor
    return found


def _by_weights(leaves: Collection[str], groups: Iterable[Group]) -> dict[str, str]:
    """Name without dots -> with dots, by the weights beside it; nothing if most are not known."""
    known: dict[str, str] = {}
    for group in groups:
        depth = group.front.count(".")
        for tensor in group.tensors.values():
            segments = tensor.name.split(".")
            for at in range(depth + 1):
                known.setdefault("".join(segments[at:]), ".".join(segments[at:]))
    found = {leaf: known[leaf] for leaf in leaves if leaf in known}
    return found if 2 * len(found) > len(leaves) else {}


def _of_leftovers(leaves: Iterable[str]) -> set[str]:
    """Names without dots of what is left out anyway."""
    return set(leftovers(leaves, joined=True))


# --- by the keys of known parts -------------------------------------------------------------------


def _by_tables(leaves: Collection[str]) -> dict[str, str]:
    """Name without dots -> with dots, by the keys of known parts; nothing if most are not known."""
    keys = _keys()
    endings = sorted(keys, key=len, reverse=True)
    fronts = Counter[str]()
    for leaf in leaves:
        skeleton = _NUMBERS.sub("#", leaf)
        ending = next((one for one in endings if skeleton.endswith(one)), None)
        if ending is not None:
            fronts[skeleton.removesuffix(ending)] += 1
    if not fronts:
        return {}
    front, _ = fronts.most_common(1)[0]
    found = {}
    for leaf in leaves:
        key = leaf.removeprefix(front)
        for pattern in keys.get(_NUMBERS.sub("#", key), ()):
            if match := pattern.fullmatch(key):
                found[leaf] = ".".join(filter(None, [front, *match.groups()]))
                break
    return found if 2 * len(found) > len(leaves) else {}


@cache
def _keys() -> dict[str, list[re.Pattern[str]]]:
    """Known keys without dots and with `#` for numbers -> patterns whose groups are segments."""
    patterns: dict[str, dict[str, None]] = {}
    for candidate in candidates("ldm"):
        if candidate.table.about.get("alone"):
            continue  # a file of its own, not a part of one that holds an average
        prefix = candidate.table.prefix
        for key in candidate.links:
            segments = key.removeprefix(prefix).split(".")
            skeleton = _NUMBERS.sub("#", "".join(segments))
            patterns.setdefault(skeleton, {})[_pattern(segments)] = None
    return {key: [re.compile(one) for one in found] for key, found in patterns.items()}


def _pattern(segments: list[str]) -> str:
    """A regex whose groups are segments; of numbers side by side only the first may be long."""
    pieces = []
    previous = ""
    for segment in segments:
        if not segment.isdigit():
            pieces.append(f"({re.escape(segment)})")
        else:
            pieces.append(r"(\d)" if previous.isdigit() else r"(\d+)")
        previous = segment
    return "".join(pieces)
