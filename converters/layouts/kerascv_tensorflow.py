"""Keras models in TensorFlow's formats: checkpoints, SavedModels and Keras 3 exports."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...errors import ConversionError
from ..checkpoint import Checkpoint, Loss, Tensor
from ..planning.candidates import Candidate, candidates
from ..readers.bundles import find_bundle
from ..readers.tensorflow import Bundle, read_bundle
from .keras_component import MAX_COMPONENTS, OPTIMIZER, OTHER, Save
from .keras_names import Leaves
from .kerascv_layers import Graph, model_layers
from .source import Source

_VARIABLES = {"weight": "kernel", "bias": "bias"}
_FACTORS = ("lora_kernel_a", "lora_kernel_b")
_LOST_LISTS = Loss(
    "res_block.",
    "saved by Keras 3 `tf.train.Checkpoint`, which loses layers kept in Python lists: {count}"
    " weights of the ResBlocks are not in the file; save again with"
    " `model.save_weights('name.weights.h5')`",
)


def read_tensorflow(source: Source) -> list[Checkpoint]:
    """The components of a TensorFlow checkpoint or SavedModel.

    Raises:
        ConversionError: it is damaged, or none is there.
    """
    prefix = find_bundle(source.path)
    if prefix is None:
        raise ConversionError(f"{source.path}: no TensorFlow checkpoint found")
    bundle = read_bundle(prefix)
    saved_model = (prefix.parent.parent / "saved_model.pb").is_file()
    form = "SavedModel" if saved_model else "TensorFlow checkpoint"
    save = Save("kerascv", source.path, form, bundle.files, source.lora_alpha)
    graph = Graph(bundle.graph)
    components = graph.components(MAX_COMPONENTS + 1)
    save.check_number(len(components))
    if not components and any(key.startswith("_all_variables/") for key in bundle.tensors):
        return [_exported(save, bundle)]
    if not components:
        raise ConversionError(
            f"{source.path}: a TensorFlow checkpoint, but no component of a model is among its"
            " objects"
        )
    used: set[str] = set()
    checkpoints = []
    for root, layers in components.items():
        leaves = graph.leaves(layers, bundle.tensors)
        used |= {tensor.name for variables in leaves.values() for tensor in variables.values()}
        component = save.component(root, leaves, bundle.skipped)
        checkpoints.append(replace(component, loss=_LOST_LISTS))
    unused = {key: _reason(key) for key in bundle.tensors if key not in used}
    for checkpoint in checkpoints:
        checkpoint.skipped |= unused
    return checkpoints


def _reason(key: str) -> str:
    if key.startswith("_all_variables/"):
        return "a second copy of `variables/`"
    if "optimizer" in key or ".OPTIMIZER_SLOT" in key:
        return OPTIMIZER
    return OTHER


def _exported(save: Save, bundle: Bundle) -> Checkpoint:
    """Keras 3 `export`: variables by position; `_all_variables` holds each a second time."""
    numbered: dict[int, Tensor] = {}
    skipped: dict[str, str] = {}
    for key, tensor in bundle.tensors.items():
        number = re.fullmatch(r"variables/(\d{1,9})/\.ATTRIBUTES/VARIABLE_VALUE", key)
        if number:
            numbered[int(number[1])] = tensor
        else:
            skipped[key] = _reason(key)
    export = replace(save, form="Keras 3 export", files=list(bundle.files))
    variables = [numbered[position] for position in sorted(numbered)]
    skipped |= bundle.skipped
    named = _named(variables)
    if named is not None:
        return export.checkpoint(named, skipped)
    leaves = _with_factors(variables)
    if leaves is not None:
        return export.component("", leaves, skipped)
    unnamed = {f"variables.{position}": numbered[position] for position in sorted(numbered)}
    return export.checkpoint(unnamed, skipped)


def _named(variables: Sequence[Tensor]) -> Mapping[str, Tensor] | None:
    """Variables under the keys of the part whose shapes fit, in the order of `model.weights`."""
    ranks = [len(variable.shape) for variable in variables]
    for candidate in candidates("kerascv"):
        order = _order(candidate)
        if [len(candidate.shapes[key]) for key in order] == ranks:
            return dict(zip(order, variables, strict=True))
    return None


def _order(candidate: Candidate) -> list[str]:
    layers = model_layers(candidate.part, candidate.links)
    return [key for _, keys in layers for key in keys]


def _with_factors(variables: Sequence[Tensor]) -> Leaves | None:
    """The same with two factors of LoRA behind the variables of some layers."""
    for candidate in candidates("kerascv"):
        leaves = _leaves(candidate, variables)
        if leaves is not None:
            return leaves
    return None


def _leaves(candidate: Candidate, variables: Sequence[Tensor]) -> Leaves | None:
    """The variables by layer, if they are those of a part and factors."""
    by_layer: dict[str, list[str]] = {}
    for key in _order(candidate):
        layer, _, name = key.rpartition(".")
        by_layer.setdefault(layer, []).append(name)
    leaves: Leaves = {}
    at = 0
    for layer, names in by_layer.items():
        own = variables[at : at + len(names)]
        ranks = [len(candidate.shapes[f"{layer}.{name}"]) for name in names]
        if [len(one.shape) for one in own] != ranks:
            return None
        at += len(names)
        found = {_VARIABLES[name]: one for name, one in zip(names, own, strict=True)}
        if _are_factors(own[0].shape, variables[at : at + 2]):
            found |= dict(zip(_FACTORS, variables[at : at + 2], strict=True))
            at += 2
        leaves[layer] = found
    return leaves if at == len(variables) else None


def _are_factors(kernel: tuple[int, ...], following: Sequence[Tensor]) -> bool:
    """Whether two variables are factors of a kernel, of a rank that is lower than its own."""
    if len(following) < 2 or len(kernel) < 2 or not following[1].shape:
        return False
    rank = following[1].shape[0]
    shapes = [(*kernel[:-1], rank), (rank, kernel[-1])]
    return rank < min(kernel[-2:]) and [one.shape for one in following] == shapes
