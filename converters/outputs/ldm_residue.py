"""What a diffusers repo cannot hold of an original checkpoint: with it the way back is exact.

Schedule buffers, `position_ids`, OpenCLIP's last layer, moving averages, spellings of keys and
metadata go to `<repo>.residue.safetensors`; `--to ldm` finds it there and puts everything back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...errors import ConversionError
from ...io.documents import parse_json
from ...mappings.errors import MappingError
from ...mappings.families import Family
from ...mappings.layouts import CANONICAL
from ...mappings.library import load_table
from ..checkpoint import Checkpoint, Tensor
from ..planning.candidates import Candidate, candidates
from ..planning.plan import PlannedComponent
from ..readers.safetensors import read_safetensors
from ..writers.safetensors import Output

_FORMAT = "weightport_residue"


@dataclass(frozen=True)
class Residue:
    """The rest of an original checkpoint.

    Attributes:
        tensors: original key -> tensor.
        keys: key by the table -> key in the original, where the two differ.
        metadata: of the original: the training step, what its header says.
        tables: component -> the table that writes it, where that is not the usual one.
        shapes: key in the original -> its shape, where the table gives another of as many numbers.
        repeats: key in the original of a tensor that is there twice -> key by the table of the
            other one.
    """

    tensors: Mapping[str, Tensor]
    keys: Mapping[str, str]
    metadata: Mapping[str, str]
    tables: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    repeats: Mapping[str, str] = field(default_factory=dict)

    def writer(
        self, component: PlannedComponent, family: Family, half: str | None = None
    ) -> Candidate:
        """The table that writes a component, or a half of it.

        Raises:
            ConversionError: there is none, or the component lacks tensors that it needs.
        """
        name = self.tables.get(component.name)
        if name is None:
            return written_by(component, family, half)
        return Candidate(load_table(name), family, component.config, given=component.expected)


def residue_path(repo: Path) -> Path:
    """Where the residue of a repo lies."""
    return repo.with_name(f"{repo.name}.residue.safetensors")


def written_by(component: PlannedComponent, family: Family, half: str | None = None) -> Candidate:
    """The table that writes a component into an original checkpoint.

    Args:
        half: the part of the component to write, where its originals have a file for each half;
            of one that is not whole, the half that is there.

    Raises:
        ConversionError: there is none, or the component lacks tensors that it needs.
    """
    missing = component.missing
    tables = {
        candidate.part: candidate
        for candidate in candidates("ldm")
        if candidate.family == family
        and candidate.component is component.described
        and not candidate.table.about.get("read_only")
    }
    there = [part for part, one in tables.items() if not any(map(one.table.covers, missing))]
    if missing and not there:
        raise ConversionError(
            f"{component.name}: {len(missing)} tensors are lacking, {missing[0]} among them"
        )
    if not tables:
        raise ConversionError(f"{component.name}: no table writes it for {family.title}")
    part = half if half in there else component.name if component.name in there else there[0]
    written = replace(tables[part], config=component.config, given=component.expected)
    try:
        _ = written.links
    except MappingError as error:
        raise ConversionError(
            f"{component.name}: original checkpoints have no names for it ({error})"
        ) from None
    return written


def residue_of(components: Mapping[str, PlannedComponent], family: Family) -> Residue | None:
    """The residue of the original checkpoint that components come from.

    None if they come from no single one.
    """
    whole = _whole(components)
    if whole is None:
        return None
    names = _names_in(whole, components)
    used: set[str] = set()
    written: set[str] = set()  # also what a VAE from elsewhere takes the place of
    keys = {}
    tables = {}
    shapes = {}
    for component in components.values():
        for tensor in component.tensors.values():
            used.update(names[id(source)] for source in tensor.sources if id(source) in names)
        writer = written_by(component, family)
        reader = _read_by(component, family)
        if reader is not None and _pairs(reader) != _pairs(writer):
            writer = reader
            tables[component.name] = reader.table.name
        for link in dict.fromkeys(writer.links.values()):
            key = link.sources[0]
            source = component.tensors[link.targets[0]].sources[0]
            original = names.get(id(source), key)
            if original != key:
                keys[key] = original
            if id(source) in names and whole.tensors[original].shape != source.shape:
                shapes[original] = whole.tensors[original].shape
            written.add(original)
    repeats = dict(_repeats(components, names))
    rest = {
        key: tensor
        for key, tensor in whole.tensors.items()
        if key not in used and key not in written and key not in repeats
    }
    return Residue(rest, keys, whole.metadata, tables, shapes, repeats)


def _names_in(whole: Checkpoint, components: Mapping[str, PlannedComponent]) -> dict[int, str]:
    """`id` of each tensor that comes from the original -> its name there."""
    parts = [part for component in components.values() for part in component.parts]
    return {
        id(tensor): tensor.name
        for part in parts
        if part.checkpoint.whole is whole
        for tensor in part.checkpoint.tensors.values()
    }


def _repeats(
    components: Mapping[str, PlannedComponent], names: Mapping[int, str]
) -> Iterator[tuple[str, str]]:
    """Original key of each tensor that is there twice, and the key by the table of the other."""
    for component in components.values():
        for part in component.parts:
            tensors = part.checkpoint.tensors
            table = part.candidates[0].table
            for key, other in table.same.items():
                if key in tensors and id(tensors[key]) in names:
                    yield names[id(tensors[key])], table.prefix + other


def _read_by(component: PlannedComponent, family: Family) -> Candidate | None:
    """The table by which an original checkpoint gave a component."""
    if len(component.parts) != 1 or component.parts[0].checkpoint.whole is None:
        return None
    return component.parts[0].of_family(family.name)


def _pairs(candidate: Candidate) -> dict[tuple[str, ...], str]:
    """Which tensors are one in the original, and how they are arranged there."""
    return {link.targets: str(link.op) for link in candidate.links.values()}


def _whole(components: Mapping[str, PlannedComponent]) -> Checkpoint | None:
    """The one original checkpoint that components are parts of, if they are of one."""
    wholes = {}
    for component in components.values():
        for part in component.parts:
            whole = part.checkpoint.whole
            if whole is not None:
                wholes[id(whole)] = whole
    return next(iter(wholes.values())) if len(wholes) == 1 else None


def residue_outputs(residue: Residue) -> tuple[list[Output], dict[str, str]]:
    """The tensors and the header metadata of a residue file."""
    outputs = [
        Output(key, tensor.dtype, tensor.shape, (tensor,))
        for key, tensor in residue.tensors.items()
    ]
    metadata = {
        _FORMAT: "1",
        "keys": json.dumps(residue.keys),
        "metadata": json.dumps(residue.metadata),
    }
    seldom = {"tables": residue.tables, "shapes": residue.shapes, "repeats": residue.repeats}
    for name, content in seldom.items():
        if content:
            metadata[name] = json.dumps(content)
    return outputs, metadata


def read_residue(repo: Path) -> Residue | None:
    """The residue beside a repo, if there is one.

    Raises:
        ConversionError: the file is there but is no residue.
    """
    path = residue_path(repo)
    if not path.is_file():
        return None
    file = read_safetensors(path)
    try:
        if file.metadata[_FORMAT] != "1":
            raise KeyError(_FORMAT)
        texts = file.metadata["keys"], file.metadata["metadata"]
    except KeyError:
        raise ConversionError(
            f"{path}: not a residue file of this version; remove it or use --no-residue"
        ) from None
    keys, metadata = (parse_json(text, path, "texts") for text in texts)
    tables = parse_json(file.metadata.get("tables", "{}"), path, "texts")
    shapes = parse_json(file.metadata.get("shapes", "{}"), path, "shapes")
    repeats = parse_json(file.metadata.get("repeats", "{}"), path, "texts")
    return Residue(file.tensors, keys, metadata, tables, shapes, repeats)


def source_repo(components: Mapping[str, PlannedComponent]) -> Path | None:
    """The one diffusers repo that components come from, if they do."""
    parts = [part for component in components.values() for part in component.parts]
    layouts = {part.checkpoint.layout for part in parts}
    paths = {part.checkpoint.path for part in parts}
    return paths.pop() if layouts == {CANONICAL} and len(paths) == 1 else None
