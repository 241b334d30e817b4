"""The result of a parity run for people: lines for a terminal, `parity.html`, and `parity.json` for
machines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..reports.page import Line, badge, facts, figure, log_plot, page, table
from .layers import Layer
from .measure import Error
from .result import Check, File, Images, Parity

TITLES = {
    "kerascv": "KerasCV",
    "ldm": "the original modules",
    "openclip": "OpenCLIP",
    "diffusers": "diffusers",
}
# What diffusers computes differently from KerasCV: docs/parity.md, keras_cv/models/stable_diffusion
DIFFERENCES = {
    "unet": (
        "tanh approximation of GELU in the feed-forward (diffusers: erf); eps of the transformers'"
        " GroupNorm 1e-5 (diffusers: 1e-6)"
    ),
    "decoder": "eps of every GroupNorm 1e-5 (diffusers: 1e-6)",
    "image_encoder": "eps of every GroupNorm 1e-5 (diffusers: 1e-6)",
}


def describe(parity: Parity) -> Iterator[str]:
    """The result in lines for people."""
    yield (
        f"{'':14} {'relative L2':>11} {'max abs':>9} {'cosine':>11} {'PSNR dB':>8}"
        f" {'tolerance':>10}"
    )
    for check in parity.checks:
        yield (
            f"{check.name:14} {_columns(check.matched)} {check.tolerance:10.0e}  {_verdict(check)}"
        )
        if check.as_diffusers:
            yield f"{'  as diffusers':14} {_columns(check.as_diffusers)}"
        yield from (f"  {line}" for line in _findings(check))
    if parity.images:
        images = parity.images
        yield (
            f"{'image':14} {_columns(images.matched)} {images.tolerance:10.0e} "
            f" {'pass' if images.passed else 'FAIL'}"
        )
        yield f"{'  as diffusers':14} {_columns(images.as_diffusers)}"
        yield f"  {_image_words(images)}"
    yield "passed" if parity.passed else "FAILED"


def write_report(parity: Parity, folder: Path) -> None:
    """Write `parity.html` and `parity.json` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parity.json").write_text(json.dumps(_plain(parity.to_dict()), indent=2) + "\n")
    (folder / "parity.html").write_text(html(parity))


def _plain(value: Any) -> Any:
    """JSON has no infinity: null, as for a PSNR of equal results."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _columns(error: Error) -> str:
    return f"{error.relative_l2:11.1e} {error.max_abs:9.1e} {error.cosine:11.9f} {_psnr(error):>8}"


def _psnr(error: Error) -> str:
    return "equal" if error.psnr is None else f"{error.psnr:.1f}"


def _verdict(check: Check) -> str:
    if check.passed:
        return "pass"
    return (
        "FAIL: wrong weights" if check.weights and check.weights.wrong else "FAIL: different maths"
    )


def _findings(check: Check) -> Iterator[str]:
    """What is to be said of a check beside its figures."""
    weights = check.weights
    if weights and not weights.wrong and not weights.rounded:
        yield (
            f"weights: the inverse mapping gives all {weights.equal} tensors of the source back,"
            " bit for bit"
        )
    for dtype, count in weights.rounded.items() if weights else ():
        yield f"weights: {count} tensors are those of the source, rounded to {dtype}"
    for tensor in weights.wrong[:5] if weights else ():
        by = f" (max abs {tensor.max_abs:.1e})" if tensor.max_abs is not None else ""
        yield (
            f"wrong weight: {', '.join(tensor.keys)} is not {tensor.source}{by}; row: {tensor.row}"
        )
    if weights and len(weights.wrong) > 5:
        yield f"... and {len(weights.wrong) - 5} more wrong weights"
    if check.fault:
        fault = check.fault
        yield (
            f"first wrong: {fault.module}, relative L2 {fault.relative_l2:.1e} after"
            f" {fault.before:.1e} before it"
        )
        yield f"  block {fault.block}; row: {fault.row}" if fault.row else f"  block {fault.block}"
    elif not check.passed and check.layers:
        yield "no module is to blame: the error grows evenly from the first to the last"


# --- page -----------------------------------------------------------------------------------------


def html(parity: Parity) -> str:
    """The page, self-contained."""
    judged: list[Check | Images] = [*parity.checks, *([parity.images] if parity.images else [])]
    count, good = len(judged), sum(one.passed for one in judged)
    against = " and ".join(dict.fromkeys(TITLES[check.against] for check in parity.checks))
    verdict = badge(parity.passed, f"{good} of {count} checks passed")
    parts = [
        f"<h1>Parity with {escape(against)}</h1>",
        (
            f'<p class="soft"><code>{escape(parity.repo)}</code> &middot; {escape(parity.family)}'
            f" &middot; computed in {parity.dtype}</p><p>{verdict}</p>"
        ),
        f'<div class="card">{_overview(parity.checks)}</div>',
        _explained(parity.checks),
        _images(parity.images) if parity.images else "",
        *(_section(check) for check in parity.checks),
        "<h2>Environment</h2>",
        f'<div class="card">{facts(_environment(parity.environment))}</div>',
        "<h2>Files</h2>",
        f'<div class="card">{_files(parity.files)}</div>',
    ]
    return page(f"Parity: {Path(parity.repo).name}", "".join(parts))


def _overview(checks: Sequence[Check]) -> str:
    head = (
        "component",
        "",
        "relative L2",
        "tolerance",
        "max abs",
        "cosine",
        "PSNR",
        "relative L2 as diffusers runs it",
    )
    rows = []
    for check in checks:
        error, other = check.matched, check.as_diffusers
        cells = (
            f"{error.relative_l2:.1e}",
            f"{check.tolerance:.0e}",
            f"{error.max_abs:.1e}",
            f"{error.cosine:.9f}",
        )
        diffusers = f"{other.relative_l2:.1e}" if other else '<span class="soft">the same</span>'
        rows.append(
            (
                escape(check.name),
                badge(check.passed, _verdict(check)),
                *cells,
                _psnr(error),
                diffusers,
            )
        )
    return table(head, rows, numbers=range(2, 8))


def _explained(checks: Sequence[Check]) -> str:
    """The two kinds of difference, kept apart."""
    differing = [check for check in checks if check.as_diffusers and check.name in DIFFERENCES]
    if not differing:
        return ""
    rows = [
        (
            escape(c.name),
            f"{c.matched.relative_l2:.1e}",
            f"{c.as_diffusers.relative_l2:.1e}",
            escape(DIFFERENCES[c.name]),
        )
        for c in differing
        if c.as_diffusers
    ]
    head = ("component", "conversion", "with diffusers' maths", "what KerasCV computes differently")
    words = (
        "Left: our runtime with KerasCV's maths; what remains is the rounding of float32: the error"
        " of the conversion. Right: the same weights as diffusers runs them; here functions differ,"
        " not weights."
    )
    return (
        "<h2>Explained differences</h2><div"
        f' class="card"><p>{words}</p>{table(head, rows, numbers=(1, 2))}</div>'
    )


def _images(images: Images) -> str:
    """The images of both sides and what is between them."""
    figures = "".join(figure(picture, title) for title, picture in images.pictures.items())
    verdict = badge(images.passed, "pass" if images.passed else "FAIL")
    errors = (
        f"relative L2 of the image {images.matched.relative_l2:.1e} (tolerance"
        f" {images.tolerance:.0e}), as diffusers runs it {images.as_diffusers.relative_l2:.1e}"
    )
    words = f"<p>{verdict} {escape(errors)}</p><p>{escape(_image_words(images))}</p>"
    return f'<h2>End to end</h2><div class="card">{words}<div class="images">{figures}</div></div>'


def _image_words(images: Images) -> str:
    return (
        f"{images.steps} steps of the sampler of {images.sampler} from the same token ids and"
        f" noise: {images.differing:.2%} of the image's values differ, by {images.levels} of 255 at"
        " most"
    )


def _section(check: Check) -> str:
    """One check: what was found, and the error after every block."""
    findings = "".join(f"<p>{escape(line)}</p>" for line in _findings(check))
    source = f'<p class="soft">{TITLES[check.against]} from <code>{escape(check.source)}</code></p>'
    return f'<h2>{escape(check.name)}</h2><div class="card">{source}{findings}{_plot(check)}</div>'


def _plot(check: Check) -> str:
    blocks = _blocks(check.layers)
    if not blocks:
        return ""
    labels = list(blocks)
    other = _blocks(check.diffusers_layers)
    lines = [
        Line(
            "source's maths" if other else "relative L2 after each block",
            [blocks[name] for name in labels],
        )
    ]
    if other:
        lines.append(Line("as diffusers runs it", [other.get(name, 0.0) for name in labels]))
    marked = labels.index(check.fault.block) if check.fault else None
    worst = sorted(check.layers, key=lambda layer: -layer.relative_l2)
    rows = [
        (f"<code>{escape(layer.module)}</code>", f"{layer.relative_l2:.1e}", f"{layer.max_abs:.1e}")
        for layer in worst
    ]
    details = table(("module", "relative L2", "max abs"), rows[:40], numbers=(1, 2))
    return (
        f"{log_plot(lines, labels, check.tolerance, marked)}"
        f"<details><summary>The largest of {len(rows)} modules</summary>{details}</details>"
    )


def _blocks(layers: Sequence[Layer]) -> dict[str, float]:
    """Block -> the error after it, in order; the last module of a block has seen all of it."""
    return {layer.block: layer.relative_l2 for layer in layers}


def _environment(environment: Mapping[str, Any]) -> dict[str, str]:
    entries = {}
    for name, value in environment.items():
        if not isinstance(value, Mapping):
            entries[name] = str(value)
            continue
        versions = ", ".join(
            f"{package} {version}" for package, version in value["versions"].items()
        )
        seconds = sum(value["seconds"].values())
        entries[TITLES.get(name, name)] = (
            f"{versions}; {seconds:.0f} s, peak {value['peak_rss'] / 1e9:.1f} GB"
        )
    return entries


def _files(files: Sequence[File]) -> str:
    rows = [(f"<code>{escape(file.name)}</code>", f"<code>{file.sha256}</code>") for file in files]
    return table(("file", "sha256"), rows)
