"""Runs commands in turns, and prints what they took: wall and CPU time, memory, ratios.

`anon` is the highest anonymous memory seen, which leaves out mapped files.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType

Command = list[str]


@dataclass(frozen=True)
class Run:
    """What one run of a command took."""

    wall: float  # seconds
    cpu: float  # seconds, user and system
    rss: int  # kB, at its highest
    anon: int  # kB, at its highest
    read: int = 0  # bytes, from the disk
    grown: int = 0  # kB of anonymous memory, of a process that was there before


Round = dict[str, Run]
COLUMNS = ("wall s", "CPU s", "ratio", "RSS MB", "anon MB")


def end_in_order() -> None:
    """Whoever tells this process to end finds nothing left, as at any other end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def measure(command: Command) -> Run:
    """Run a command to its end, sampling its memory.

    Raises:
        SystemExit: the command failed.
    """
    peak = {"VmHWM": 0, "RssAnon": 0}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        sample(process.pid, peak)
        time.sleep(0.005)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)}: exit status {process.returncode}")
    cpu = usage.ru_utime + usage.ru_stime
    return Run(wall, cpu, peak["VmHWM"], peak["RssAnon"], usage.ru_inblock * 512)


def sample(pid: int, peak: dict[str, int]) -> None:
    """Raise the peaks to what /proc says now, in kB."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(value.split()[0]))


def rounds(commands: Mapping[str, Command], outputs: Path, repeat: int) -> Iterator[Round]:
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
    title: str, measured: list[Round], bases: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Medians, one line a row.

    The ratio of wall times is to the row that `bases` names, or the first, in the same round.
    """
    first = next(iter(measured[0]))
    lines = [f"{title:44}" + "".join(f"{column:>8}" for column in COLUMNS)]
    for name in measured[0]:
        runs = [one[name] for one in measured]
        others = [one[bases.get(name, first)] for one in measured]
        wall = median(run.wall for run in runs)
        cpu = median(run.cpu for run in runs)
        ratio = median(run.wall / other.wall for run, other in zip(runs, others, strict=True))
        rss = max(run.rss for run in runs) / 1000
        anon = max(run.anon for run in runs) / 1000
        lines.append(f"  {name:42}{wall:8.2f}{cpu:8.2f}{ratio:8.2f}{rss:8.0f}{anon:8.0f}")
    return "\n".join(lines)
