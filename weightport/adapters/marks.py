"""What tells files that change a model from models, without the modules that read them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..mappings.facts import facts
from .shapes import Shaped

BUNDLED = "bundle_emb."
"""How the names of embeddings in a file of LoRA begin."""
CONFIG = "adapter_config.json"
"""What PEFT puts beside the weights of a folder."""


def is_adapter(names: Collection[str]) -> bool:
    """Whether the tensors of a file change a model rather than being one.

    A model may hold some that do: PEFT saves a model that it has changed with both.
    """
    marks = facts("adapters")["marks"]
    endings = tuple(marks["endings"])
    beginnings = tuple(marks["beginnings"])
    marked = [name for name in names if name.endswith(endings) or name.startswith(beginnings)]
    return len(marked) > len(names) * marks["share"] and not any(
        marks["of_models"] in name for name in names
    )


def is_embedding(tensors: Mapping[str, Shaped]) -> bool:
    """Whether the tensors of a file are words and no more."""
    return bool(tensors) and all(_is_word(name, one) for name, one in tensors.items())


def _is_word(name: str, tensor: Shaped) -> bool:
    """Whether a tensor is vectors of a word, or what lies beside such."""
    known = facts("embeddings")
    beginnings = (known["nameless"]["map"], *known["beside"]["names"], BUNDLED)
    if name in known["roles"] or name.startswith(beginnings):
        return True
    is_token = "." not in name or (name.startswith("<") and name.endswith(">"))
    widths = known["widths"]["known"]
    return is_token and len(tensor.shape) in (1, 2) and tensor.shape[-1] in widths
