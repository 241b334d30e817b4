"""A comparison of schedulers for people and for machines: `report.html`, `results.json`,
`results.csv`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image

from ..reports.page import Series, badge, figure, page, scatter_plot, table
from .schedulers import REFERENCE, Run, SchedulerComparison, pareto_front


@dataclass(frozen=True)
class Mean:
    """A scheduler with a number of steps, over all prompts."""

    scheduler: str
    steps: int
    stochastic: bool
    seconds: float
    model_calls: float
    rmse: float
    psnr: float
    scores: dict[str, float]


def means(comparison: SchedulerComparison) -> list[Mean]:
    """The means over the prompts, in the order of the schedulers and steps asked for."""
    found = []
    for scheduler in comparison.experiment.schedulers:
        for steps in comparison.experiment.steps:
            runs = [
                run for run in comparison.runs if (run.scheduler, run.steps) == (scheduler, steps)
            ]
            found.append(_mean(runs))
    return found


def _mean(runs: Sequence[Run]) -> Mean:
    first = runs[0]
    return Mean(
        first.scheduler,
        first.steps,
        first.stochastic,
        fmean(run.seconds for run in runs),
        fmean(run.model_calls for run in runs),
        math.sqrt(fmean(run.rmse**2 for run in runs)),
        fmean(run.psnr for run in runs),
        {name: fmean(run.scores[name] for run in runs) for name in first.scores},
    )


def fronts(rows: Sequence[Mean]) -> tuple[set[int], set[int]]:
    """Which rows no other one beats in error and seconds, and in error and model calls; only those
    of one equation."""
    own = [index for index, row in enumerate(rows) if not row.stochastic]
    return (
        {own[i] for i in pareto_front([(rows[index].seconds, rows[index].rmse) for index in own])},
        {
            own[i]
            for i in pareto_front([(rows[index].model_calls, rows[index].rmse) for index in own])
        },
    )


def describe(comparison: SchedulerComparison, notes: Sequence[str] = ()) -> Iterator[str]:
    """The table in lines for people."""
    rows = means(comparison)
    fastest, _ = fronts(rows)
    names = list(rows[0].scores) if rows else []
    yield (
        f"{'':2}{'scheduler':16} {'steps':>5} {'s/image':>8} {'calls':>6} {'latent RMSE':>12}"
        f" {'PSNR dB':>8}" + "".join(f" {name:>10}" for name in names)
    )
    for index, row in enumerate(rows):
        scores = "".join(f" {row.scores[name]:10.4f}" for name in names)
        mark = "*" if index in fastest else "~" if row.stochastic else ""
        yield (
            f"{mark:2}{row.scheduler:16} {row.steps:5} {row.seconds:8.3f} {row.model_calls:6.0f}"
            f" {row.rmse:12.4f} {row.psnr:8.2f}{scores}"
        )
    yield (
        "* nothing is both faster and nearer to the reference; ~ stochastic: follows another"
        " equation"
    )
    yield from notes


def write_report(comparison: SchedulerComparison, output: Path, notes: Sequence[str] = ()) -> None:
    """Write the three files into the folder of the comparison."""
    _write(
        output / "results.json",
        json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False) + "\n",
    )
    _write(output / "results.csv", _csv(comparison))
    _write(output / "report.html", html(comparison, output, notes))


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    beside.replace(path)


def _csv(comparison: SchedulerComparison) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    scores = list(comparison.runs[0].scores) if comparison.runs else []
    columns = [
        "prompt",
        "scheduler",
        "steps",
        "stochastic",
        "seconds",
        "model_calls",
        "rmse",
        "psnr",
    ]
    writer.writerow([*columns, *scores, "image"])
    for run in comparison.runs:
        values = [getattr(run, column) for column in columns]
        writer.writerow([*values, *run.scores.values(), run.image])
    return text.getvalue()


# --- the page -------------------------------------------------------------------------------------


def html(comparison: SchedulerComparison, output: Path, notes: Sequence[str] = ()) -> str:
    """The page, self-contained."""
    experiment, rows = comparison.experiment, means(comparison)
    fast, few = fronts(rows)
    uncertainty = max(comparison.uncertainty.values())
    size = (
        f"{experiment.size[0]} x {experiment.size[1]}"
        if experiment.size
        else "the model's own size"
    )
    words = (
        f"{len(experiment.schedulers)} schedulers, {len(experiment.prompts)} prompts, seed"
        f" {experiment.seed}, {size}, guidance {experiment.guidance_scale:g}. The reference is"
        f" {REFERENCE} with {experiment.reference_steps} steps; with half as many it is"
        f" {uncertainty:.2g} away from itself, so errors below that say nothing. All begin at the"
        " last training timestep."
    )
    plots = "".join(
        f'<div class="card">{_plot(rows, front, column, title, uncertainty)}</div>'
        for front, column, title in (
            (fast, "seconds", "seconds per image"),
            (few, "model_calls", "model calls"),
        )
    )
    body = [
        "<h1>Schedulers compared</h1>",
        f'<p class="soft"><code>{escape(comparison.model)}</code></p><p>{escape(words)}</p>',
        *(f'<p class="soft">{escape(note)}</p>' for note in notes),
        "<h2>Speed and quality</h2>",
        (
            "<p>Ringed points are the Pareto front: nothing is both faster and nearer to the"
            " reference. A thin line goes from few steps of a scheduler to many. Hollow points are"
            " stochastic schedulers, which follow another equation.</p>"
        ),
        plots,
        f'<div class="card">{_table(rows, fast)}</div>',
        *(_grid(comparison, output, prompt) for prompt in experiment.prompts),
    ]
    return page("Schedulers compared", "".join(body))


def _plot(
    rows: Sequence[Mean], front: set[int], column: str, title: str, uncertainty: float
) -> str:
    series = []
    for name in dict.fromkeys(row.scheduler for row in rows):
        own = [row for row in rows if row.scheduler == name]
        points = [(float(getattr(row, column)), row.rmse, str(row.steps)) for row in own]
        series.append(Series(name, points, hollow=own[0].stochastic))
    best = [
        (float(getattr(row, column)), row.rmse, f"{row.scheduler} {row.steps}")
        for index, row in enumerate(rows)
        if index in front
    ]
    return scatter_plot(
        series, title, "latent RMSE to the reference", sorted(best), limit=uncertainty
    )


def _table(rows: Sequence[Mean], front: set[int]) -> str:
    names = list(rows[0].scores)
    head = [
        "scheduler",
        "steps",
        "s/image",
        "model calls",
        "latent RMSE",
        "PSNR dB",
        *map(escape, names),
    ]
    cells = [
        [
            escape(row.scheduler) + _mark(i in front, row.stochastic),
            str(row.steps),
            f"{row.seconds:.3f}",
            f"{row.model_calls:.0f}",
            f"{row.rmse:.4f}",
            f"{row.psnr:.2f}".replace("inf", "∞"),
            *(f"{row.scores[name]:.4f}" for name in names),
        ]
        for i, row in enumerate(rows)
    ]
    return table(head, cells, numbers=range(1, len(head)))


def _mark(front: bool, stochastic: bool) -> str:
    if front:
        return f" {badge(True, 'Pareto front')}"
    return ' <span class="soft">stochastic</span>' if stochastic else ""


def _grid(comparison: SchedulerComparison, output: Path, prompt: str) -> str:
    """The images of a prompt: a row a scheduler, a column a number of steps."""
    experiment = comparison.experiment
    runs = {(run.scheduler, run.steps): run for run in comparison.runs if run.prompt == prompt}
    reference = _image(
        output / comparison.references[prompt], f"{REFERENCE}, {experiment.reference_steps} steps"
    )
    rows = [
        [escape(name), *(_cell(output, runs[name, steps]) for steps in experiment.steps)]
        for name in experiment.schedulers
    ]
    head = ["", *(f"{steps} steps" for steps in experiment.steps)]
    return (
        f'<h2>{escape(prompt)}</h2><div class="card"><p>The reference:</p>{reference}</div>'
        f'<div class="card grid">{table(head, rows)}</div>'
    )


def _cell(output: Path, run: Run) -> str:
    return _image(output / run.image, f"{run.psnr:.1f} dB, {run.seconds:.2f} s")


def _image(file: Path, words: str) -> str:
    with Image.open(file) as image:
        return figure(np.asarray(image), words)
