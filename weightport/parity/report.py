"""The result of a parity run: lines for a terminal, `parity.html`, and `parity.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io import atomic
from ..reports.page import render
from ..reports.plots import Line, log_plot
from .frameworks import frameworks
from .layers import Layer
from .measure import Error
from .result import Check, Parity
from .weights import Weights

if TYPE_CHECKING:
    from markupsafe import Markup

SHOWN_WEIGHTS = 5
SHOWN_LAYERS = 40


def describe(parity: Parity) -> Iterator[str]:
    """The result in lines for people."""
    yield f"{'':14} relative L2   max abs      cosine  PSNR dB  tolerance"
    for check in parity.checks:
        yield f"{check.name:14} {_columns(check.matched)} {check.tolerance:10.0e}  {check.verdict}"
        if check.as_diffusers:
            yield f"{'  as diffusers':14} {_columns(check.as_diffusers)}"
        for finding in _findings(check):
            yield f"  {finding}"
    images = parity.images
    if images:
        yield f"{'image':14} {_columns(images.matched)} {images.tolerance:10.0e}  {images.verdict}"
        yield f"{'  as diffusers':14} {_columns(images.as_diffusers)}"
        yield f"  {images.summary}"
    yield "passed" if parity.passed else "FAILED"


def _columns(error: Error) -> str:
    return (
        f"{error.relative_l2:11.1e} {error.max_abs:9.1e} {error.cosine:11.9f} {_decibels(error):>8}"
    )


def _decibels(error: Error) -> str:
    return "equal" if error.psnr is None else f"{error.psnr:.1f}"


def _findings(check: Check) -> Iterator[str]:
    """What is to be said of a check beside its figures."""
    if check.weights:
        yield from _about_weights(check.weights)
    fault = check.fault
    if fault:
        yield (
            f"first wrong: {fault.module}, relative L2 {fault.relative_l2:.1e} after"
            f" {fault.before:.1e} before it"
        )
        yield f"  block {fault.block}; row: {fault.row}" if fault.row else f"  block {fault.block}"
    elif not check.passed and check.layers:
        yield "no module is to blame: the error grows evenly from the first to the last"


def _about_weights(weights: Weights) -> Iterator[str]:
    if not weights.wrong and not weights.rounded:
        yield (
            f"weights: the inverse mapping gives all {weights.equal} tensors of the source back,"
            " bit for bit"
        )
    for dtype, count in weights.rounded.items():
        yield f"weights: {count} tensors are those of the source, rounded to {dtype}"
    for tensor in weights.wrong[:SHOWN_WEIGHTS]:
        keys = ", ".join(tensor.keys)
        by = f" (max abs {tensor.max_abs:.1e})" if tensor.max_abs is not None else ""
        yield f"wrong weight: {keys} is not {tensor.source}{by}; row: {tensor.row}"
    more = len(weights.wrong) - SHOWN_WEIGHTS
    if more > 0:
        yield f"... and {more} more wrong weights"


def write_report(parity: Parity, folder: Path) -> None:
    """Write `parity.html` and `parity.json` into a folder."""
    page = html(parity)
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(_plain(parity.to_dict()), indent=2)
    atomic.text(folder / "parity.json", f"{content}\n")
    atomic.text(folder / "parity.html", page)


def _plain(value: Any) -> Any:
    """JSON has no infinity: null, as for a PSNR of equal results."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


# --- page -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """What the page says of one check: findings, and the error after every block."""

    check: Check
    against: str
    findings: list[str]
    plot: Markup | None
    worst: list[Layer]


def html(parity: Parity) -> str:
    """The page, self-contained.

    Raises:
        ConversionError: what draws it is not installed.
    """
    verdicts = [check.passed for check in parity.checks]
    if parity.images:
        verdicts.append(parity.images.passed)
    return render(
        "parity.html",
        parity=parity,
        against=" and ".join(dict.fromkeys(_title(check.against) for check in parity.checks)),
        summary=f"{sum(verdicts)} of {len(verdicts)} checks passed",
        explained=list(_explained(parity.checks)),
        sections=[_section(check) for check in parity.checks],
        environment=_environment(parity.environment),
        decibels=_decibels,
    )


def _explained(checks: Sequence[Check]) -> Iterator[tuple[Check, str]]:
    """The checks with two errors, and what lies between them."""
    for check in checks:
        differs = frameworks()[check.against].differs
        if check.as_diffusers and check.name in differs:
            yield check, differs[check.name]


def _title(label: str) -> str:
    """Of a framework; any other label is its own."""
    known = frameworks()
    return known[label].title if label in known else label


def _section(check: Check) -> Section:
    worst = sorted(check.layers, key=lambda layer: -layer.relative_l2)
    return Section(
        check=check,
        against=_title(check.against),
        findings=list(_findings(check)),
        plot=_plot(check) if check.layers else None,
        worst=worst[:SHOWN_LAYERS],
    )


def _plot(check: Check) -> Markup:
    blocks = _blocks(check.layers)
    labels = list(blocks)
    errors = list(blocks.values())
    lines = [Line("relative L2 after each block", errors)]
    if check.diffusers_layers:
        other = _blocks(check.diffusers_layers)
        lines = [
            Line("source's maths", errors),
            Line("as diffusers runs it", [other.get(label, 0.0) for label in labels]),
        ]
    marked = labels.index(check.fault.block) if check.fault else None
    return log_plot(lines, labels, check.tolerance, marked)


def _blocks(layers: Sequence[Layer]) -> dict[str, float]:
    """Block -> the error after it, in order; the last module of a block has seen all of it."""
    return {layer.block: layer.relative_l2 for layer in layers}


def _environment(environment: Mapping[str, Any]) -> dict[str, str]:
    entries = {}
    for name, value in environment.items():
        if isinstance(value, Mapping):
            entries[_title(name)] = _process(value)
        else:
            entries[name] = str(value)
    return entries


def _process(report: Mapping[str, Any]) -> str:
    """What a runner says of itself: versions, seconds, memory."""
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    seconds = sum(report["seconds"].values())
    return f"{versions}; {seconds:.0f} s, peak {report['peak_rss'] / 1e9:.1f} GB"
