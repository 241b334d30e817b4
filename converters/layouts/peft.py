"""Models with PEFT's layers inside: factors of LoRA are merged, modules trained whole are taken.

`W + alpha / rank * B @ A`: Hu et al., arXiv:2106.09685, section 4.1. Names:
peft/tuners/tuners_utils.py and peft/tuners/lora/layer.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import ConversionError, printable
from ..checkpoint import Computed, Tensor
from ..planning.keys import brief
from .groups import Group

if TYPE_CHECKING:
    from ...io.arrays import Array

_BASE = "base_layer"
_LEFT = ("lora_A", "lora_embedding_A")
_RIGHT = ("lora_B", "lora_embedding_B")
_SAVED = "modules_to_save"
_ORIGINAL = "original_module"
_TRAINED_WHOLE = "modules that PEFT trained whole are taken"

Tensors = Mapping[str, Tensor]


def merged(group: Group, alpha: float | None) -> Group:
    """The group with plain layers in place of PEFT's.

    Raises:
        ConversionError: LoRA without an alpha, adapters of another kind, or several of them.
    """
    tensors = _with_saved(group.tensors)
    if not any(f".{_BASE}." in key for key in tensors):
        saved = tensors is not group.tensors
        return replace(group, tensors=tensors, merged=_TRAINED_WHOLE if saved else "")
    modules = {key.rpartition(f".{_BASE}.")[0] for key in tensors if f".{_BASE}." in key}
    plain: dict[str, Tensor] = {}
    factors: dict[str, dict[str, Tensor]] = {module: {} for module in modules}
    for key, tensor in tensors.items():
        module = next((one for one in _parents(key) if one in modules), None)
        if module is None:
            plain[key] = tensor
            continue
        rest = key.removeprefix(f"{module}.")
        if rest.startswith(f"{_BASE}."):
            plain[f"{module}.{rest.removeprefix(_BASE + '.')}"] = tensor
        else:
            factors[module][rest] = tensor
    names = ", ".join(f"`{printable(name)}`" for name in _adapters(factors) if name)
    of = f" of the adapter {names}" if names else ""
    if alpha is None:
        raise ConversionError(
            f"holds layers of LoRA{of} by PEFT inside the model, in {len(modules)} modules, and no"
            " file says their alpha; give --lora-alpha to merge them (PEFT's default is 8)"
        )
    for module, own in factors.items():
        if own:
            key = f"{module}.weight"
            plain[key] = _merged(module, plain.get(key), own, alpha)
    told = f"LoRA{of} by PEFT is inside the model; --lora-alpha merges it"
    return replace(group, tensors=plain, merged=told)


def _parents(key: str) -> list[str]:
    segments = key.split(".")
    return [".".join(segments[:at]) for at in range(len(segments) - 1, 0, -1)]


def _with_saved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Modules that were trained whole, in place of what they were before."""
    if not any(f".{_SAVED}." in key for key in tensors):
        return tensors
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, saved, rest = key.partition(f".{_SAVED}.")
        if saved:
            plain = f"{module}.{rest.partition('.')[2]}"
            if plain in found:
                raise ConversionError(
                    f"`{printable(module)}` was trained by several adapters of PEFT; save the model"
                    " with one"
                )
            found[plain] = tensor
    for key, tensor in tensors.items():
        if f".{_SAVED}." not in key:
            found.setdefault(key.replace(f".{_ORIGINAL}.", "."), tensor)
    return found


def _adapters(factors: Mapping[str, Tensors]) -> list[str]:
    """The names of the adapters; one, or none where names do not have it.

    Raises:
        ConversionError: there are several, or one is no plain LoRA.
    """
    adapters: dict[str, None] = {}
    strange = []
    for module, own in factors.items():
        for rest in own:
            kind, _, name = rest.removesuffix(".weight").partition(".")
            if kind in _LEFT + _RIGHT:
                adapters[name] = None
            else:
                strange.append(f"{module}.{rest}")
    if strange:
        raise ConversionError(
            f"{len(strange)} tensors of PEFT inside the model are no factors of plain LoRA:"
            f" {brief(strange)}; merge them with PEFT's `merge_and_unload` and save the model"
        )
    if len(adapters) > 1:
        listed = ", ".join(f"`{printable(name)}`" for name in adapters)
        raise ConversionError(
            f"holds LoRA of {len(adapters)} adapters by PEFT, {listed}, and no file says which are"
            " active; merge them with PEFT's `merge_and_unload`, or save the model with one"
        )
    return list(adapters)


def _merged(module: str, weight: Tensor | None, own: Tensors, alpha: float) -> Tensor:
    """The weight of one module with its factors."""
    a = _factor(own, _LEFT)
    b = _factor(own, _RIGHT)
    if weight is None or a is None or b is None:
        raise ConversionError(f"`{printable(module)}` has only some of the tensors of a LoRA layer")
    embedding = any(rest.startswith(_LEFT[1]) for rest in own)
    rank = a.shape[0] if a.shape else 0
    fits = (
        rank > 0
        and len(b.shape) > 1
        and b.shape[1] == rank
        and _size(b) * _size(a) == rank * rank * _size(weight)
    )
    if not fits:
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise ConversionError(
            f"`{printable(module)}`: LoRA factors {shapes} do not fit a weight {list(weight.shape)}"
        )

    def merge(base: Array, left: Array, right: Array) -> Array:
        import numpy as np

        scale = np.float32(alpha / rank)
        rows = right.astype(np.float32).reshape(-1, rank)
        columns = left.astype(np.float32).reshape(rank, -1)
        change = rows @ columns
        change = change.T if embedding else change
        return base.astype(np.float32) + scale * change.reshape(base.shape)

    inputs = (weight, a, b)
    how = f"LoRA, alpha {alpha:g}"
    return Computed(weight.name, weight.dtype, weight.shape, inputs, merge, how)


def _factor(own: Tensors, kinds: tuple[str, ...]) -> Tensor | None:
    found = [tensor for rest, tensor in own.items() if rest.partition(".")[0] in kinds]
    return found[0] if len(found) == 1 else None


def _size(tensor: Tensor) -> int:
    return math.prod(tensor.shape)
