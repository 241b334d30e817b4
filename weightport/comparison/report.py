"""A comparison of schedulers, written: `report.html`, `results.json`, `results.csv`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from ..io import atomic
from ..reports.page import render
from ..reports.plots import NamedPoint, Series, scatter_plot
from .schedulers import REFERENCE, Run, SchedulerComparison, pareto_front

if TYPE_CHECKING:
    from markupsafe import Markup

COLUMNS = ("prompt", "scheduler", "steps", "stochastic", "seconds", "model_calls", "rmse", "psnr")


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
                run for run in comparison.runs if run.scheduler == scheduler and run.steps == steps
            ]
            found.append(_mean(runs))
    return found


def _mean(runs: Sequence[Run]) -> Mean:
    first = runs[0]
    return Mean(
        scheduler=first.scheduler,
        steps=first.steps,
        stochastic=first.stochastic,
        seconds=fmean(run.seconds for run in runs),
        model_calls=fmean(run.model_calls for run in runs),
        rmse=math.sqrt(fmean(run.rmse**2 for run in runs)),
        psnr=fmean(run.psnr for run in runs),
        scores={name: fmean(run.scores[name] for run in runs) for name in first.scores},
    )


def fronts(rows: Sequence[Mean]) -> tuple[set[int], set[int]]:
    """Which rows no other one beats in error and seconds, and in error and model calls.

    Only those of one equation are compared.
    """
    own = [index for index, row in enumerate(rows) if not row.stochastic]
    fast = pareto_front([(rows[index].seconds, rows[index].rmse) for index in own])
    few = pareto_front([(rows[index].model_calls, rows[index].rmse) for index in own])
    return {own[i] for i in fast}, {own[i] for i in few}


def describe(comparison: SchedulerComparison, notes: Sequence[str] = ()) -> Iterator[str]:
    """The table in lines for people."""
    rows = means(comparison)
    fastest, _ = fronts(rows)
    names = list(rows[0].scores) if rows else []
    titles = "".join(f" {name:>10}" for name in names)
    yield (
        f"{'':2}{'scheduler':16} {'steps':>5} {'s/image':>8} {'calls':>6} {'latent RMSE':>12}"
        f" {'PSNR dB':>8}{titles}"
    )
    for index, row in enumerate(rows):
        mark = "*" if index in fastest else "~" if row.stochastic else ""
        scores = "".join(f" {row.scores[name]:10.4f}" for name in names)
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
    atomic.text(
        output / "results.json",
        json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False) + "\n",
    )
    atomic.text(output / "results.csv", _csv(comparison))
    atomic.text(output / "report.html", html(comparison, output, notes))


def _csv(comparison: SchedulerComparison) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    scores = list(comparison.runs[0].scores) if comparison.runs else []
    writer.writerow([*COLUMNS, *scores, "image"])
    for run in comparison.runs:
        values = [getattr(run, column) for column in COLUMNS]
        writer.writerow([*values, *run.scores.values(), run.image])
    return text.getvalue()


# --- the page -------------------------------------------------------------------------------------


def html(comparison: SchedulerComparison, output: Path, notes: Sequence[str] = ()) -> str:
    """The page, self-contained.

    Raises:
        ConversionError: what draws it is not installed.
    """
    rows = means(comparison)
    fast, few = fronts(rows)
    uncertainty = max(comparison.uncertainty.values())
    return render(
        "schedulers.html",
        comparison=comparison,
        experiment=comparison.experiment,
        reference=REFERENCE,
        uncertainty=uncertainty,
        notes=notes,
        plots=[
            _plot(rows, fast, "seconds", "seconds per image", uncertainty),
            _plot(rows, few, "model_calls", "model calls", uncertainty),
        ],
        rows=rows,
        front=fast,
        scores=list(rows[0].scores),
        runs={(run.prompt, run.scheduler, run.steps): run for run in comparison.runs},
        output=output,
        decibels=_decibels,
    )


def _decibels(psnr: float, digits: int) -> str:
    return f"{psnr:.{digits}f}" if math.isfinite(psnr) else "∞"


def _plot(
    rows: Sequence[Mean], front: set[int], column: str, title: str, uncertainty: float
) -> Markup:
    """The error against a column of the rows."""

    def point(row: Mean, name: str) -> NamedPoint:
        return float(getattr(row, column)), row.rmse, name

    series = []
    for scheduler in dict.fromkeys(row.scheduler for row in rows):
        own = [row for row in rows if row.scheduler == scheduler]
        points = [point(row, str(row.steps)) for row in own]
        series.append(Series(scheduler, points, hollow=own[0].stochastic))
    best = [point(rows[index], f"{rows[index].scheduler} {rows[index].steps}") for index in front]
    return scatter_plot(
        series, title, "latent RMSE to the reference", sorted(best), limit=uncertainty
    )
