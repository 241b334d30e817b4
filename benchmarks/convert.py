"""How fast, and in how much memory, a full-size KerasCV UNet becomes a diffusers repo, beside `cp` of the same bytes.

    python benchmarks/convert.py [--folder DIR] [--repeat N] [--rows TEXT]

Writes a Stable Diffusion 1.x UNet with random weights (3.4 GB; every kernel has to be transposed) as a Keras
`.weights.h5`, and runs each row N times, the rows taking turns. The ratio is to `cp` and `sync` of the source in the
same round; medians are printed. Every row ends with its output on the disk. `anon` is the highest anonymous memory
seen, which leaves out mapped files. Needs h5py and safetensors; takes 12 GB of disk while it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weightport.converters.keras_writer import write_keras
from weightport.converters.recognise import candidates

Command = list[str]


@dataclass(frozen=True)
class Run:
    """What one run of a command took."""

    wall: float  # seconds
    cpu: float  # seconds, user and system
    rss: int  # kB, at its highest
    anon: int  # kB, at its highest


def rows(source: Path, out: Path) -> dict[str, Command]:
    """Name -> command that makes `out` from the source and syncs it; the others are measured by the first one."""
    python, convert = sys.executable, [sys.executable, "-m", "weightport", "convert", "--quiet", str(source)]
    return {
        "cp + sync": [
            "sh",
            "-c",
            f"cp {shlex.quote(str(source))} {shlex.quote(str(out))} && sync {shlex.quote(str(out))}",
        ],
        "weightport": [*convert, "-o", str(out)],
        "weightport, float16": [*convert, "-o", str(out), "--dtype", "float16"],
        "weightport, bfloat16": [*convert, "-o", str(out), "--dtype", "bfloat16"],
        "plain script": [python, __file__, "--plain", str(source), str(out)],
    }


def plain(source: Path, out: Path) -> None:
    """What people write by hand: h5py, `np.transpose`, `save_file`; no hashes, no checks."""
    import h5py
    from safetensors.numpy import save_file

    tensors = {}

    def add(name: str, node: object) -> None:
        if isinstance(node, h5py.Dataset):
            order = {2: (1, 0), 4: (3, 2, 0, 1)}.get(node.ndim, range(node.ndim))
            tensors[name] = np.ascontiguousarray(node[...].transpose(*order))

    with h5py.File(source) as file:
        file.visititems(add)
    save_file(tensors, out)
    subprocess.run(["sync", str(out)], check=True)


def make_source(path: Path) -> None:
    """A whole KerasCV UNet with random weights."""
    (unet,) = (c for c in candidates("kerascv") if (c.family.name, c.part) == ("sd1", "unet"))
    shapes = unet.component.manifest()
    rng = np.random.default_rng(0)

    def random(key: str) -> np.ndarray:
        back = unet.links[key].inverse
        stored = [shapes[name] for name in back.sources]
        shape = back.op.shapes(stored)[0] if back.op else stored[0]
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)

    tensors = {key: lambda key=key: random(key) for key in unet.links}
    write_keras(path, "unet", tensors, lambda nbytes: None)
    os.sync()


def measure(command: Command) -> Run:
    """Run a command to its end, sampling its memory."""
    start, peak = time.perf_counter(), {"VmHWM": 0, "RssAnon": 0}
    process = subprocess.Popen(command)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        sample(process.pid, peak)
        time.sleep(0.005)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)}: exit status {process.returncode}")
    return Run(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, peak["VmHWM"], peak["RssAnon"])


def sample(pid: int, peak: dict[str, int]) -> None:
    """Raise the peaks to what /proc says now, in kB."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(value.split()[0]))


def rounds(commands: dict[str, Command], out: Path, repeat: int) -> Iterator[dict[str, Run]]:
    """Every row once a round, so that a change of the machine's load meets all of them."""
    for _ in range(repeat):
        runs = {}
        for name, command in commands.items():
            runs[name] = measure(command)
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        yield runs


def table(measured: list[dict[str, Run]]) -> str:
    """Medians, one line a row."""
    base = next(iter(measured[0]))
    lines = [f"{'':24}{'wall s':>8}{'CPU s':>8}{'ratio':>8}{'RSS MB':>8}{'anon MB':>8}"]
    for name in measured[0]:
        runs = [round_[name] for round_ in measured]
        ratio = statistics.median(round_[name].wall / round_[base].wall for round_ in measured)
        wall, cpu = (statistics.median(values) for values in ([r.wall for r in runs], [r.cpu for r in runs]))
        rss, anon = (max(values) / 1000 for values in ([r.rss for r in runs], [r.anon for r in runs]))
        lines.append(f"{name:24}{wall:8.2f}{cpu:8.2f}{ratio:8.2f}{rss:8.0f}{anon:8.0f}")
    return "\n".join(lines)


def main() -> None:
    """Make the source, run the rows, print the table, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rows", default="", help="only rows whose name contains this text (cp is always run)")
    parser.add_argument("--plain", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        plain(*arguments.plain)
        return
    with tempfile.TemporaryDirectory(prefix="weightport-bench-", dir=arguments.folder) as folder:
        source, out = Path(folder, "unet.weights.h5"), Path(folder, "out")
        make_source(source)
        commands = rows(source, out)
        base = next(iter(commands))
        chosen = {name: command for name, command in commands.items() if name == base or arguments.rows in name}
        print(f"{source.stat().st_size / 1e9:.2f} GB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        print(table(list(rounds(chosen, out, arguments.repeat))))


if __name__ == "__main__":
    main()
