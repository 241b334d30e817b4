"""Refuses models of other kinds by name: `mappings/facts/unsupported.toml`.

Files and folders go one way here, and so do `inspect` and `convert`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ...errors import ConversionError, printable
from ...mappings.classes import is_known
from ...mappings.facts import facts
from ...mappings.families import families
from ...mappings.patterns import Names
from ..checkpoint import Checkpoint, Tensor

Tensors = Mapping[str, Tensor]
_DIFFUSERS = "_class_name"
_TRANSFORMERS = "architectures"
_QUANTISED = "quantization_config"


def refuse_unsupported(
    checkpoint: Checkpoint, place: Path | None = None, configured: bool = False
) -> None:
    """Name a model of another kind, of which a part may well look like one of ours.

    Args:
        place: what messages name, if not the file.
        configured: whether a config comes with it; then sizes alone say nothing.

    Raises:
        ConversionError: the checkpoint holds a tensor that only such a model has, or quantised
            ones.
    """
    tensors = checkpoint.tensors
    place = place or checkpoint.path
    for method, key in _fitting(tensors, facts("unsupported")["quantised"]):
        _refuse_quantised(place, method, f"`{printable(key)}`")
    for model, key in _fitting(tensors, _telling(tensors)):
        _refuse(place, model, key)
    sizes = {} if configured else facts("unsupported")["sizes"]
    for rule, model in sizes.items():
        pattern, axis, size = rule.split()
        for _, key in _fitting(tensors, {pattern: model}):
            if _has_size(tensors[key], int(axis), int(size)):
                _refuse(place, model, key)


def refuse_config(path: Path, config: Mapping[str, Any]) -> None:
    """Name a model whose config says that it is of another class, or quantised.

    Args:
        path: the folder of the config.
        config: the content of its `config.json`.

    Raises:
        ConversionError: it is.
    """
    refuse_quantised(path, config)
    name = other_class(config)
    if name is None:
        return
    what = described(name)
    said = f"{what} ({name})" if what else name
    raise ConversionError(
        f"{path}: its config.json says {said}, which is not supported;{_supported()}"
    )


def refuse_quantised(path: Path, config: Mapping[str, Any]) -> None:
    """Name the method by which a model was saved in few bits.

    Raises:
        ConversionError: it was.
    """
    quantised = config.get(_QUANTISED)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        _refuse_quantised(path, printable(str(method)[:40]), f"`{_QUANTISED}` in its config.json")


def refuse_pipeline_of(repo: Path, pipeline: str | None, folder: str, kind: str) -> NoReturn:
    """Name a repository by a model in it that is not converted.

    Args:
        pipeline: the class that its index names.
        folder: where the model lies.
        kind: its class.

    Raises:
        ConversionError: always.
    """
    what = described(kind)
    said = f"{what} ({kind})" if what else kind
    raise ConversionError(
        f"{repo}: a {pipeline or 'folder of models'}, whose {printable(folder)}/ is {said}, which"
        f" is not supported;{_supported()}"
    )


def class_of(config: Mapping[str, Any]) -> str | None:
    """The class that a config of diffusers or transformers names."""
    name = config.get(_DIFFUSERS)
    architectures = config.get(_TRANSFORMERS)
    if name is None and isinstance(architectures, list) and architectures:
        name = architectures[0]
    return printable(name) if isinstance(name, str) else None


def other_class(config: Mapping[str, Any]) -> str | None:
    """The class that a config names, if it is none of those that are converted.

    Of transformers' classes, whose names differ more than their tensors, it is one that is known.
    """
    name = class_of(config)
    if name is None or is_known(name):
        return None
    return name if _DIFFUSERS in config or described(name) is not None else None


def described(name: str) -> str | None:
    """What a class is that is not converted, in words."""
    for pattern, model in facts("unsupported")["classes"].items():
        if fnmatch.fnmatchcase(name, pattern):
            return str(model)
    return None


def _telling(tensors: Tensors) -> dict[str, str]:
    """The patterns of `[tensors]`, less those that say nothing beside what is there."""
    known = facts("unsupported")
    names = Names(tensors.keys())
    silent = {pattern for pattern, beside in known["beside"].items() if names.matching(beside)}
    return {pattern: model for pattern, model in known["tensors"].items() if pattern not in silent}


def _fitting(tensors: Tensors, patterns: Mapping[str, str]) -> list[tuple[str, str]]:
    """(what a pattern means, the first tensor that fits it), pattern by pattern."""
    names = Names(tensors.keys())
    return [
        (meaning, key) for pattern, meaning in patterns.items() for key in names.matching(pattern)
    ]


def _has_size(tensor: Tensor, axis: int, size: int) -> bool:
    return len(tensor.shape) > axis and tensor.shape[axis] == size


def _refuse(place: Path, model: str, key: str) -> NoReturn:
    raise ConversionError(
        f"{place}: looks like {model} (`{printable(key)}`), which is not supported;{_supported()}"
    )


def _refuse_quantised(place: Path, method: str, evidence: str) -> NoReturn:
    raise ConversionError(
        f"{place}: its weights are quantised with {method} ({evidence}), which is not supported;"
        " look for the model before that, or save it dequantised (model.dequantize() in diffusers)"
    )


def _supported() -> str:
    supported = ", ".join(family.title for family in families().values())
    return f" supported are {supported} and their ControlNets"
