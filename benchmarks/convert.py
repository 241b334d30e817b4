"""How fast, and in how much memory, full-size models are converted, beside `cp` of the same bytes
and other programs.

    python benchmarks/convert.py [--model NAME] [--work TEXT] [--rows TEXT] [--repeat N] [--folder
    DIR]

Works on a Stable Diffusion 1.x UNet of KerasCV (3.4 GB; every kernel has to be transposed), on a
whole Stable Diffusion 1.5 checkpoint (4.3 GB, as `.safetensors`, `.ckpt` and repo; tensors are
renamed), and on SDXL in float16 (6.9 GB), all with random weights. The rows of one work take turns,
N times; medians are printed. The ratio is to `cp` and `sync` of the source in the same round, and
every row ends with its output on the disk; rows that say `no sync` compare with the plain `cp`.
Needs h5py, safetensors, torch and, for its row, diffusers; takes 12 GB of disk for the UNet, 18 GB
for the checkpoint, 28 GB for SDXL.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import models
from measure import Command, rounds, table

WEIGHTPORT = [sys.executable, "-m", "weightport"]
PEERS = [sys.executable, str(Path(__file__).with_name("peers.py"))]
Works = dict[str, dict[str, Command]]  # title -> name of a row -> command


def kerascv(folder: Path, out: Path) -> Works:
    """Rows for the UNet of KerasCV."""
    unet = folder / "unet.weights.h5"
    models.keras_unet(unet)
    rows = _copied(unet, out) | _converted(unet, out / "repo")
    rows["h5py script"] = [*PEERS, "keras_script", str(unet), str(out / "unet.safetensors")]
    rows["inspect"] = [*WEIGHTPORT, "inspect", str(unet)]
    return {"KerasCV UNet -> repo": rows | _help()}


def original(folder: Path, out: Path) -> Works:
    """Rows for a whole checkpoint, there and back."""
    safetensors, ckpt, repo = folder / "sd15.safetensors", folder / "sd15.ckpt", folder / "repo"
    models.original(safetensors, "sd1", "F32")
    models.pickled(safetensors, ckpt)
    subprocess.run([*WEIGHTPORT, "convert", "-q", safetensors, "-o", repo], check=True)
    works = {}
    for source in (safetensors, ckpt):
        rows = _copied(source, out) | _converted(source, out / "repo")
        rows["torch script"] = [*PEERS, "rename_script", str(source), str(out / "repo")]
        works[f"SD 1.5 {source.suffix} -> repo"] = (
            rows | _diffusers(source, out, repo) | _inspected(source) | _help()
        )
    back = out / "back.safetensors"
    rows = _copied(repo, out) | _converted(repo, back, "--to=ldm")
    rows["torch script"] = [*PEERS, "rename_back_script", str(repo), str(back)]
    return works | {"SD 1.5 repo -> .safetensors": rows | _inspected(repo)}


def sdxl(folder: Path, out: Path) -> Works:
    """Rows for SDXL in float16, there and back."""
    source, repo = folder / "sdxl.safetensors", folder / "repo"
    models.original(source, "sdxl", "F16")
    subprocess.run([*WEIGHTPORT, "convert", "-q", source, "-o", repo], check=True)
    there = _copied(source, out) | _converted(source, out / "repo", dtypes=["bfloat16"])
    there |= _diffusers(source, out, repo) | _inspected(source)
    back = _copied(repo, out) | _converted(
        repo, out / "back.safetensors", "--to=ldm", dtypes=["bfloat16"]
    )
    return {"SDXL float16 .safetensors -> repo": there, "SDXL float16 repo -> .safetensors": back}


def _copied(source: Path, out: Path) -> dict[str, Command]:
    """The first row, which measures the others; and the same without sync."""
    copy = shlex.join(["cp", "-r", str(source), str(out / "copy")])
    synced = f"{copy} && find {shlex.quote(str(out))} -type f -exec sync {{}} +"
    return {"cp + sync": ["sh", "-c", synced], "cp": ["sh", "-c", copy]}


def _converted(
    source: Path, target: Path, *options: str, dtypes: Sequence[str] = ("float16", "bfloat16")
) -> dict[str, Command]:
    command = [*WEIGHTPORT, "convert", "-q", str(source), "-o", str(target), *options]
    rows = {
        "weightport": command,
        "weightport, no hash, no sync": [*command, "--no-hash", "--no-sync"],
    }
    return rows | {f"weightport, {dtype}": [*command, "--dtype", dtype] for dtype in dtypes}


def _diffusers(source: Path, out: Path, repo: Path) -> dict[str, Command]:
    if not find_spec("diffusers"):
        return {}
    return {
        "diffusers single file": [*PEERS, "diffusers", str(source), str(out / "repo"), str(repo)]
    }


def _inspected(source: Path) -> dict[str, Command]:
    return {"inspect": [*WEIGHTPORT, "inspect", str(source)]}


def _help() -> dict[str, Command]:
    return {"--help": [*WEIGHTPORT, "--help"]}


def main() -> None:
    """Make the sources, run the rows, print the tables, clean up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", choices=["kerascv", "original", "sdxl"], help="default: all, one after the other"
    )
    parser.add_argument(
        "--work", default="", metavar="TEXT", help="only work whose title contains this text"
    )
    parser.add_argument(
        "--rows",
        default="",
        metavar="TEXT",
        help="only rows whose name contains it (cp always runs)",
    )
    parser.add_argument("--repeat", type=int, default=5, metavar="N")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where to work (default: the temporary folder)"
    )
    arguments = parser.parse_args()
    os.environ.pop(
        "PYTHONDONTWRITEBYTECODE", None
    )  # installed programs are compiled, so all rows are after their first
    for make in (kerascv, original, sdxl):
        if arguments.model in (None, make.__name__):
            with tempfile.TemporaryDirectory(
                prefix="weightport-bench-", dir=arguments.folder
            ) as folder:
                outputs = Path(folder, "outputs")
                for title, rows in make(Path(folder), outputs).items():
                    chosen = {
                        name: row
                        for name, row in rows.items()
                        if arguments.rows in name or "cp" in name
                    }
                    if arguments.work in title:
                        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
                        unsynced = {name: "cp" for name in chosen if "no sync" in name}
                        measured = list(rounds(chosen, outputs, arguments.repeat))
                        print(table(title, measured, unsynced), flush=True)


if __name__ == "__main__":
    main()
