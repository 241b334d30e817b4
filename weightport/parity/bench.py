"""The bench: where the frameworks get the same inputs and hand in what they make of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..differences import Array
from ..io.documents import read_json
from .drawing import NAME, Drawing
from .frameworks import OURS, Framework, frameworks
from .inputs import Arrays, inputs
from .layers import Layer, compare_layers, first_fault
from .measure import measure, tolerance
from .pairs import Pair
from .process import run_process
from .result import Check
from .weights import Weights, compare_weights

Progress = Callable[[int, int], None]


@dataclass
class Bench:
    """Where the runs take place, and what they reported."""

    folder: Path
    dtype: str
    latent_side: int
    source_python: str
    progress: Progress
    reports: dict[str, Any] = field(default_factory=dict)

    def judge(
        self, pairs: Sequence[Pair], layers: bool, drawing: Drawing | None = None
    ) -> list[Check]:
        """Run all pairs on both sides, the source's first, and compare.

        Args:
            drawing: an image that the same processes draw at the end, if any.
        """
        total = sum(1 + len(pair.semantics) for pair in pairs)
        total += 1 + len(drawing.semantics) if drawing else 0
        step = partial(self.progress, 1, total)
        self.run_theirs(pairs, layers, step, drawing)
        self.run_ours(pairs, layers, step, drawing)
        return [self.check(pair) for pair in pairs]

    def run_theirs(
        self,
        pairs: Sequence[Pair],
        layers: bool,
        step: Callable[[], None],
        drawing: Drawing | None = None,
    ) -> None:
        """Run the other side of pairs, one framework after the other."""
        for pair in pairs:
            self.give(pair.name, inputs(pair.call, pair.config, self.latent_side))
        if drawing:
            self.give(NAME, drawing.inputs())
        for name in dict.fromkeys(pair.framework.name for pair in pairs):
            own = [pair for pair in pairs if pair.framework.name == name]
            checks = [pair.their_check(self.latent_side) for pair in own]
            if drawing and drawing.framework.name == name:
                checks.append(drawing.their_check())
            self.run(name, name, checks, layers, step)

    def run_ours(
        self,
        pairs: Sequence[Pair],
        layers: bool,
        step: Callable[[], None],
        drawing: Drawing | None = None,
    ) -> None:
        """Run our side of pairs, once with the source's maths and once with that of diffusers."""
        drawn = drawing.semantics if drawing else ()
        for semantics in _in_order([*(pair.semantics for pair in pairs), drawn]):
            checks = [pair.our_check(semantics) for pair in pairs if semantics in pair.semantics]
            if drawing and semantics in drawn:
                _, version = self.version(drawing.framework)
                checks.append(drawing.our_check(semantics, version))
            self.run(OURS, our_label(semantics), checks, layers, step)

    def version(self, framework: Framework) -> tuple[str, str]:
        """The package of a framework that was run, and its version."""
        versions: dict[str, str] = self.reports[framework.name]["versions"]
        return next(entry for entry in versions.items() if entry[0] != "python")

    def check(self, pair: Pair) -> Check:
        """The verdict, from what both sides wrote."""
        weights = weights_of(pair)
        rounded = list(weights.rounded) if weights else []
        allowed = tolerance(pair.name, self.dtype, rounded)
        expected = self.outputs(pair.framework.name, pair.name)
        errors = []
        layers = []
        for name in map(our_label, pair.semantics):
            ours = self.outputs(name, pair.name)
            errors.append(measure(ours[: len(expected)], expected))
            layers.append(self._layers(name, pair))
        good = errors[0].relative_l2 <= allowed
        return Check(
            name=pair.name,
            component=pair.component.name,
            against=pair.framework.name,
            source=pair.source.absolute().name,
            weights=weights,
            tolerance=allowed,
            matched=errors[0],
            as_diffusers=errors[1] if len(errors) > 1 else None,
            layers=layers[0],
            diffusers_layers=layers[1] if len(layers) > 1 else (),
            fault=None if good else first_fault(layers[0], allowed, pair.rows),
        )

    def give(self, name: str, arrays: Arrays) -> None:
        """The inputs of a check."""
        np.savez(self._inputs(name), allow_pickle=False, **arrays)

    def run(
        self,
        framework: str,
        label: str,
        checks: Sequence[dict[str, Any]],
        layers: bool,
        step: Callable[[], None],
    ) -> None:
        """Run a framework on checks, in a process of its own.

        What it reports is kept under the label.
        """
        job = self.folder / "job.json"
        report = self.folder / "report.json"
        given = [self._placed(check, label, layers) for check in checks]
        job.write_text(json.dumps({"checks": given, "report": str(report)}), encoding="utf-8")
        run_process(frameworks()[framework], job, self.source_python, step)
        self.reports[label] = read_json(report)

    def outputs(self, label: str, name: str) -> list[Array]:
        """What the run with this label handed in for a check."""
        with np.load(self._file(label, name, "outputs")) as arrays:
            return [arrays[f"output {i}"] for i in range(len(arrays.files))]

    def _placed(self, check: dict[str, Any], label: str, layers: bool) -> dict[str, Any]:
        """A check with the places of its inputs and of what is to be written."""
        name = check["name"]
        return {
            **check,
            "dtype": self.dtype,
            "inputs": str(self._inputs(name)),
            "outputs": str(self._file(label, name, "outputs")),
            "layers": str(self._file(label, name, "layers")),
            "watch": check["watch"] if layers else {},
        }

    def _layers(self, label: str, pair: Pair) -> tuple[Layer, ...]:
        our_file = self._file(label, pair.name, "layers")
        their_file = self._file(pair.framework.name, pair.name, "layers")
        if not (our_file.exists() and their_file.exists()):
            return ()
        with np.load(our_file) as ours, np.load(their_file) as theirs:
            return tuple(compare_layers(ours, theirs))

    def _inputs(self, name: str) -> Path:
        return self.folder / f"{name}.inputs.npz"

    def _file(self, label: str, name: str, kind: str) -> Path:
        return self.folder / f"{name}.{label}.{kind}.npz"


def weights_of(pair: Pair) -> Weights | None:
    """The comparison of the source with the repo, if both sides do not read the repo."""
    if pair.part is None:
        return None
    return compare_weights(pair.part, pair.family.name, pair.component.tensors)


def _in_order(semantics: Sequence[Sequence[str]]) -> list[str]:
    """Each kind of maths once: those of sources, then the others."""
    first = [kinds[0] for kinds in semantics if kinds]
    others = [kind for kinds in semantics for kind in kinds[1:]]
    return list(dict.fromkeys([*first, *others]))


def our_label(semantics: str) -> str:
    """What our runs with these semantics are called."""
    return f"weightport, {semantics} semantics"
