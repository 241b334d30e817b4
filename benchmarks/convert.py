"""How fast, and in how much memory, full-size models are converted, beside `cp` of the same bytes and other programs.

    python benchmarks/convert.py [--model NAME] [--work TEXT] [--rows TEXT] [--repeat N] [--folder DIR]

Works on a Stable Diffusion 1.x UNet of KerasCV (3.4 GB; every kernel has to be transposed) and on a whole Stable
Diffusion 1.5 checkpoint (4.3 GB, as `.safetensors`, `.ckpt` and repo; tensors are renamed), with random weights. The
rows of one work take turns, N times; medians are printed. The ratio is to `cp` and `sync` of the source in the same
round, and every row ends with its output on the disk. Needs h5py, safetensors, torch and, for its row, diffusers;
takes 12 GB of disk for the UNet, 18 GB for the checkpoint.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
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
    rows = _copied(unet, out) | _converted(unet, out)
    rows["h5py script"] = [*PEERS, "keras_script", str(unet), str(out / "unet.safetensors")]
    rows["inspect"] = [*WEIGHTPORT, "inspect", str(unet)]
    return {"KerasCV UNet -> repo": rows | _help()}


def original(folder: Path, out: Path) -> Works:
    """Rows for a whole checkpoint, there and back."""
    safetensors, ckpt, repo = folder / "sd15.safetensors", folder / "sd15.ckpt", folder / "repo"
    models.original(safetensors)
    models.pickled(safetensors, ckpt)
    subprocess.run([*WEIGHTPORT, "convert", "-q", safetensors, "-o", repo], check=True)
    works = {}
    for source in (safetensors, ckpt):
        rows = _copied(source, out) | _converted(source, out)
        rows["torch script"] = [*PEERS, "rename_script", str(source), str(out / "repo")]
        if find_spec("diffusers"):
            rows["diffusers single file"] = [*PEERS, "diffusers", str(source), str(out / "repo"), str(repo)]
        rows["inspect"] = [*WEIGHTPORT, "inspect", str(source)]
        works[f"SD 1.5 {source.suffix} -> repo"] = rows | _help()
    back = out / "back.safetensors"
    rows = _copied(repo, out) | {"weightport": [*WEIGHTPORT, "convert", "-q", str(repo), "-o", str(back), "--to=ldm"]}
    rows["torch script"] = [*PEERS, "rename_back_script", str(repo), str(back)]
    rows["inspect"] = [*WEIGHTPORT, "inspect", str(repo)]
    return works | {"SD 1.5 repo -> .safetensors": rows | _help()}


def _copied(source: Path, out: Path) -> dict[str, Command]:
    """The first row, which measures the others."""
    copy = shlex.join(["cp", "-r", str(source), str(out / "copy")])
    return {"cp + sync": ["sh", "-c", f"{copy} && find {shlex.quote(str(out))} -type f -exec sync {{}} +"]}


def _converted(source: Path, out: Path) -> dict[str, Command]:
    command = [*WEIGHTPORT, "convert", "-q", str(source), "-o", str(out / "repo")]
    return {"weightport": command} | {
        f"weightport, {dtype}": [*command, "--dtype", dtype] for dtype in ("float16", "bfloat16")
    }


def _help() -> dict[str, Command]:
    return {"--help": [*WEIGHTPORT, "--help"]}


def main() -> None:
    """Make the sources, run the rows, print the tables, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["kerascv", "original"], help="default: both, one after the other")
    parser.add_argument("--work", default="", metavar="TEXT", help="only work whose title contains this text")
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows whose name contains it (cp always runs)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to work (default: the temporary folder)")
    arguments = parser.parse_args()
    for make in (kerascv, original):
        if arguments.model in (None, make.__name__):
            with tempfile.TemporaryDirectory(prefix="weightport-bench-", dir=arguments.folder) as folder:
                outputs = Path(folder, "outputs")
                for title, rows in make(Path(folder), outputs).items():
                    chosen = {name: row for name, row in rows.items() if arguments.rows in name or "cp" in name}
                    if arguments.work in title:
                        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
                        print(table(title, list(rounds(chosen, outputs, arguments.repeat))), flush=True)


if __name__ == "__main__":
    main()
