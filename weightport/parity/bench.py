"""The bench: a folder through which the frameworks get the same inputs and hand in what they make
of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

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

    def judge(self, pairs: Sequence[Pair], layers: bool) -> list[Check]:
        """Run all pairs on both sides, the source's first, and compare."""
        total = sum(1 + len(pair.semantics) for pair in pairs)
        step = partial(self.progress, 1, total)
        self.run_theirs(pairs, layers, step)
        self.run_ours(pairs, layers, step)
        return [self.check(pair) for pair in pairs]

    def run_theirs(self, pairs: Sequence[Pair], layers: bool, step: Callable[[], None]) -> None:
        """Run the other side of pairs, one framework after the other."""
        for pair in pairs:
            self.give(pair.name, inputs(pair.name, pair.config, self.latent_side))
        for runner in dict.fromkeys(pair.against for pair in pairs):
            checks = [
                pair.their_check(self.latent_side) for pair in pairs if pair.against == runner
            ]
            self.run(runner, runner, checks, layers, step)

    def run_ours(self, pairs: Sequence[Pair], layers: bool, step: Callable[[], None]) -> None:
        """Run our side of pairs, once with the source's maths and once with that of diffusers."""
        for semantics in ("kerascv", "diffusers"):
            checks = [pair.our_check(semantics) for pair in pairs if semantics in pair.semantics]
            if checks:
                self.run("weightport", _label(semantics), checks, layers, step)

    def check(self, pair: Pair) -> Check:
        """The verdict, from what both sides wrote."""
        weights = weights_of(pair)
        allowed = tolerance(pair.name, self.dtype, list(weights.rounded) if weights else [])
        expected = self.outputs(pair.against, pair.name)
        errors, layers = [], []
        for label in map(_label, pair.semantics):
            errors.append(measure(self.outputs(label, pair.name)[: len(expected)], expected))
            layers.append(self._layers(label, pair))
        return Check(
            name=pair.name,
            component=pair.component.name,
            against=pair.against,
            source=pair.source.absolute().name,
            weights=weights,
            tolerance=allowed,
            matched=errors[0],
            as_diffusers=errors[1] if len(errors) > 1 else None,
            layers=layers[0],
            diffusers_layers=layers[1] if len(layers) > 1 else (),
            fault=None
            if errors[0].relative_l2 <= allowed
            else first_fault(layers[0], allowed, pair.rows),
        )

    def give(self, name: str, arrays: Arrays) -> None:
        """The inputs of a check."""
        np.savez(self.folder / f"{name}.inputs.npz", allow_pickle=False, **arrays)

    def run(
        self,
        runner: str,
        label: str,
        checks: Sequence[dict[str, Any]],
        layers: bool,
        step: Callable[[], None],
    ) -> None:
        """Run a framework on checks, in a process of its own; what it reports is kept under the
        label."""
        for check in checks:
            name = check["name"]
            check |= {kind: str(self._file(label, name, kind)) for kind in ("outputs", "layers")}
            check |= {"inputs": str(self.folder / f"{name}.inputs.npz"), "dtype": self.dtype}
            check["watch"] = check["watch"] if layers else {}
        report = self.folder / "report.json"
        (self.folder / "job.json").write_text(json.dumps({"checks": checks, "report": str(report)}))
        run_process(runner, self.folder / "job.json", self.source_python, step)
        self.reports[label] = json.loads(report.read_text())

    def outputs(self, label: str, name: str) -> list[np.ndarray[Any, Any]]:
        """What the run with this label handed in for a check."""
        with np.load(self._file(label, name, "outputs")) as arrays:
            return [arrays[f"output {i}"] for i in range(len(arrays.files))]

    def _layers(self, label: str, pair: Pair) -> tuple[Layer, ...]:
        paths = (
            self._file(label, pair.name, "layers"),
            self._file(pair.against, pair.name, "layers"),
        )
        if not all(path.exists() for path in paths):
            return ()
        with np.load(paths[0]) as ours, np.load(paths[1]) as theirs:
            return tuple(compare_layers(ours, theirs))

    def _file(self, label: str, name: str, kind: str) -> Path:
        return self.folder / f"{name}.{label}.{kind}.npz"


def weights_of(pair: Pair) -> Weights | None:
    """The comparison of the source with the repo, if both sides do not read the repo."""
    return (
        compare_weights(pair.part, pair.family.name, pair.component.tensors) if pair.part else None
    )


def _label(semantics: str) -> str:
    return f"weightport, {semantics} semantics"
