"""What `weightport batch` costs a job, and how far workers and a shared disk take it.

    python benchmarks/batch.py [--jobs N] [--size full|narrow | --source FILE] [--repeat N]
        [--folder DIR]
    python benchmarks/batch.py --simulate SECONDS BYTES_PER_SECOND [--plot FILE.svg]

The first measures: N checkpoints of Stable Diffusion 1.x by N calls of `weightport.convert` in one
process, and by `weightport batch` with 1 and 2 workers, in turns; medians are printed, with the CPU
time and the highest anonymous memory of all processes together. What a job costs more than a call
is the slope between N and 2 N jobs, which tells the start of the command and its workers apart.
Nothing waits for the disk. `full` checkpoints have 4.3 GB, `narrow` ones 0.5 GB.

The second simulates 10,000 checkpoints on 1 to 200 workers that share a disk or the connection to
the Hub: SECONDS is the overhead of a job, BYTES_PER_SECOND what one worker alone reads and writes,
as the first prints them. A job moves its bytes at the rate of a worker alone, or at its even share
of what is shared, whichever is less; a worker takes the next job when it has ended one. Sizes are
those of shelves: SD 1.x in float16 and float32, and SDXL in float16.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from subprocess import DEVNULL, Popen

import models
import trees
from measure import end_in_order

LOOP = """
import os, sys
os.environ["OPENBLAS_NUM_THREADS"] = "1"
import weightport
for source in sys.argv[2:]:
    weightport.convert(source, os.path.join(sys.argv[1], os.path.basename(source)), sync=False)
"""
PYTHON = trees.python(trees.ROOT)
SIZES = ((0.5, 2.13e9), (0.2, 4.27e9), (0.3, 6.94e9))  # share of the shelf, bytes
SHARED = {
    "disk, 20 GB/s": 20e9,
    "disk, 5 GB/s": 5e9,
    "disk, 1 GB/s": 1e9,
    "Hub, 1 Gbit/s": 0.125e9,
}
WORKERS = (1, 2, 5, 10, 20, 50, 100, 200)
CHECKPOINTS = 10_000


# --- measured -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a command and all its processes took."""

    wall: float  # seconds
    cpu: float  # seconds
    anon: float  # bytes, at their highest


def measure(command: list[str]) -> Cost:
    """Run a command to its end, watching its processes.

    Raises:
        SystemExit: it failed.
    """
    started = time.perf_counter()
    process = Popen(command, stdout=DEVNULL)
    cpu: dict[int, float] = {}
    anon = 0.0
    while process.poll() is None:
        alive = _tree(process.pid)
        for pid in alive:
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = (
                    Path(f"/proc/{pid}/stat")
                    .read_text(encoding="utf-8")
                    .rpartition(") ")[2]
                    .split()
                )
                cpu[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        anon = max(anon, sum(map(_anonymous, alive)))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command}: exit status {process.returncode}")
    return Cost(time.perf_counter() - started, sum(cpu.values()), anon)


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="utf-8").split():
                found += _tree(int(child))
    return found


def _anonymous(pid: int) -> float:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        return 1024.0 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])
    return 0.0


def compare(folder: Path, count: int, size: str, repeat: int, given: Path | None) -> None:
    """Print what calls and batches took, of so many jobs and of twice as many.

    Args:
        given: a checkpoint, in place of one that is made.
    """
    source = folder / "source.safetensors"
    if given is None:
        models.original(source, "sd1", "F32", size)
    else:
        shutil.copyfile(given, source)
    nbytes = source.stat().st_size
    found: dict[tuple[str, int], list[Cost]] = {}
    for _ in range(repeat):
        for number in (count, 2 * count):
            shelf = folder / "shelf"
            shelf.mkdir()
            sources = [shelf / f"{index}.safetensors" for index in range(number)]
            for path in sources:
                path.hardlink_to(source)
            out = folder / "out"
            commands = {"calls in one process": [*PYTHON, "-c", LOOP, str(out), *map(str, sources)]}
            for workers in (1, 2):
                commands[f"batch, {workers} worker{'s'[: workers - 1]}"] = [
                    *PYTHON, "-m", "weightport", "batch", str(shelf), "-o", str(out), "--no-sync",
                    "--workers", str(workers),
                ]  # fmt: skip
            for name, command in commands.items():
                out.mkdir()
                found.setdefault((name, number), []).append(measure(command))
                shutil.rmtree(out)
            shutil.rmtree(shelf)
    print(f"{count} and {2 * count} checkpoints of {nbytes / 1e6:.0f} MB, medians of {repeat}")
    print(
        f"{'':22}{'a job: wall s':>14}{'CPU s':>7}{'start: wall s':>15}{'CPU s':>7}{'anon MB':>9}"
    )
    slopes = {}
    for name in dict.fromkeys(name for name, _ in found):
        few = found[name, count]
        many = found[name, 2 * count]
        wall = _line([one.wall for one in few], [one.wall for one in many], count)
        cpu = _line([one.cpu for one in few], [one.cpu for one in many], count)
        anon = max(one.anon for one in many) / 1e6
        print(f"{name:22}{wall[0]:14.3f}{cpu[0]:7.3f}{wall[1]:15.2f}{cpu[1]:7.2f}{anon:9.0f}")
        slopes[name] = (wall[0], cpu[0])
    call, one, two = slopes.values()
    print(f"overhead a job: {one[1] - call[1]:.3f} s of CPU, {one[0] - call[0]:.3f} s of time")
    print(f"2 workers are {one[0] / two[0]:.2f} times as fast as 1")
    print(f"one worker alone: {2 * nbytes / call[1] / 1e6:.0f} MB/s of CPU, read and written")


def _line(few: list[float], many: list[float], count: int) -> tuple[float, float]:
    """What one job takes, and what is taken without any."""
    slope = (median(many) - median(few)) / count
    return slope, median(few) - slope * count


# --- simulated ------------------------------------------------------------------------------------


def simulate(workers: int, shared: float, overhead: float, alone: float) -> float:
    """Seconds until 10,000 checkpoints are converted.

    All transfers under way have the same rate, so that one count of the bytes that each has moved
    since the beginning tells when which of them ends.

    Args:
        shared: bytes a second that all workers together read and write.
        overhead: seconds of a job in which it moves nothing.
        alone: bytes a second of a worker to which nothing else is shared.
    """
    rng = random.Random(0)
    shares, sizes = zip(*SIZES, strict=True)
    waiting = [2 * size for size in rng.choices(sizes, shares, k=CHECKPOINTS)]
    preparing = [(overhead, index) for index in range(workers)]  # when each begins to move
    moving: list[float] = []  # how far the count is when each ends
    now = 0.0
    moved = 0.0
    while preparing or moving:
        rate = min(alone, shared / len(moving)) if moving else 0.0
        ends = now + (moving[0] - moved) / rate if moving else float("inf")
        begins = preparing[0][0] if preparing else float("inf")
        then = min(ends, begins)
        moved += rate * (then - now)
        now = then
        if ends <= begins:
            heapq.heappop(moving)
            if waiting:
                heapq.heappush(preparing, (now + overhead, 0))
        else:
            heapq.heappop(preparing)
            if waiting:
                heapq.heappush(moving, moved + waiting.pop())
    return now


def plot(found: dict[str, list[float]], file: Path) -> None:
    """Draw hours over workers."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "batch"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (name, hours), marker in zip(found.items(), "os^D", strict=True):
        axes.plot(WORKERS, hours, marker=marker, markersize=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="hours", xticks=WORKERS)
    axes.set_xticklabels(map(str, WORKERS))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(title="shared by all workers", frameon=False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Measure or simulate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--size", choices=["full", "narrow"], default="narrow")
    parser.add_argument("--source", type=Path, help="a .safetensors file of your own")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="to work in (default: a temporary one)")
    parser.add_argument("--simulate", nargs=2, type=float, metavar=("SECONDS", "BYTES_PER_SECOND"))
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    end_in_order()
    if arguments.simulate:
        overhead, alone = arguments.simulate
        found = {
            name: [simulate(count, shared, overhead, alone) / 3600 for count in WORKERS]
            for name, shared in SHARED.items()
        }
        print(f"{'hours for 10,000':20}" + "".join(f"{count:>8}" for count in WORKERS))
        for name, hours in found.items():
            print(f"{name:20}" + "".join(f"{one:8.1f}" for one in hours))
        if arguments.plot:
            plot(found, arguments.plot)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        compare(Path(folder), arguments.jobs, arguments.size, arguments.repeat, arguments.source)


if __name__ == "__main__":
    sys.exit(main())
