"""Adapters as output: modules under the names of a convention, their tensors bit for bit.

Nothing is rounded, and what a convention has no place for is refused by name. The header keeps what
the way back needs, see `adapters_record`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...adapters.alphas import KEY, Alphas
from ...adapters.marks import BUNDLED
from ...adapters.modules import Adapter, Module
from ...adapters.patterns import ONLY
from ...errors import ConversionError, printable
from ...io import atomic
from ...mappings.conventions import Convention, conventions
from ..checkpoint import Tensor
from ..layouts.adapters import AdapterFile, weight_shape
from ..settings import Settings
from ..writers.safetensors import Output, WrittenFile, write_safetensors
from .adapters_fusion import Regrouped, regrouped
from .adapters_record import RECORD, STALE, Place, Record, number_tensor

_BARE = "text_model."  # which transformers 5 leaves out of names, so patterns do without

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Respelled:
    """An adapter under other names.

    Attributes:
        metadata: the header's.
        configs: component -> PEFT's config, where the header states alphas.
    """

    outputs: list[Output]
    metadata: dict[str, str]
    configs: dict[str, dict[str, Any]]


def respelled(file: AdapterFile, adapter: Adapter[Tensor], convention: Convention) -> Respelled:
    """The tensors of an adapter under a convention's names.

    Raises:
        ConversionError: the convention has no place for one; names it.
    """
    record = Record.read(file, convention.name)
    groups = regrouped(file, adapter, convention, record.ranks)
    plain = _plain(file, adapter, groups, convention)
    metadata = {
        key: value
        for key, value in file.checkpoint.metadata.items()
        if key not in (KEY, RECORD, *STALE)
    }
    configs: dict[str, dict[str, Any]] = {}
    if convention.alphas == "header":
        configs = _configs(file, [module for _, _, module in groups.modules])
        metadata[KEY] = _header(configs)
    outputs = record.restored(plain)
    metadata = record.header(metadata)
    came_from = conventions()[origin(adapter)]
    if came_from != convention and came_from.is_written and not record.origin:
        made = Respelled(outputs, metadata, configs)
        back = _back(file, adapter, made, came_from, groups.ranks)
        before = {
            (*place, role): tensor
            for place, module in adapter.modules.items()
            for role, tensor in module.tensors.items()
        }
        metadata[RECORD] = Record.of(file, came_from.name, before, back, groups.ranks).text()
    return Respelled(outputs, metadata, configs)


def _plain(
    file: AdapterFile, adapter: Adapter[Tensor], groups: Regrouped, convention: Convention
) -> dict[Place, Output]:
    """The tensors as the convention writes them."""
    outputs = {}
    for naming, layer, module in groups.modules:
        _check(file, module, convention)
        for role, tensor in _tensors(module, convention).items():
            ending = layer.leaf if role == "whole" else convention.ending(naming, role)
            key = f"{layer.name}.{ending}"
            shape = _shape(adapter.family, module, role, tensor, convention)
            place = (module.component, module.path, role)
            outputs[place] = Output(key, tensor.dtype, shape, (tensor,))
    for name, tensor in adapter.bundled.items():
        if convention.alphas != "tensors":
            raise ConversionError(
                f"{file.path}: holds the embedding `{printable(name)}`, for which"
                f" {convention.title} has no place; --to kohya keeps it"
            )
        outputs["", name, ""] = Output(BUNDLED + name, tensor.dtype, tensor.shape, (tensor,))
    return outputs


def _back(
    file: AdapterFile,
    adapter: Adapter[Tensor],
    made: Respelled,
    origin: Convention,
    ranks: Mapping[str, list[int]],
) -> dict[Place, Output]:
    """What the way back from an output would give, without a record but for ranks."""
    tensors = {out.key: replace(out.sources[0], shape=out.shape) for out in made.outputs}
    checkpoint = replace(file.checkpoint, tensors=tensors, metadata=made.metadata)
    there = AdapterFile(checkpoint, Alphas.parse(made.metadata))
    there_sorted = there.sorted_for(adapter.family)
    groups = regrouped(there, there_sorted, origin, ranks)
    return _plain(there, there_sorted, groups, origin)


def write(
    made: Respelled, output: Path, settings: Settings, progress: Callable[[int, int], None]
) -> WrittenFile:
    """Write an adapter, one `.safetensors` file.

    Raises:
        ConversionError: the name is no `.safetensors`.
    """
    if output.suffix != ".safetensors":
        raise ConversionError(f"{output}: name the adapter `something.safetensors`")
    total = sum(out.nbytes for out in made.outputs)
    with atomic.file(output, settings.overwrite, settings.sync) as path:
        atomic.check_space(output.absolute().parent, total)
        written = write_safetensors(
            path.parent,
            path.name,
            made.outputs,
            max_shard_size=2 * total + 1,
            metadata=made.metadata,
            progress=lambda n: progress(n, total),
            hashes=settings.hashes,
            sync=settings.sync,
        )
        if written.nonfinite and not settings.allow_nan:
            first = next(iter(written.nonfinite))
            raise ConversionError(
                f"{output}: `{printable(first)}` holds NaN or Inf (and"
                f" {len(written.nonfinite) - 1} more do); --allow-nan writes them anyway"
            )
    return written.files[0]


# --- names and shapes -----------------------------------------------------------------------------


def origin(adapter: Adapter[Tensor]) -> str:
    """The convention that most modules have."""
    return Counter(one.convention for one in adapter.modules.values()).most_common(1)[0][0]


def _check(file: AdapterFile, module: Module[Tensor], convention: Convention) -> None:
    """Refuse a module for which a convention has no place."""
    name = f"{file.path}: `{printable(module.name)}`"
    title = convention.title
    if convention.flavours and module.flavour not in convention.flavours:
        raise ConversionError(
            f"{name} is {module.title}, for which {title} has no place; --expand makes a LoRA of"
            " LoHa and LoKr, and baking takes everything"
        )
    for role in convention.lacks:
        if role in module.tensors:
            advice = "; --expand merges it" if role == "mid" else ""
            raise ConversionError(f"{name} has a {role}, for which {title} has no place{advice}")
    if convention.alphas == "nowhere" and module.factor != 1:
        raise ConversionError(
            f"{name} has the strength {module.factor:g} (alpha / rank), and {title} has no alphas"
        )
    if module.is_decomposed and convention.rows_only and not module.is_by_row:
        raise ConversionError(
            f"{name} is DoRA along input channels, and {title} has magnitudes of rows only"
        )


def _tensors(module: Module[Tensor], convention: Convention) -> dict[str, Tensor]:
    """Role -> tensor, with the alpha as a tensor or without."""
    tensors = dict(module.tensors)
    if convention.alphas != "tensors":
        tensors.pop("alpha", None)
        tensors.pop("scale", None)
    elif "alpha" not in tensors and module.alpha is not None:
        tensors["alpha"] = number_tensor("alpha", module.alpha, tensors["down"].dtype, ())
    return tensors


def _shape(
    family: str, module: Module[Tensor], role: str, tensor: Tensor, convention: Convention
) -> Shape:
    """The shape of a tensor: as it is, but magnitudes of rows and factors of PEFT's are those of
    their layer."""
    shape = tensor.shape
    weight = weight_shape(family, module)
    if role == "magnitude" and module.is_by_row:
        return _rows(module.height, weight, convention)
    if role in ("down", "up") and convention.rows_only:
        return _as_layer(shape, weight)
    return shape


def _rows(height: int, weight: Shape, convention: Convention) -> Shape:
    """The shape of magnitudes of rows: PEFT's are (o,) for linear layers, (1, o, 1, 1) for
    convolutions."""
    ones = (1,) * (len(weight) - 2)
    if not convention.rows_only:
        return height, 1, *ones
    return (1, height, *ones) if ones else (height,)


def _as_layer(shape: Shape, weight: Shape) -> Shape:
    """A factor with as many axes as its layer: a 1x1 convolution is a linear layer."""
    if len(weight) == 2 and len(shape) > 2 and set(shape[2:]) == {1}:
        return shape[:2]
    if len(weight) == 4 and len(shape) == 2 and weight[2:] == (1, 1):
        return *shape, 1, 1
    return shape


# --- what a header says of alphas -----------------------------------------------------------------


def _configs(file: AdapterFile, every: Sequence[Module[Tensor]]) -> dict[str, dict[str, Any]]:
    """PEFT's config of each component: the most common rank and alpha, and what differs."""
    configs = {}
    for component in dict.fromkeys(one.component for one in every if one.rank):
        modules = [one for one in every if one.component == component and one.rank]
        decomposed = [one for one in modules if one.is_decomposed]
        if decomposed and len(decomposed) < len(modules):
            plain = next(one for one in modules if not one.is_decomposed)
            raise ConversionError(
                f"{file.path}: `{printable(plain.name)}` is no DoRA, though others of the"
                f" {component} are, which PEFT has no way to say"
            )
        ranks = {_target(one): one.rank for one in modules}
        alphas = {_target(one): one.factor * one.rank for one in modules}
        rank = Counter(ranks.values()).most_common(1)[0][0]
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        configs[component] = {
            "alpha_pattern": _but(alphas, alpha),
            "lora_alpha": _short(alpha),
            "lora_bias": any("up_bias" in one.tensors for one in modules),
            "peft_type": "LORA",
            "r": rank,
            "rank_pattern": _but(ranks, rank),
            "target_modules": sorted(ranks),
            "use_dora": bool(decomposed),
            "use_rslora": False,
        }
    return configs


def _target(module: Module[Tensor]) -> str:
    """The name that PEFT matches with the ends of its modules' names."""
    return module.path.removeprefix(_BARE)


def _but(values: Mapping[str, float], common: float) -> dict[str, float]:
    """Pattern -> value, of those modules that have another."""
    ends = {name[at + 1 :] for name in values for at, sign in enumerate(name) if sign == "."}
    return {
        ONLY + name if name in ends else name: _short(value)
        for name, value in values.items()
        if value != common
    }


def _short(value: float) -> float:
    """A whole number without its point."""
    return int(value) if value == int(value) else value


def _header(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """All configs in one, as diffusers writes them."""
    content = {
        f"{component}.{option}": value
        for component, config in configs.items()
        for option, value in config.items()
    }
    return json.dumps(content, indent=2, sort_keys=True)
