"""Original Stable Diffusion checkpoints: one file of many parts becomes one `Checkpoint` per part.

Keys keep the prefixes that the ldm tables know; a file of one part only, which lacks them, gets
them. Moving averages (LitEma flattens their names by removing the dots) are decoded against the key
list of the model, never guessed. What else such files hold is data: `mappings/facts/ldm.toml`.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np

from ...errors import ConversionError, printable
from ...mappings.facts import facts
from ...mappings.families import families
from ...mappings.library import all_tables
from ..checkpoint import FLOATS, Checkpoint, Tensor
from ..planning.keys import brief
from ..planning.recognise import candidates
from .ldm_evidence import CONFIGS, FINAL_ALPHA, MARKERS, betas_config, is_marker

UNET = "model.diffusion_model"  # where the UNet lies
_EMA = "model_ema."
_PRECISE = ("F32", "F64")  # half precision tells how a schedule ends, not how it began
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


def is_ldm(checkpoint: Checkpoint) -> bool:
    """Whether the keys of a checkpoint are those of the original layout (or of one of its
    parts)."""
    keys = checkpoint.tensors
    known = (*_prefixes(), *_bare(keys), _EMA)
    return any(key.startswith(known) for key in keys) and not any(
        key.startswith(_DIFFUSERS) for key in keys
    )


def refuse_unsupported(checkpoint: Checkpoint) -> None:
    """Name a model of another architecture, of which a part may well look like one of ours.

    Raises:
        ConversionError: the checkpoint holds a tensor that only such a model has.
    """
    tensors = checkpoint.tensors
    for pattern, model in facts("ldm")["unsupported"].items():
        for key in fnmatch.filter(tensors, pattern):
            _refuse(checkpoint, key, model)
    for place, model in facts("ldm")["unsupported_sizes"].items():
        pattern, axis, size = place.split()
        for key in fnmatch.filter(tensors, pattern):
            if tensors[key].shape[int(axis) :][:1] == (int(size),):
                _refuse(checkpoint, key, model)


def _refuse(checkpoint: Checkpoint, key: str, model: str) -> NoReturn:
    raise ConversionError(
        f"{checkpoint.path}: looks like {model} (`{printable(key)}`), which is not supported;"
        f" supported are {', '.join(family.title for family in families().values())} and their"
        " ControlNets"
    )


def named_by_diffusers(raw: Checkpoint) -> Checkpoint:
    """A file of one part under diffusers' names; what is not the model is left out, markers become
    metadata."""
    skipped = dict(raw.skipped)
    tensors = _without_skipped(raw.tensors, skipped)
    return replace(raw, layout="diffusers", tensors=tensors, skipped=skipped, metadata=_stated(raw))


def split(raw: Checkpoint, ema: bool) -> list[Checkpoint]:
    """The parts of an original checkpoint, tensors that belong to none of them as an unknown one.

    Args:
        ema: take the moving average of the UNet's weights. A file that holds nothing else gives it
            anyway.

    Raises:
        ConversionError: a UNet has no average, or no tensor at all belongs to a model.
    """
    skipped = dict(raw.skipped)
    tensors = _with_ema(raw, _without_skipped(_renamed(raw.tensors), skipped), skipped, ema)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        prefix = next((prefix for prefix in _prefixes() if key.startswith(prefix)), "")
        groups.setdefault(prefix, {})[key] = tensor
    if not groups:
        raise ConversionError(f"{raw.path}: none of its tensors belong to a Stable Diffusion model")
    stated = _stated(raw)
    return [
        replace(
            raw,
            tensors=group,
            skipped=skipped,
            layout="ldm",
            root=prefix.rstrip("."),
            metadata=stated,
            whole=raw,
        )
        for prefix, group in groups.items()
    ]


@lru_cache(maxsize=1)
def _prefixes() -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(table.prefix for table in all_tables() if table.about["layout"] == "ldm")
    )


def _bare(keys: Iterable[str]) -> dict[str, str]:
    """Beginnings of keys that lack the prefix of their part -> the same with it."""
    aliases: dict[str, str] = {}
    for bare in facts("ldm")["bare"].values():
        if any(key.startswith(bare["marker"]) for key in keys):
            for front in bare["keys"]:
                aliases.setdefault(
                    front, bare["prefix"] + front.removeprefix(bare.get("strip", ""))
                )
    return aliases


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys with the prefixes that the tables know."""
    aliases = _bare(tensors)
    renamed = {}
    for key, tensor in tensors.items():
        front = next((front for front in aliases if key.startswith(front)), "")
        renamed[aliases[front] + key.removeprefix(front) if front else key] = tensor
    return renamed


def _without_skipped(tensors: Mapping[str, Tensor], skipped: dict[str, str]) -> dict[str, Tensor]:
    """The tensors that a table may know; the reasons for the others go to `skipped`."""
    for pattern, reason in facts("ldm")["skip"].items():
        for key in fnmatch.filter(tensors, pattern):
            skipped.setdefault(key, reason)
    return {key: tensor for key, tensor in tensors.items() if key not in skipped}


def _with_ema(
    raw: Checkpoint, tensors: dict[str, Tensor], skipped: dict[str, str], ema: bool
) -> dict[str, Tensor]:
    """The tensors with the moving average in place of the UNet's weights, or without it."""
    averages = {key: tensor for key, tensor in tensors.items() if key.startswith(_EMA)}
    plain = {key: tensor for key, tensor in tensors.items() if key not in averages}
    has_unet = any(key.startswith(f"{UNET}.") for key in plain)
    if not averages:
        if ema and has_unet:
            raise ConversionError(
                f"{raw.path}: --ema, but the file holds no moving average (model_ema.*)"
            )
        return plain
    if has_unet and not ema:
        skipped |= dict.fromkeys(averages, _NOT_TAKEN)
        return plain
    models = ({flat(key): key for key in c.links} for c in candidates("ldm") if c.part == "unet")
    names = max(models, key=lambda names: len(names.keys() & averages.keys()))
    unknown = [key for key in averages if key not in names]
    if unknown:
        raise ConversionError(
            f"{raw.path}: {len(unknown)} averages belong to no tensor of a UNet: {brief(unknown)}"
        )
    taken = {names[key]: tensor for key, tensor in averages.items()}
    skipped |= dict.fromkeys(plain.keys() & taken.keys(), _REPLACED)
    return plain | taken


def flat(key: str) -> str:
    """The name LitEma gives the average of a tensor: `model.` dropped and every dot removed."""
    return _EMA + key.removeprefix("model.").replace(".", "")


def _stated(raw: Checkpoint) -> dict[str, str]:
    """The metadata, and what tensors say of the prediction type and the schedule."""
    stated = {key: value for key, value in raw.metadata.items() if key not in MARKERS}
    stated |= {name: "present" for name in MARKERS if name in raw.tensors}
    configs: dict[str, Any] = {}
    for name in ("betas", "alphas_cumprod"):
        tensor = raw.tensors.get(name)
        if tensor is not None and tensor.dtype in FLOATS and tensor.shape == (1000,):
            values = tensor.numpy().astype(np.float64)
            kept = values if name == "alphas_cumprod" else np.cumprod(1 - values)
            stated[FINAL_ALPHA] = repr(float(kept[-1]))
            if tensor.dtype in _PRECISE and 0 < kept[-1] < kept[0] < 1:
                configs = {
                    f"scheduler.{option}": value for option, value in betas_config(kept).items()
                }
    for marker, options in facts("ldm")["edm"].items():
        if marker in raw.tensors:
            configs = {option: _value(raw.tensors, value) for option, value in options.items()}
    return stated | {
        CONFIGS: json.dumps(
            {option: value for option, value in configs.items() if value is not None}
        )
    }


def _value(tensors: Mapping[str, Tensor], value: Any) -> Any:
    """A value of a config; of a tensor's name the few numbers in it, or None if it is not there."""
    if not is_marker(value):
        return value
    tensor = tensors.get(value)
    if tensor is None or tensor.dtype not in FLOATS or math.prod(tensor.shape) not in (1, 4):
        return None
    numbers = [float(f"{number:.7g}") for number in tensor.numpy().ravel()]
    return numbers if len(numbers) > 1 else numbers[0]
