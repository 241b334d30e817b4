"""What a header says of alphas, where they are no tensors: diffusers' `lora_adapter_metadata`, and
the `adapter_config.json` of PEFT's folders.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import printable
from .patterns import Patterns

KEY = "lora_adapter_metadata"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""The names that it gives them."""
_BARE = "text_model."  # which transformers 5 leaves out of names


@dataclass(frozen=True)
class Alphas:
    """The alphas that a header states.

    Attributes:
        configs: component -> PEFT's config of it; under an empty name one for any component.
    """

    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def parse(cls, metadata: Mapping[str, str]) -> Alphas:
        """Read the metadata of a file.

        Raises:
            ValueError: it cannot be read.
        """
        text = metadata.get(KEY)
        if text is None:
            return cls()
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"the JSON of its {KEY} cannot be read") from None
        if not isinstance(content, dict):
            raise ValueError(f"its {KEY} is no JSON object")
        configs: dict[str, dict[str, Any]] = {}
        for name, value in content.items():
            component, _, option = name.partition(".")
            configs.setdefault(component, {})[option] = value
        return cls({component: _checked(config) for component, config in configs.items()})

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Alphas:
        """Of an `adapter_config.json`.

        Raises:
            ValueError: it cannot be read.
        """
        kind = config.get("peft_type", "LORA")
        if kind != "LORA":
            raise ValueError(f"its adapter_config.json is of PEFT's {printable(str(kind))}")
        return cls({"": _checked(config)})

    def of(self, component: str, path: str, rank: int) -> float | None:
        """The alpha of a module of that rank; None if nothing states one."""
        config = self.configs.get(component) or self.configs.get("")
        if config is None:
            return None
        patterns: Patterns = config["alpha_pattern"]
        stated = patterns.first(path)
        if stated is None and path.startswith(_BARE):
            stated = patterns.first(path.removeprefix(_BARE))
        alpha = config["lora_alpha"] if stated is None else stated
        if alpha is None:
            return None
        return float(alpha) * math.sqrt(rank) if config.get("use_rslora") else float(alpha)


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose alphas are numbers, by the names of modules."""
    alpha = config.get("lora_alpha")
    if alpha is not None and not _is_number(alpha):
        raise ValueError(f"its lora_alpha is {printable(str(alpha))}, not a number")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("its alpha_pattern does not map names to numbers")
    for pattern, value in patterns.items():
        if not _is_number(value):
            raise ValueError(f"its alpha_pattern `{printable(pattern)}` has no number")
    try:
        read = Patterns(patterns)
    except ValueError as error:
        raise ValueError(
            f"its alpha_pattern `{printable(str(error))}` is no pattern of names of modules that is"
            " understood here"
        ) from None
    return {**config, "lora_alpha": alpha, "alpha_pattern": read}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
