"""keras-hub's Stable Diffusion 3 and 3.5: the whole backbone, its preset, or a model of it that was
saved alone.

Keys are those of the backbone's weights, with ranks in place of numbers; what its files look like
is data: `mappings/facts/kerashub.toml`.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from ...errors import ConversionError
from ...mappings.errors import MappingError
from ...mappings.expressions import evaluate
from ...mappings.facts import facts
from ..checkpoint import Checkpoint
from .keras_component import OPTIMIZER, OTHER, Save
from .keras_names import Leaves, Paths, ranked, stem
from .keras_saves import KerasFile
from .source import Source

_Names = tuple[str, ...]
_Fronts = dict[_Names, str | None]
"""Groups around layers -> the part of a backbone whose layers they are; None: its parts are."""

_MOST = 1 << 16  # of heads and channels; what a config says of them is not taken for more


def reads(source: Source) -> bool:
    """Whether a file holds layers of keras-hub."""
    saved = source.saved
    if saved is None:
        return False
    known = facts("kerashub")
    told = {*known["names"]["marks"], *known["refused"]}
    return _is_adapter(saved) or not told.isdisjoint(_classes(saved))


def parts(source: Source) -> list[Checkpoint]:
    """The components in a file of keras-hub.

    Raises:
        ConversionError: the file is damaged or hostile, or holds an adapter or a model that is not
            converted.
    """
    saved = source.saved
    assert saved is not None
    _refuse(saved)
    save = Save("kerashub", source.path, saved.form, saved.files, source.lora_alpha)
    fronts = _fronts(saved.paths)
    names = _numbered(saved.paths, fronts)
    groups, skipped = _grouped(saved.paths, fronts, names)
    save.check_number(len(groups))
    components = []
    for (front, part), paths in groups.items():
        placed = save.placed(partial(_leaves, fronts=fronts, names=names), paths)
        root = "/".join(front if fronts[front] else (*front, part))
        _check_whole(saved, placed)
        components.append(_described(save.component(root, placed, skipped), saved.config))
    if not components:
        raise ConversionError(
            f"{source.path}: a file of keras-hub, but none of its layers belong to a Stable"
            " Diffusion 3"
        )
    if len(components) == 1:
        components[0].root = ""  # nothing to tell apart
    return components


def _classes(saved: KerasFile) -> set[str]:
    """The classes of all layers."""
    return {stem(name) for name in {name for path in saved.paths for name in path}}


def _is_adapter(saved: KerasFile) -> bool:
    known = facts("kerashub")["adapter"]["groups"]
    return bool(saved.paths) and all(path[0] in known for path in saved.paths)


def _refuse(saved: KerasFile) -> None:
    """Name what is not converted."""
    known = facts("kerashub")
    classes = _classes(saved)
    reasons = [reason for name, reason in known["refused"].items() if name in classes]
    if _is_adapter(saved):
        reasons.append(known["adapter"]["reason"])
    if reasons:
        raise ConversionError(f"{saved.path}: {reasons[0]}")


def _check_whole(saved: KerasFile, leaves: Leaves) -> None:
    """Refuse a part without what lies beside it in a backbone."""
    known = facts("kerashub")
    there = {layer.partition(".")[0] for layer in leaves}
    for part, beside in known["needs"].items():
        if part in there and beside not in there:
            raise ConversionError(f"{saved.path}: {known['needed'][beside]}")


# --- from groups to the keys of a backbone --------------------------------------------------------


def _fronts(paths: Iterable[_Names]) -> _Fronts:
    """Where the layers of backbones, and of models of them that were saved alone, lie."""
    known = facts("kerashub")
    found: _Fronts = {}
    for path in paths:
        for depth, name in enumerate(path[:-1]):
            cls = stem(name)
            if cls in known["names"]["parts"] or cls in known["alone"]:
                found.setdefault(path[:depth], known["alone"].get(cls))
                break
    return found


def _numbered(paths: Iterable[_Names], fronts: _Fronts) -> dict[_Names, str]:
    """Path of a layer whose name is numbered -> its class and rank."""
    known = facts("kerashub")["names"]
    beside: dict[_Names, dict[str, None]] = defaultdict(dict)
    for path in paths:
        for depth in range(len(path) - 1):
            if path[:depth] in fronts or path[max(depth - 1, 0)] in known["lists"]:
                beside[path[:depth]][path[depth]] = None
    classes = partial(_class_of, renamed=known["renamed"])
    return {
        (*group, name): place
        for group, names in beside.items()
        for name, place in ranked(names, classes).items()
    }


def _class_of(name: str, renamed: Mapping[str, str]) -> str:
    """The class in a numbered name, as the newest keras-hub calls it."""
    return renamed.get(stem(name), stem(name))


def _grouped(
    paths: Paths, fronts: _Fronts, names: Mapping[_Names, str]
) -> tuple[dict[tuple[_Names, str], Paths], dict[str, str]]:
    """(front, part of a backbone) -> its variables; names that are left out -> the reason."""
    known = facts("kerashub")
    groups: dict[tuple[_Names, str], Paths] = defaultdict(dict)
    skipped: dict[str, str] = {}
    for path, tensor in paths.items():
        front = _front(path, fronts)
        part = None if front is None else _part(path, front, fronts[front], names)
        aside = [reason for name, reason in known["skipped"].items() if name in path]
        if "optimizer" in path[:-1]:
            aside = [OPTIMIZER]
        if front is None or part is None or aside:
            skipped[tensor.name] = aside[0] if aside else OTHER
        else:
            groups[front, part][path] = tensor
    return groups, skipped


def _front(path: _Names, fronts: _Fronts) -> _Names | None:
    """The groups around the layer that a variable belongs to."""
    found = (path[:depth] for depth in range(len(path) - 2) if path[:depth] in fronts)
    return next(found, None)


def _part(
    path: _Names, front: _Names, model: str | None, names: Mapping[_Names, str]
) -> str | None:
    """The part of a backbone that a variable belongs to, `clip_text_encoder.1`, if to any."""
    known = facts("kerashub")
    if model is not None:
        return f"{model}.0"
    cls, _, rank = names[path[: len(front) + 1]].partition(".")
    if cls not in known["names"]["parts"]:
        return None
    return f"{known['joined'].get(cls, cls)}.{rank}"


def _leaves(paths: Paths, fronts: _Fronts, names: Mapping[_Names, str]) -> Leaves:
    """The variables of a part by the key of their layer in a backbone."""
    lists = facts("kerashub")["names"]["models"]
    leaves: Leaves = defaultdict(dict)
    for path, tensor in paths.items():
        front = _front(path, fronts) or ()
        model = fronts[front]
        ends = range(len(front) + 1, len(path) - 1)
        place = [names.get(path[:end], path[end - 1]) for end in ends]
        if path[-2] != "vars":
            place.append(path[-2])
        inner = [name for name in place if name not in lists]
        key = ".".join([f"{model}.0", *inner] if model else inner)
        leaves[key][path[-1]] = tensor
    return leaves


# --- what names and shapes do not tell ------------------------------------------------------------


def _described(component: Checkpoint, config: Mapping[str, Any] | None) -> Checkpoint:
    """A component with what is known of its config."""
    known = facts("kerashub")
    stated: dict[str, dict[str, Any]] = defaultdict(dict)
    for kind, options in known["shapes"].items():
        for option, place in options.items():
            pattern, axis = place.split()
            for key in fnmatch.filter(component.tensors, pattern)[:1]:
                stated[kind][option] = component.tensors[key].shape[int(axis)]
    said = config or {}
    for cls, kinds in known["configs"].items():
        if said.get("class_name") != cls:
            continue
        for kind, options in kinds.items():
            stated[kind] |= _said(options, said.get("config"))
    component.stated = stated
    return component


def _said(options: Mapping[str, str], config: object) -> dict[str, int]:
    """What a config of Keras says of options; nothing where it makes no sense."""
    if not isinstance(config, dict):
        return {}
    found = {}
    for option, expression in options.items():
        try:
            value = evaluate(expression, config)
        except MappingError:
            continue
        if isinstance(value, int) and 0 < value <= _MOST:
            found[option] = value
    return found
