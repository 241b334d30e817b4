"""Keras models in TensorFlow's formats: checkpoints, SavedModels and Keras 3 exports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from ...errors import ConversionError
from ..checkpoint import Checkpoint, Loss, Tensor
from ..planning.candidates import candidates
from ..readers.tensorflow import Bundle, find_bundle, read_bundle
from .kerascv_component import MAX_COMPONENTS, OPTIMIZER, OTHER, Save
from .kerascv_layers import Graph, model_layers
from .source import Source

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
    save = Save(source.path, form, bundle.files, source.lora_alpha)
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
    return export.checkpoint(_named(numbered), skipped | bundle.skipped)


def _named(numbered: Mapping[int, Tensor]) -> Mapping[str, Tensor]:
    """Variables under the keys of the part whose shapes fit, in the order of `model.weights`.

    Where none fits they keep their numbers.
    """
    positions = sorted(numbered)
    variables = [numbered[position] for position in positions]
    ranks = [len(variable.shape) for variable in variables]
    for candidate in candidates("kerascv"):
        layers = model_layers(candidate.part, candidate.links)
        order = [key for _, keys in layers for key in keys]
        if [len(candidate.shapes[key]) for key in order] == ranks:
            return dict(zip(order, variables, strict=True))
    return {f"variables.{position}": numbered[position] for position in positions}
