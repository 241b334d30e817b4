"""The parts in one file of tensors, whosever names they have.

What was put around the names, beside the weights and inside them comes off here, before a part is
recognised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ...errors import ConversionError
from ...mappings.layouts import CANONICAL
from ...mappings.names import unused
from ..checkpoint import Checkpoint, Tensor
from .averages import choose
from .dotless import read_dotless
from .groups import Group, attach
from .ldm_configs import stated_configs
from .ldm_extras import stated
from .peft import merged
from .source import Source


def parts_of(source: Source) -> list[Checkpoint]:
    """The parts of a file; tensors that belong to none of them as an unknown one.

    A file that holds nothing but a moving average gives that, whether it is asked for or not.

    Raises:
        ConversionError: no tensor at all belongs to a model, names leave a choice, or LoRA factors
            are inside a model and no alpha is given.
    """
    raw = source.raw
    found = source.split
    assert raw is not None
    skipped = {**raw.skipped, **found.reasons}
    try:
        dotless, rest = read_dotless(found.groups, found.rest, skipped, source.ema)
        chosen = choose([*found.groups, *dotless], source.ema)
        groups = [merged(group, source.lora_alpha) for group in chosen.groups]
    except ConversionError as error:
        raise ConversionError(f"{raw.path}: {error}") from None
    skipped |= chosen.skipped
    unknown = attach(groups, _without_beside(raw, groups, rest, skipped))
    if raw.tensors and not groups and not unknown:
        raise ConversionError(f"{raw.path}: none of its tensors belong to a Stable Diffusion model")
    file = replace(
        raw,
        skipped=skipped,
        layout=found.layout,
        metadata=stated(raw, found.leftovers),
        stated=stated_configs(raw.metadata),
    )
    averages = {group.front for group in chosen.averages}
    whole = _whole(raw, skipped, groups) if found.layout != CANONICAL else None
    parts = [_part(group, file, whole, group.front in averages) for group in groups]
    if unknown or not parts:
        parts.append(replace(file, tensors=unknown, is_strange=True))
    return parts


def _part(group: Group, file: Checkpoint, whole: Checkpoint | None, average: bool) -> Checkpoint:
    return replace(
        file,
        tensors=group.tensors,
        layout=group.layout or file.layout,
        root=group.place,
        naming=group.naming,
        unused=unused(group.kind, group.tensors),
        taken_off=group.taken_off,
        average=average,
        whole=whole,
    )


def _without_beside(
    raw: Checkpoint, groups: Iterable[Group], rest: Mapping[str, Tensor], skipped: dict[str, str]
) -> dict[str, Tensor]:
    """Tensors of no part less those in dicts beside the weights that hold nothing of a part."""
    if not raw.beside:
        return dict(rest)
    used = {tensor.name for group in groups for tensor in group.tensors.values()}
    kept = dict(rest)
    for beside, words in raw.beside.items():
        front = f"{beside}."
        if any(name.startswith(front) for name in used):
            continue
        left = [name for name in kept if name.startswith(front)]
        if left:
            skipped[beside] = words
        for name in left:
            del kept[name]
    return kept


def _whole(raw: Checkpoint, skipped: Mapping[str, str], groups: list[Group]) -> Checkpoint | None:
    """The file that the parts are of, for the way back; None where a part is no longer in it."""
    if any(group.merged for group in groups):
        return None
    left = tuple(f"{one}." for one in raw.beside if one in skipped)
    tensors = {name: one for name, one in raw.tensors.items() if not name.startswith(left)}
    return replace(raw, tensors=tensors)
