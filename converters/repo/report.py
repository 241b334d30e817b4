"""`conversion.json`: what was converted, from what, by which tables, and what was left out and
why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..planning.plan import PlannedComponent, PlannedTensor
from ..planning.recognise import Recognition


def conversion_report(
    *,
    family: str,
    components: Mapping[str, PlannedComponent],
    sha256: Mapping[str, str],
    options: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
    notes: Sequence[str],
    adapters: Sequence[Mapping[str, Any]],
    embeddings: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of `conversion.json`; deterministic: no times, no absolute paths.

    Args:
        sha256: source file name -> digest.
        files: repo file -> its size and sha256.
        adapters: what changed the weights of the sources.
        embeddings: what words were added to them.
    """
    from importlib import metadata  # takes 2 MB, so not before the weights are written

    parts = [part for component in components.values() for part in component.parts]
    tables = {
        table.name: table.sha256 for table in (part.of_family(family).table for part in parts)
    }
    return {
        "weightport_version": metadata.version("weightport"),
        "family": family,
        "sources": [_source(part, sha256) for part in parts],
        **({"adapters": list(adapters)} if adapters else {}),
        **({"embeddings": list(embeddings)} if embeddings else {}),
        "tables": dict(sorted(tables.items())),
        "options": dict(options),
        "notes": list(notes),
        "components": {
            name: {key: _tensor(tensor) for key, tensor in component.tensors.items()}
            for name, component in components.items()
        },
        "files": dict(files),
    }


def _source(part: Recognition, sha256: Mapping[str, str]) -> dict[str, Any]:
    checkpoint = part.checkpoint
    return {
        "path": checkpoint.path.name,
        "root": part.root,
        "format": checkpoint.format,
        "part": part.part,
        "evidence": list(part.evidence),
        "files": {
            file.path.name: sha256[str(file.path)]
            for file in checkpoint.files
            if str(file.path) in sha256
        },
        "dropped": part.skipped,
    }


def _tensor(tensor: PlannedTensor) -> dict[str, Any]:
    entry: dict[str, Any] = {"source": [source.name for source in tensor.sources]}
    if tensor.op is not None:
        entry["op"] = str(tensor.op)
    how = [source.how for source in tensor.sources if hasattr(source, "how")]
    if how:
        entry["computed"] = how
    return entry
