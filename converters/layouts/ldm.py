"""Original Stable Diffusion checkpoints: one file of many parts becomes one `Checkpoint` per part.

Keys keep the prefixes that the ldm tables know; a file of one part only, which lacks them, gets
them. Names of moving averages, which have no dots, are those that the table `ldm_ema` spells. What
else such files hold is data: `mappings/facts/ldm.toml`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache

from ...errors import ConversionError
from ...mappings.facts import facts
from ...mappings.library import all_tables
from ..checkpoint import Checkpoint, Tensor
from ..planning.candidates import Candidate, candidates
from ..planning.keys import brief
from .ldm_extras import stated, without_extras
from .source import Source

_DIFFUSERS = (
    "down_blocks.",
    "up_blocks.",
    "mid_block.",
    "encoder.down_blocks.",
    "decoder.up_blocks.",
    "text_model.",
)
_NOT_TAKEN = "the moving average of the weights; --ema takes it instead of the weights themselves"
_REPLACED = "its moving average is taken instead, as --ema says"

Tensors = Mapping[str, Tensor]  # by key


def reads(source: Source) -> bool:
    """Whether this is a bare file of tensors under the original names, or those of one part."""
    if source.raw is None:
        return False
    keys = source.raw.tensors
    known = (*_prefixes("ldm"), *_prefixes("ldm_ema"), *_bare(keys))
    return any(key.startswith(known) for key in keys) and not any(
        key.startswith(_DIFFUSERS) for key in keys
    )


def parts(source: Source) -> list[Checkpoint]:
    """The parts of an original checkpoint; tensors that belong to none of them as an unknown one.

    A file that holds nothing but a moving average gives that, whether it is asked for or not.

    Raises:
        ConversionError: a UNet has no average, or no tensor at all belongs to a model.
    """
    raw = source.raw
    assert raw is not None
    skipped = dict(raw.skipped)
    named = without_extras(_renamed(raw.tensors), skipped)
    tensors = _with_averages(raw, named, skipped, source.ema)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        prefix = next((prefix for prefix in _prefixes("ldm") if key.startswith(prefix)), "")
        groups.setdefault(prefix, {})[key] = tensor
    if not groups:
        raise ConversionError(f"{raw.path}: none of its tensors belong to a Stable Diffusion model")
    metadata = stated(raw)
    return [
        replace(
            raw,
            tensors=group,
            skipped=skipped,
            layout="ldm",
            root=prefix.rstrip("."),
            metadata=metadata,
            whole=raw,
        )
        for prefix, group in groups.items()
    ]


@cache
def _prefixes(layout: str) -> tuple[str, ...]:
    """How the keys of each part begin."""
    tables = (table for table in all_tables() if table.about["layout"] == layout)
    return tuple(dict.fromkeys(table.beginning for table in tables))


def _bare(keys: Iterable[str]) -> dict[str, str]:
    """Beginnings of keys that lack the prefix of their part -> the same with it."""
    aliases: dict[str, str] = {}
    for bare in facts("ldm")["bare"].values():
        if any(key.startswith(bare["marker"]) for key in keys):
            for front in bare["keys"]:
                rest = front.removeprefix(bare.get("strip", ""))
                aliases.setdefault(front, bare["prefix"] + rest)
    return aliases


def _renamed(tensors: Tensors) -> dict[str, Tensor]:
    """Keys with the prefixes that the tables know."""
    aliases = _bare(tensors)
    renamed = {}
    for key, tensor in tensors.items():
        front = next((front for front in aliases if key.startswith(front)), None)
        if front is not None:
            key = aliases[front] + key.removeprefix(front)
        renamed[key] = tensor
    return renamed


# --- moving averages ------------------------------------------------------------------------------


def _with_averages(
    raw: Checkpoint, tensors: Tensors, skipped: dict[str, str], wanted: bool
) -> Tensors:
    """The tensors with the moving average in place of the UNet's weights, or without it."""
    beginnings = _prefixes("ldm_ema")
    averages = {key: tensor for key, tensor in tensors.items() if key.startswith(beginnings)}
    plain = {key: tensor for key, tensor in tensors.items() if key not in averages}
    weights = tuple({candidate.table.prefix for candidate in _averaged()})
    has_weights = any(key.startswith(weights) for key in plain)
    if not averages:
        if wanted and has_weights:
            raise ConversionError(
                f"{raw.path}: --ema, but the file holds no moving average (model_ema.*)"
            )
        return plain
    if has_weights and not wanted:
        skipped |= dict.fromkeys(averages, _NOT_TAKEN)
        return plain
    names = _weights_of(averages)
    unknown = [key for key in averages if key not in names]
    if unknown:
        raise ConversionError(
            f"{raw.path}: {len(unknown)} averages belong to no tensor of a UNet: {brief(unknown)}"
        )
    taken = {names[key]: tensor for key, tensor in averages.items()}
    skipped |= dict.fromkeys(plain.keys() & taken.keys(), _REPLACED)
    return plain | taken


def _averaged() -> list[Candidate]:
    """The parts whose averages files hold."""
    parts = {candidate.part for candidate in candidates("ldm_ema")}
    return [candidate for candidate in candidates("ldm") if candidate.part in parts]


def _weights_of(averages: Iterable[str]) -> Mapping[str, str]:
    """Name of an average -> key of the weight, of the model that has the most of them."""
    found = [_average_names(candidate) for candidate in candidates("ldm_ema")]
    return max(found, key=lambda names: len(names.keys() & set(averages)))


def _average_names(averages: Candidate) -> Mapping[str, str]:
    """Name of an average -> key of the weight, of one family."""
    (weights,) = (candidate for candidate in _averaged() if candidate.family == averages.family)
    keys = {link.targets: key for key, link in weights.links.items()}
    return {name: keys[link.targets] for name, link in averages.links.items()}
