"""What became of the weights that adapters changed; filled in as they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint import Checkpoint
from .keys import brief

_MARKED = 0.02  # share of a change that rounding may take without a note


@dataclass
class Tally:
    """Squares of the norms of what was changed in one component.

    Attributes:
        weights: of the weights that change.
        changes: of the change of each adapter.
        change: of all of them together.
        lost: of what rounding took of it.
    """

    weights: float = 0.0
    changes: dict[int, float] = field(default_factory=dict)
    change: float = 0.0
    lost: float = 0.0


@dataclass
class Baked:
    """An adapter that was put into a model.

    Attributes:
        strengths: component -> how strongly.
        flavours: (component, flavour) -> number of modules.
        unmatched: tensors that belong to no module of the model, by the user's leave.
    """

    checkpoint: Checkpoint
    number: int
    strengths: dict[str, float]
    flavours: dict[tuple[str, str], int]
    unmatched: tuple[str, ...]


@dataclass
class Baking:
    """All adapters of a conversion, and what became of the weights that they change."""

    adapters: list[Baked] = field(default_factory=list)
    tallies: dict[str, Tally] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)

    def report(self, hashes: bool) -> list[dict[str, Any]]:
        """What `conversion.json` says of each adapter, once the weights are written."""
        return [self._entry(baked, hashes) for baked in self.adapters]

    def notes(self) -> list[str]:
        """What the user should know, once the weights are written."""
        notes = []
        for baked in self.adapters:
            name = baked.checkpoint.path.name
            flavours = ", ".join(
                f"{component} {count} x {title} at {baked.strengths[component]:g}"
                for (component, title), count in baked.flavours.items()
            )
            notes.append(f"baked in {name}: {flavours}")
            if baked.unmatched:
                notes.append(
                    f"{name}: {len(baked.unmatched)} tensors are left out, as they belong to no"
                    f" module: {brief(baked.unmatched)}"
                )
        for component, tally in self.tallies.items():
            lost = _share(tally.lost, tally.change)
            if lost > _MARKED:
                notes.append(
                    f"rounding to {self.dtypes[component]} took {lost:.0%} of the adapters' change"
                    f" of the {component}; a base in float32 keeps it"
                )
        return notes

    def _entry(self, baked: Baked, hashes: bool) -> dict[str, Any]:
        components: dict[str, dict[str, Any]] = {}
        for (component, title), count in baked.flavours.items():
            tally = self.tallies[component]
            entry = components.setdefault(
                component, {"strength": baked.strengths[component], "modules": {}}
            )
            entry["modules"][title] = count
            changed = tally.changes.get(baked.number, 0.0)
            entry["relative_change"] = _short(_share(changed, tally.weights))
            entry["lost_in_rounding"] = _short(_share(tally.lost, tally.change))
        files = baked.checkpoint.files
        return {
            "path": baked.checkpoint.path.name,
            "files": {file.path.name: file.sha256() for file in files} if hashes else {},
            "components": components,
            "left_out": list(baked.unmatched),
        }


def _share(part: float, whole: float) -> float:
    """The ratio of two norms, given their squares."""
    return math.sqrt(part / whole) if whole else 0.0


def _short(value: float) -> float:
    """Three digits, which are the same on every machine."""
    return float(f"{value:.3g}")
