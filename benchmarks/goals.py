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


def table(found: Sequence[Line], columns: Sequence[str] = COLUMNS, places: int = 2) -> str:
    """The lines of one work as text; goals stand behind.

    Args:
        columns: which figures.
        places: of seconds, behind the point.
    """
    text = [f"{found[0].work:44}" + "".join(f"{column:>{_width(column)}}" for column in columns)]
    for line in found:
        cells = [_cell(column, line.figures.get(column), places) for column in columns]
        text.append(f"  {line.row:42}" + "".join(cells) + _judged(line))
    return "\n".join(text)


def _cell(column: str, figure: float | None, places: int) -> str:
    if figure is None:
        return " " * _width(column)
    text = f"{figure:.{places}f}" if column.endswith(" s") else _shown(column, figure)
    return f"{text:>{_width(column)}}"


def _width(column: str) -> int:
    return max(10, len(column) + 2)


def _shown(column: str, figure: float) -> str:
    """Megabytes as whole numbers, others to two digits, differences of results to one."""
    if column == "differs":
        return f"{figure:.0e}"
    return f"{figure:.0f}" if column.endswith("MB") else f"{figure:.2f}"


def _judged(line: Line) -> str:
    if not line.goals:
        return ""
    wanted = ", ".join(f"{column} <= {most:g}" for column, most in line.goals.items())
    return f"   {'met' if line.met else 'NOT MET'}: {wanted}"


# --- the record -----------------------------------------------------------------------------------


TO_COPY = "wall time / that of cp in the same round (1.0: as fast as copying)"


def record(
    path: Path,
    found: Sequence[Line],
    repeat: int,
    skipped: Sequence[str],
    measured_by: str = TO_COPY,
) -> None:
    """Write what was measured, on which machine and of which commit, as JSON.

    Rows of other works stay that the file has of the same commit and machine: a record may be made
    in several runs.

    Args:
        measured_by: what ratios are, in words.
    """
    run = {"rounds": repeat, "load": round(os.getloadavg()[2], 1)}
    content = {
        "commit": _commit(),
        "machine": machine(),
        "ratios": measured_by,
        "skipped": list(skipped),
        "rows": [{**asdict(line), "met": line.met, **run} for line in found],
    }
    content["rows"] = [*_other_rows(path, content), *content["rows"]]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _other_rows(path: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a record, of works that are not measured again; none if it is of elsewhere."""
    if not path.exists():
        return []
    known = json.loads(path.read_text(encoding="utf-8"))
    if any(known.get(name) != content[name] for name in ("commit", "machine", "ratios")):
        return []
    again = {row["work"] for row in content["rows"]}
    return [row for row in known["rows"] if row["work"] not in again]


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


DRAWN = {
    "ratio": "",
    "worst": ", worst round",
    "CPU ratio": ", CPU",
    "CPU worst": ", CPU, worst round",
    "MB ratio": ", memory",
}
"""Column whose goals are drawn -> what its bar is called."""


def plot(record: Path, path: Path) -> None:
    """Ratios of a record beside their goals, as a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "weightport"
    from matplotlib import pyplot as plt

    content = json.loads(record.read_text(encoding="utf-8"))
    drawn = [(row, column) for row in content["rows"] for column in DRAWN if column in row["goals"]]
    names = [f"{row['work']}: {row['row']}{DRAWN[column]}" for row, column in drawn[::-1]]
    ratios = [row["figures"][column] for row, column in drawn[::-1]]
    goals = [row["goals"][column] for row, column in drawn[::-1]]
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(names) + 1))
    met = [round(ratio, 2) <= goal for ratio, goal in zip(ratios, goals, strict=True)]
    colours = ["tab:green" if one else "tab:orange" for one in met]
    axes.barh(names, ratios, color=colours, height=0.6)
    axes.scatter(goals, names, marker="|", s=200, color="black", zorder=2, label="goal")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel(content.get("ratios", TO_COPY))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    plot(*map(Path, sys.argv[1:]))
