"""How fast, and in how much memory, full-size models are converted, beside `cp` and others.

    python benchmarks/convert.py [--model NAME] [--work TEXT] [--rows TEXT] [--repeat N]
        [--folder DIR] [--against REVISION]

Works on a Stable Diffusion 1.x UNet of KerasCV (3.4 GB; every kernel has to be transposed), on a
whole Stable Diffusion 1.5 checkpoint (4.3 GB, as `.safetensors`, `.ckpt` and repo; tensors are
renamed), and on SDXL in float16 (6.9 GB), all with random weights. The rows of one work take turns,
N times; medians are printed. The ratio is to `cp` and `sync` of the source in the same round, and
every row ends with its output on the disk; rows that say `no sync` compare with the plain `cp`.

With `--against REVISION` a worktree of that commit takes part: only the rows of weightport run,
each beside itself at that commit, in turns, and its ratio is to that. Nothing is installed for it.

Needs h5py, safetensors, torch and, for its row, diffusers; takes 12 GB of disk for the UNet, 18 GB
for the checkpoint, 28 GB for SDXL.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import models
import trees
from measure import Command, end_in_order, rounds, table

WEIGHTPORT = [*trees.python(trees.ROOT), "-m", "weightport"]
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


MODELS: dict[str, Callable[[Path, Path], Works]] = {
    "kerascv": kerascv,
    "original": original,
    "sdxl": sdxl,
}


def chosen(rows: dict[str, Command], text: str) -> tuple[dict[str, Command], dict[str, str]]:
    """The rows whose name contains a text, and `cp`.

    Also what a ratio is to, if not to the first.
    """
    found = {name: row for name, row in rows.items() if text in name or "cp" in name}
    return found, {name: "cp" for name in found if "no sync" in name}


def beside(
    rows: dict[str, Command], text: str, tree: Path, revision: str
) -> tuple[dict[str, Command], dict[str, str]]:
    """weightport's rows whose name contains a text, each after itself in another tree.

    Also what a ratio is to: that.
    """
    found = {}
    bases = {}
    for name, row in rows.items():
        if text in name and row[: len(WEIGHTPORT)] == WEIGHTPORT:
            before = f"{name} @ {revision}"
            found[before] = trees.moved(row, tree)
            found[name] = row
            bases[name] = before
            bases[before] = before
    return found, bases


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--model", choices=MODELS, help="default: all, one after the other")
    option("--work", default="", metavar="TEXT", help="only work whose title contains this text")
    option("--rows", default="", metavar="TEXT", help="only rows whose name contains this text")
    option("--repeat", type=int, default=5, metavar="N")
    option(
        "--folder", type=Path, metavar="DIR", help="where to work (default: for temporary files)"
    )
    option("--against", metavar="REVISION", help="measure beside this commit")
    return parser.parse_args()


def main() -> None:
    """Make the sources, run the rows, print the tables, clean up."""
    arguments = parse()
    end_in_order()
    # Installed programs are compiled, so all rows are after their first.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with contextlib.ExitStack() as stack:
        tree = None
        if arguments.against:
            tree = stack.enter_context(trees.checkout(arguments.against))
        for model, make in MODELS.items():
            if arguments.model in (None, model):
                run(make, tree, arguments)


def run(
    make: Callable[[Path, Path], Works], tree: Path | None, arguments: argparse.Namespace
) -> None:
    """Measure the works of one model."""
    place = tempfile.TemporaryDirectory(prefix="weightport-bench-", dir=arguments.folder)
    with place as folder:
        outputs = Path(folder, "outputs")
        for title, rows in make(Path(folder), outputs).items():
            if arguments.work not in title:
                continue
            if tree is None:
                commands, bases = chosen(rows, arguments.rows)
            else:
                commands, bases = beside(rows, arguments.rows, tree, arguments.against)
            print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
            measured = list(rounds(commands, outputs, arguments.repeat))
            print(table(title, measured, bases), flush=True)


if __name__ == "__main__":
    main()
