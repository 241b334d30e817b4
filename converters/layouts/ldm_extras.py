"""What single files hold beside the tensors of a model: buffers, markers, a noise schedule."""

from __future__ import annotations

import itertools
import json
import math
import operator
from collections.abc import Mapping
from typing import Any

from ...io.dtypes import FLOATS
from ...mappings.facts import facts
from ..checkpoint import Checkpoint, Tensor
from .ldm_evidence import CONFIGS, FINAL_ALPHA, MARKERS, betas_config, is_marker

_PRECISE = ("F32", "F64")  # half precision tells how a schedule ends, not how it began
_STEPS = 1000


def stated(raw: Checkpoint, leftovers: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata, and what tensors say of the prediction type and the schedule.

    Args:
        leftovers: the tensors that lie beside the parts.
    """
    found = {key: value for key, value in raw.metadata.items() if key not in MARKERS}
    found |= {name: "present" for name in MARKERS if name in leftovers}
    configs: dict[str, Any] = {}
    for name in ("betas", "alphas_cumprod"):
        tensor = leftovers.get(name)
        if tensor is None or tensor.dtype not in FLOATS or tensor.shape != (_STEPS,):
            continue
        kept = _alphas_cumprod(name, tensor)
        found[FINAL_ALPHA] = repr(kept[-1])
        if tensor.dtype in _PRECISE and kept[-1] < kept[0] and all(0 < one < 1 for one in kept):
            options = betas_config(kept)
            configs = {f"scheduler.{option}": value for option, value in options.items()}
    for marker, options in facts("ldm")["edm"].items():
        if marker in leftovers:
            configs = {option: _value(leftovers, value) for option, value in options.items()}
    known = {option: value for option, value in configs.items() if value is not None}
    return found | {CONFIGS: json.dumps(known)}


def _alphas_cumprod(name: str, tensor: Tensor) -> list[float]:
    """The share of signal that is left after each training step."""
    values = tensor.numbers()
    if name == "alphas_cumprod":
        return values
    return list(itertools.accumulate((1 - value for value in values), operator.mul))


def _value(tensors: Mapping[str, Tensor], value: Any) -> Any:
    """A value of a config; of a tensor's name the few numbers in it, or None without it."""
    if not is_marker(value):
        return value
    tensor = tensors.get(value)
    if tensor is None or tensor.dtype not in FLOATS or math.prod(tensor.shape) not in (1, 4):
        return None
    numbers = [float(f"{number:.7g}") for number in tensor.numbers()]
    return numbers if len(numbers) > 1 else numbers[0]
