"""The model that a checkpoint's tensors are: its config as names and shapes tell it, or as it is
stated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...mappings.classes import ModelClass
from ...mappings.errors import MappingError
from ...mappings.families import Component, families
from ...mappings.reading import Options, ShapeOf
from ...mappings.table import Table
from ..checkpoint import Checkpoint
from .candidates import Candidate, Shape

Config = Mapping[str, Any]


def interpretations(table: Table, checkpoint: Checkpoint) -> list[list[Candidate]]:
    """What the tensors may be as a table spells them, the surest first.

    Each has a candidate for every family that such a model may belong to, the likeliest first.
    """
    if table.about.get("fixed"):
        return []
    components = _components(table)
    model = next(iter(components.values())).model
    known = {*model.options, *model.untold}
    said = checkpoint.stated.get(model.name, {})
    stated = {option: value for option, value in said.items() if option in known}
    shape_of = _shape_of(table, checkpoint)
    has_sign = _has_sign(table, model, shape_of)
    if checkpoint.config is not None:
        named = checkpoint.config.class_name
        if named != model.name and (named or not has_sign):
            return []
        found = [_stated(table, components, checkpoint, model.stated(checkpoint.config.options))]
    else:
        found = []
    told = _told(table, model, shape_of) if has_sign else None
    if told is not None and stated:
        found.append(_read(table, components, told | _of(stated, told), stated))
    if told is not None:
        found.append(_read(table, components, table.adjusted(told), stated))
    if told is not None and table.adjust:
        plain = _read(table, components, told, stated)
        found += [plain] if plain[0].likeness == 1 else []
    return found


def _components(table: Table) -> dict[str, Component]:
    """Family -> the component that a table fills."""
    return {family: families()[family].filled_by(table) for family in table.about["families"]}


def _has_sign(table: Table, model: ModelClass, shape_of: ShapeOf) -> bool:
    """Whether one of the tensors is there of which every such model has one.

    Those that the table makes say nothing.
    """
    signs = [sign for sign in model.signs if sign not in table.make]
    try:
        return not signs or any(shape_of(sign, {}) is not None for sign in signs)
    except MappingError:
        return False


def _told(table: Table, model: ModelClass, shape_of: ShapeOf) -> Options | None:
    """What tensors tell of a config; None if they are those of no such model."""
    try:
        told = model.read(shape_of)
        table.adjusted(told)  # raises where they lack what that depends on
        return told
    except MappingError:
        return None


def _shape_of(table: Table, checkpoint: Checkpoint) -> ShapeOf:
    """What gives the shapes of the tensors, under the names that the model has for them."""
    prefix = table.prefix
    tensors = checkpoint.tensors

    def source_shape(name: str) -> Shape | None:
        found = tensors.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        return None if found is None else found.shape

    return table.shapes_of(source_shape)


def _of(stated: Config, told: Options) -> Options:
    """What is stated of the options that tensors tell."""
    return {option: value for option, value in stated.items() if option in told}


def _read(
    table: Table, components: Mapping[str, Component], told: Options, stated: Options
) -> list[Candidate]:
    configs = {family: one.config_for(told, stated) for family, one in components.items()}
    return _ranked(table, components, configs, None)


def _stated(
    table: Table, components: Mapping[str, Component], checkpoint: Checkpoint, config: Config
) -> list[Candidate]:
    """What a config says; where a class does not know all of it, that it is right."""
    model = next(iter(components.values())).model
    given = None
    if not model.describes(config):
        given = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
    configs = {family: one.completed(config) for family, one in components.items()}
    return _ranked(table, components, configs, given)


def _ranked(
    table: Table,
    components: Mapping[str, Component],
    configs: Mapping[str, Config],
    given: Mapping[str, tuple[int, ...]] | None,
) -> list[Candidate]:
    """The candidates of the families that a model may belong to."""
    model = next(iter(components.values())).model
    stock = {family: component.config for family, component in components.items()}
    alike = [family for family in stock if model.built_alike(configs[family], stock[family])]
    if alike:
        return [Candidate(table, families()[name], configs[name], 1.0, given) for name in alike]
    marked = {name: model.marked_alike(configs[name], stock[name]) for name in stock}
    ranked = [
        Candidate(
            table,
            families()[name],
            configs[name],
            model.likeness(configs[name], stock[name]),
            given,
        )
        for name in stock
        if marked[name] == max(marked.values())
    ]
    return sorted(ranked, key=lambda candidate: -candidate.likeness)
