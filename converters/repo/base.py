"""The files of a diffusers repo that components were taken from: they go on being theirs."""

from __future__ import annotations

from pathlib import Path

from ...mappings.layouts import CANONICAL
from ..layouts.folders import inside
from ..planning.plan import PlannedComponent


def base_file(component: PlannedComponent | None, name: str) -> Path | None:
    """A file of the repo that a whole component was taken from, if that is where it comes from."""
    if component is None:
        return None
    if any(part.checkpoint.layout != CANONICAL for part in component.parts):
        return None
    repo = component.parts[0].checkpoint.path
    return inside(repo, repo / name) if (repo / name).is_file() else None


def base_config(component: PlannedComponent) -> Path | None:
    """The `config.json` that a component came with."""
    root = component.parts[0].checkpoint.root
    return base_file(component, str(Path(root, "config.json")))
