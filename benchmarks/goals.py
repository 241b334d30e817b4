"""Rows of a benchmark with their goals: medians, tables, a record of them, and a plot.

python benchmarks/goals.py RECORD PICTURE      draws the ratios of a record beside their goals
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import trees
from measure import Command, Round, Run

COLUMNS = ("wall s", "CPU s", "ratio", "RSS MB", "anon MB", "read")


@dataclass(frozen=True)
class Row:
    """A command that is measured.

    Attributes:
        command: what runs.
        base: the row that wall times are divided by.
        goals: column -> the most that it should be.
        cold: whether the sources leave the page cache before.
        cache: bytes of page cache that it may fill.
        first_weight: whether it is only run until the first weight is written.
        copies: how many times it holds the source in memory; 0 where it streams.
    """

    command: Command
    base: str = ""
    goals: Mapping[str, float] = field(default_factory=dict)
    cold: bool = False
    cache: int | None = None
    first_weight: bool = False
    copies: int = 0


@dataclass(frozen=True)
class Line:
    """The medians of a row.

    Attributes:
        figures: column -> figure.
        goals: column -> the most that it should be.
    """

    work: str
    row: str
    figures: Mapping[str, float]
    goals: Mapping[str, float]

    @property
    def met(self) -> bool:
        """Whether every goal is met, to the digits that are printed."""
        return all(
            float(_shown(name, self.figures[name])) <= most for name, most in self.goals.items()
        )


def lines(work: str, rows: Mapping[str, Row], measured: Sequence[Round], nbytes: int) -> list[Line]:
    """A line for each row.

    Args:
        nbytes: of the sources, which what is read from the disk is divided by.
    """
    return [
        Line(work, name, _figures(name, row, measured, nbytes), dict(row.goals))
        for name, row in rows.items()
    ]


def _figures(name: str, row: Row, measured: Sequence[Round], nbytes: int) -> dict[str, float]:
    runs = [one[name] for one in measured]
    figures = {
        "wall s": median(run.wall for run in runs),
        "CPU s": median(run.cpu for run in runs),
        "RSS MB": _megabytes(run.rss for run in runs),
        "anon MB": _megabytes(run.anon for run in runs),
        "read": median(run.read for run in runs) / nbytes,
    }
    if row.base:
        figures["ratio"] = median(_ratios(runs, [one[row.base] for one in measured]))
    return figures


def _ratios(runs: Sequence[Run], others: Sequence[Run]) -> list[float]:
    return [run.wall / other.wall for run, other in zip(runs, others, strict=True)]


def _megabytes(peaks: Iterable[int]) -> float:
    """The highest of peaks in KiB."""
    return max(peaks) * 1024 / 1e6


def table(found: Sequence[Line]) -> str:
    """The lines of one work as text; goals stand behind."""
    text = [f"{found[0].work:44}" + "".join(f"{column:>9}" for column in COLUMNS)]
    for line in found:
        cells = [_cell(column, line.figures.get(column)) for column in COLUMNS]
        text.append(f"  {line.row:42}" + "".join(cells) + _judged(line))
    return "\n".join(text)


def _cell(column: str, figure: float | None) -> str:
    return f"{'' if figure is None else _shown(column, figure):>9}"


def _shown(column: str, figure: float) -> str:
    """Megabytes as whole numbers, others to two digits."""
    return f"{figure:.0f}" if column.endswith("MB") else f"{figure:.2f}"


def _judged(line: Line) -> str:
    if not line.goals:
        return ""
    wanted = ", ".join(f"{column} <= {most:g}" for column, most in line.goals.items())
    return f"   {'met' if line.met else 'NOT MET'}: {wanted}"


# --- the record -----------------------------------------------------------------------------------


def record(path: Path, found: Sequence[Line], repeat: int, skipped: Sequence[str]) -> None:
    """Write what was measured, on which machine and of which commit, as JSON."""
    content = {
        "commit": _commit(),
        "machine": machine(),
        "rounds": repeat,
        "skipped": list(skipped),
        "rows": [{**asdict(line), "met": line.met} for line in found],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _commit() -> str:
    command = ["git", "-C", str(trees.ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    return said.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import ssl

    import numpy as np

    model = ""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory GB": round(memory / 1e9, 1),
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "OpenSSL": ssl.OPENSSL_VERSION,
    }


# --- the plot -------------------------------------------------------------------------------------


def plot(record: Path, path: Path) -> None:
    """Ratios of a record beside their goals, as a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "weightport"
    from matplotlib import pyplot as plt

    rows = json.loads(record.read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if "ratio" in row["goals"]][::-1]
    names = [f"{row['work']}: {row['row']}" for row in rows]
    ratios = [row["figures"]["ratio"] for row in rows]
    goals = [row["goals"]["ratio"] for row in rows]
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(rows) + 1))
    colours = ["tab:green" if row["met"] else "tab:orange" for row in rows]
    axes.barh(names, ratios, color=colours, height=0.6)
    axes.scatter(goals, names, marker="|", s=200, color="black", zorder=2, label="goal")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("wall time / that of cp in the same round (1.0: as fast as copying)")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    plot(*map(Path, sys.argv[1:]))
