"""Runs commands, one after another in turns, and prints what they took: wall and CPU time, memory,
ratio to the first.

`anon` is the highest anonymous memory seen, which leaves out mapped files.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

Command = list[str]


@dataclass(frozen=True)
class Run:
    """What one run of a command took."""

    wall: float  # seconds
    cpu: float  # seconds, user and system
    rss: int  # kB, at its highest
    anon: int  # kB, at its highest


def measure(command: Command) -> Run:
    """Run a command to its end, sampling its memory.

    Raises:
        SystemExit: the command failed.
    """
    start, peak = time.perf_counter(), {"VmHWM": 0, "RssAnon": 0}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        _sample(process.pid, peak)
        time.sleep(0.005)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)}: exit status {process.returncode}")
    return Run(
        time.perf_counter() - start, usage.ru_utime + usage.ru_stime, peak["VmHWM"], peak["RssAnon"]
    )


def _sample(pid: int, peak: dict[str, int]) -> None:
    """Raise the peaks to what /proc says now, in kB."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(value.split()[0]))


def rounds(commands: Mapping[str, Command], outputs: Path, repeat: int) -> Iterator[dict[str, Run]]:
    """Every row once a round, so that a change of the machine's load meets all of them.

    `outputs` is the folder that the commands write to; it is emptied after each.
    """
    for _ in range(repeat):
        runs = {}
        for name, command in commands.items():
            outputs.mkdir()
            runs[name] = measure(command)
            shutil.rmtree(outputs)
        yield runs


def table(
    title: str, measured: list[dict[str, Run]], bases: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Medians, one line a row; the ratio is to the row that `bases` names, or the first, in the
    same round."""
    first = next(iter(measured[0]))
    lines = [f"{title:34}{'wall s':>8}{'CPU s':>8}{'ratio':>8}{'RSS MB':>8}{'anon MB':>8}"]
    for name in measured[0]:
        runs, base = [round_[name] for round_ in measured], bases.get(name, first)
        ratio = statistics.median(round_[name].wall / round_[base].wall for round_ in measured)
        wall, cpu = (
            statistics.median(values) for values in ([r.wall for r in runs], [r.cpu for r in runs])
        )
        rss, anon = (
            max(values) / 1000 for values in ([r.rss for r in runs], [r.anon for r in runs])
        )
        lines.append(f"  {name:32}{wall:8.2f}{cpu:8.2f}{ratio:8.2f}{rss:8.0f}{anon:8.0f}")
    return "\n".join(lines)
