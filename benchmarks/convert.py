"""How fast, and in how much memory, models are converted, beside `cp`, others, and our goals.

    python benchmarks/convert.py [--model TEXT] [--size full|half|narrow] [--repeat N]
        [--folder DIR] [--record FILE] [--against REVISION]

Works on a whole Stable Diffusion 1.5 checkpoint (4.3 GB, as `.safetensors`, `.ckpt` and repo;
tensors are renamed), on a UNet of KerasCV (3.4 GB; every kernel has to be transposed), on SDXL in
float16 (6.9 GB), and on the transformer of FLUX.1 in bfloat16 (23.8 GB; fused layers are taken
apart) and in floats of eight bits (11.9 GB), all with random weights. The rows of one work take
turns, N times; medians are printed, with the goals that they have. Ratios are of wall times, to
`cp` and `sync` of the source in the same round, for what neither hashes nor syncs to the plain
`cp`; every other row ends with its output on the disk. `read` is what came from the disk, in sizes
of the source. What is needed and not there is said, and its rows left out.

`--record` keeps the figures with machine and commit; `benchmarks/results/convert.json` is that of a
whole run, and `python benchmarks/goals.py RECORD PICTURE` draws one.

With `--against REVISION` a worktree of that commit takes part: only the rows of weightport run,
each beside itself at that commit, in turns, and its ratio is to that. Nothing is installed for it.

`--model flux` measures what belongs to one model; `--only` is the same option, as a text may also
name a row. Takes 14 GB of disk for the UNet, 22 GB for the checkpoint, 28 GB for SDXL, 48 GB for
FLUX.1, of whose blocks `--size half` and `narrow` leave 10 + 18 and 2 + 4 of 19 + 38.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import goals
import models
import system
import trees
from goals import Line, Row
from measure import Command, Round, Run, end_in_order, measure

WEIGHTPORT = [*trees.python(trees.ROOT), "-m", "weightport"]
PEERS = [sys.executable, str(Path(__file__).with_name("peers.py"))]
SMALL_CACHE = 700_000_000  # bytes
COPY = "cp + sync"
BARE_COPY = "cp"
COLD_COPY = "cp + sync, cold"
SMALL = "weightport, small page cache"
BARE = ["--no-hash", "--no-sync"]
INSPECT = {"CPU s": 0.35}
HELP = {"CPU s": 0.08}
FIRST_WEIGHT = {"CPU s": 0.4}
NAMES = {
    "safetensors": "sd15.safetensors",
    "ckpt": "sd15.ckpt",
    "repo": "repo",
    "narrow": "narrow.safetensors",
    "keras": "unet.weights.h5",
    "sdxl": "sdxl.safetensors",
    "sdxl_repo": "sdxl",
    "flux": "flux.safetensors",
    "flux_repo": "flux",
    "flux_config": "flux_config",
    "flux_fp8": "flux_fp8.safetensors",
}


class Sources:
    """The models, each made when it is first wanted.

    Attributes:
        folder: where they lie.
        size: of Stable Diffusion 1.5.
    """

    def __init__(self, folder: Path, size: str) -> None:
        self.folder = folder
        self.size = size
        self._made: set[str] = set()

    def path(self, name: str) -> Path:
        """Where a model is, or will be."""
        return self.folder / NAMES[name]

    def make(self, name: str) -> Path:
        """The same, and it is there."""
        path = self.path(name)
        if name in self._made:
            return path
        self._made.add(name)
        if name == "keras":
            models.keras_unet(path, self.size)
        elif name == "ckpt":
            models.pickled(self.make("safetensors"), path)
        elif name == "repo":
            subprocess.run(_convert(self.make("safetensors"), path), check=True)
        elif name in ("sdxl_repo", "flux_repo"):
            subprocess.run(_convert(self.make(name.removesuffix("_repo")), path), check=True)
        elif name in ("flux", "flux_fp8"):
            dtype = "F8_E4M3" if name == "flux_fp8" else "BF16"
            models.original(path, "flux", dtype, self.size, "transformer")
        elif name == "flux_config":
            config = models.config("flux", "transformer", self.size)
            (path / "transformer").mkdir(parents=True)
            (path / "transformer" / "config.json").write_text(json.dumps(config))
        elif name == "sdxl":
            models.original(path, "sdxl", "F16")
        else:
            models.original(path, "sd1", "F32", "narrow" if name == "narrow" else self.size)
        return path

    def keep(self, names: Iterable[str]) -> None:
        """Remove all others."""
        for name in self._made - set(names):
            path = self.path(name)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        self._made &= set(names)


@dataclass(frozen=True)
class Work:
    """Rows that take turns on one source.

    Attributes:
        source: which of `NAMES` it is.
        rows: the rows for a source, and the folder that outputs go to.
        needs: modules, one of which is missing leaves the work out.
        beside: what else of `NAMES` is used.
    """

    source: str
    rows: Callable[[Path, Path], dict[str, Row]]
    needs: Sequence[str] = ()
    beside: Sequence[str] = ()


def from_safetensors(source: Path, out: Path) -> dict[str, Row]:
    """Rows for a whole checkpoint, with the cold ones."""
    command = _convert(source, out / "repo")
    rows = _copied(source, out)
    rows["weightport"] = Row(command, COPY, {"ratio": 1.0, "anon MB": 32})
    rows["weightport, no hash, no sync"] = Row([*command, *BARE], BARE_COPY, {"ratio": 1.25})
    rows["weightport, float16"] = _cast(command, "float16", 1.0)
    rows["weightport, bfloat16"] = _cast(command, "bfloat16", 0.8)
    rows |= _peers("rename_script", source, out / "repo", "torch")
    rows["weightport, first weight"] = _first(source, out)
    rows |= _inspected(source)
    rows["--help"] = Row([*WEIGHTPORT, "--help"], goals=HELP)
    rows[COLD_COPY] = replace(rows[COPY], cold=True)
    rows["weightport, cold"] = Row(command, COLD_COPY, {"ratio": 1.1, "read": 1.05}, cold=True)
    rows[SMALL] = Row(command, goals={"read": 1.05}, cold=True, cache=SMALL_CACHE)
    return rows


def from_ckpt(source: Path, out: Path) -> dict[str, Row]:
    """Rows for the same as a pickle."""
    rows = _copied(source, out)
    rows["weightport"] = Row(_convert(source, out / "repo"), COPY, {"ratio": 1.05, "anon MB": 32})
    return rows | _peers("rename_script", source, out / "repo", "torch") | _inspected(source)


def by_diffusers(source: Path, out: Path) -> dict[str, Row]:
    """diffusers' single-file loader, offline, with the configs of a repository."""
    repo = source.with_name(NAMES["repo"])
    command = [*PEERS, "diffusers", str(source), str(out / "repo"), str(repo)]
    return _copied(source, out) | {"diffusers": Row(command, COPY)}


def from_repo(source: Path, out: Path) -> dict[str, Row]:
    """Rows for the way back."""
    command = _convert(source, out / "back.safetensors", "--to=ldm")
    rows = _copied(source, out)
    rows["weightport"] = Row(command, COPY, {"ratio": 0.95, "anon MB": 32})
    rows["weightport, float16"] = _cast(command, "float16")
    rows["weightport, bfloat16"] = _cast(command, "bfloat16")
    return rows | _peers("rename_back_script", source, out / "back.safetensors", "torch")


def from_narrow(source: Path, out: Path) -> dict[str, Row]:
    """What a model costs before its first weight."""
    return {"weightport, first weight": _first(source, out)}


def from_keras(source: Path, out: Path) -> dict[str, Row]:
    """Rows for the UNet of KerasCV."""
    command = _convert(source, out / "repo")
    rows = _copied(source, out)
    rows["weightport"] = Row(command, COPY, {"ratio": 1.3, "anon MB": 64})
    rows["weightport, no hash, no sync"] = Row([*command, *BARE], BARE_COPY, {"ratio": 2.5})
    rows["weightport, float16"] = _cast(command, "float16")
    rows["weightport, bfloat16"] = _cast(command, "bfloat16")
    return rows | _peers("keras_script", source, out / "unet.safetensors", "h5py")


def from_sdxl(source: Path, out: Path) -> dict[str, Row]:
    """Rows for SDXL in float16."""
    rows = _copied(source, out)
    rows["weightport"] = Row(_convert(source, out / "repo"), COPY, {"ratio": 1.0})
    return rows | _inspected(source)


def from_sdxl_repo(source: Path, out: Path) -> dict[str, Row]:
    """Rows for its way back."""
    rows = _copied(source, out)
    command = _convert(source, out / "back.safetensors", "--to=ldm")
    rows["weightport"] = Row(command, COPY, {"ratio": 1.0})
    return rows


def from_flux(source: Path, out: Path) -> dict[str, Row]:
    """Rows for the transformer of FLUX.1, and diffusers' loader of it."""
    rows = _copied(source, out)
    command = _convert(source, out / "repo")
    rows["weightport"] = Row(command, COPY, {"ratio": 1.3, "anon MB": 64})
    configs = source.with_name(NAMES["flux_config"])
    theirs = [*PEERS, "flux_transformer", str(source), str(out / "transformer"), str(configs)]
    if find_spec("diffusers"):
        rows["diffusers"] = Row(theirs, COPY, copies=2)
    return rows | _inspected(source)


def from_flux_fp8(source: Path, out: Path) -> dict[str, Row]:
    """The same of floats of eight bits, which become bfloat16."""
    rows = _copied(source, out)
    rows["weightport"] = Row(_convert(source, out / "repo"), COPY, {"anon MB": 64})
    return rows


def from_flux_repo(source: Path, out: Path) -> dict[str, Row]:
    """Its way back."""
    rows = _copied(source, out)
    command = _convert(source, out / "back.safetensors", "--to=ldm")
    rows["weightport"] = Row(command, COPY, {"ratio": 1.3, "anon MB": 64})
    return rows


WORKS = {
    "SD 1.5 .safetensors -> repo": Work("safetensors", from_safetensors),
    "SD 1.5 .ckpt -> repo": Work("ckpt", from_ckpt, ["torch"]),
    "SD 1.5 by diffusers": Work("safetensors", by_diffusers, ["diffusers"], ["repo"]),
    "SD 1.5 repo -> .safetensors": Work("repo", from_repo),
    "SD 1.5 narrow": Work("narrow", from_narrow, ["torch"]),
    "KerasCV UNet -> repo": Work("keras", from_keras, ["h5py"]),
    "SDXL float16 .safetensors -> repo": Work("sdxl", from_sdxl),
    "SDXL float16 repo -> .safetensors": Work("sdxl_repo", from_sdxl_repo),
    "FLUX.1 .safetensors -> repo": Work("flux", from_flux, [], ["flux_config"]),
    "FLUX.1 repo -> .safetensors": Work("flux_repo", from_flux_repo),
    "FLUX.1 in eight bits -> repo": Work("flux_fp8", from_flux_fp8),
}


def _convert(source: Path, target: Path, *options: str) -> Command:
    return [*WEIGHTPORT, "convert", "-q", str(source), "-o", str(target), *options]


def _copied(source: Path, out: Path) -> dict[str, Row]:
    """What the others are measured by."""
    copy = shlex.join(["cp", "-r", str(source), str(out / "copy")])
    synced = f"{copy} && find {shlex.quote(str(out))} -type f -exec sync {{}} +"
    return {COPY: Row(["sh", "-c", synced]), BARE_COPY: Row(["sh", "-c", copy])}


def _cast(command: Command, dtype: str, ratio: float | None = None) -> Row:
    return Row([*command, "--dtype", dtype], COPY, {} if ratio is None else {"ratio": ratio})


def _peers(name: str, source: Path, out: Path, module: str) -> dict[str, Row]:
    """What people write by hand; it neither hashes nor checks."""
    if not find_spec(module):
        return {}
    return {f"{module} script": Row([*PEERS, name, str(source), str(out)], COPY)}


def _inspected(source: Path) -> dict[str, Row]:
    return {"inspect": Row([*WEIGHTPORT, "inspect", str(source)], goals=INSPECT)}


def _first(source: Path, out: Path) -> Row:
    """Hashing the source begins at once and would count, so it is left out."""
    command = _convert(source, out / "repo", *BARE)
    return Row(command, goals=FIRST_WEIGHT, first_weight=True)


# --- running them ---------------------------------------------------------------------------------


def chosen(title: str, rows: dict[str, Row], text: str) -> dict[str, Row]:
    """The rows that contain a text, `title: row`, in any case, and those that their ratios are
    to."""
    wanted = text.lower()
    found = {name: row for name, row in rows.items() if wanted in f"{title}: {name}".lower()}
    bases = {row.base for row in found.values()}
    return {name: row for name, row in rows.items() if name in found or name in bases}


def possible(rows: dict[str, Row]) -> tuple[dict[str, Row], list[str]]:
    """The rows that can be measured here, and what is said of the others."""
    if system.can_limit():
        return rows, []
    left = {name: row for name, row in rows.items() if row.cache is None}
    lost = [f"{name}: no control group can be made here" for name in rows if name not in left]
    return left, lost


def affordable(rows: dict[str, Row], nbytes: int) -> tuple[dict[str, Row], list[str]]:
    """The rows whose copies of a source of so many bytes fit into memory, and what is said of the
    others."""
    free = system.free_memory()
    left = {name: row for name, row in rows.items() if row.copies * nbytes <= free}
    lost = [
        f"{name}: holds the model {row.copies} times, {row.copies * nbytes / 1e9:.0f} GB, and"
        f" {free / 1e9:.0f} GB of memory are free"
        for name, row in rows.items()
        if name not in left
    ]
    return left, lost


def beside(rows: dict[str, Row], tree: Path, revision: str) -> dict[str, Row]:
    """weightport's rows, each after itself in another tree, which its ratio is to."""
    found = {}
    for name, row in rows.items():
        if row.command[: len(WEIGHTPORT)] == WEIGHTPORT:
            before = f"{name} @ {revision}"
            found[before] = replace(row, command=trees.moved(row.command, tree), base="", goals={})
            found[name] = replace(row, base=before, goals={})
    return found


def rounds(rows: Mapping[str, Row], source: Path, outputs: Path, repeat: int) -> Iterator[Round]:
    """Every row once a round, so that a change of the machine's load meets all of them."""
    for _ in range(repeat):
        runs = {}
        for name, row in rows.items():
            outputs.mkdir()
            if row.cold:
                system.drop_from_cache(source)
            else:
                system.bring_into_cache(source)
            runs[name] = _measured(row, outputs)
            shutil.rmtree(outputs)
        yield runs


def _measured(row: Row, outputs: Path) -> Run:
    if row.first_weight:
        return system.until_first_weight(row.command, outputs)
    if row.cache is not None:
        with system.limited(row.command, row.cache) as command:
            return measure(command)
    return measure(row.command)


def run(
    title: str, sources: Sources, tree: Path | None, arguments: argparse.Namespace
) -> tuple[list[Line], list[str]]:
    """Measure one work; its lines, and what could not be measured."""
    work = WORKS[title]
    outputs = sources.folder / "outputs"
    source = sources.path(work.source)
    rows = chosen(title, work.rows(source, outputs), arguments.only)
    if tree is not None:
        rows = beside(rows, tree, arguments.against)
    missing = [name for name in work.needs if not find_spec(name)]
    if missing and rows:
        return [], [f"{title}: {missing[0]} is not installed"]
    rows, skipped = possible(rows)
    if not rows:
        return [], skipped
    for name in (work.source, *work.beside):
        sources.make(name)
    rows, lost = affordable(rows, _size(source))
    skipped += [f"{title}: {text}" for text in lost]
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    measured = list(rounds(rows, source, outputs, arguments.repeat))
    found = goals.lines(title, rows, measured, _size(source))
    print(goals.table(found), flush=True)
    return found, skipped


def _size(source: Path) -> int:
    files = [source] if source.is_file() else source.rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def _wanted_later(titles: Sequence[str]) -> set[str]:
    """The sources of these works, and what those are made from."""
    names = {name for title in titles for name in (WORKS[title].source, *WORKS[title].beside)}
    made_from = {"ckpt": "safetensors", "repo": "safetensors", "sdxl_repo": "sdxl"}
    made_from |= {"flux_repo": "flux"}
    return names | {made_from[name] for name in names if name in made_from}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    only = "only rows whose `work: row` contains this: flux, kerascv, 'sd 1.5 narrow'"
    option("--model", "--only", dest="only", default="", metavar="TEXT", help=only)
    sizes = "of SD 1.5 and FLUX.1; SDXL only in full"
    option("--size", choices=models.SIZES, default="full", help=sizes)
    option("--repeat", type=int, default=5, metavar="N")
    option(
        "--folder", type=Path, metavar="DIR", help="where to work (default: for temporary files)"
    )
    option("--record", type=Path, metavar="FILE", help="keep the figures as JSON")
    option("--against", metavar="REVISION", help="measure beside this commit")
    return parser.parse_args()


def main() -> None:
    """Make the sources, run the rows, print the tables, keep the figures, clean up."""
    arguments = parse()
    end_in_order()
    # Installed programs are compiled, so all rows are after their first.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    found = []
    skipped = []
    with contextlib.ExitStack() as stack:
        tree = None
        if arguments.against:
            tree = stack.enter_context(trees.checkout(arguments.against))
        place = tempfile.TemporaryDirectory(prefix="weightport-bench-", dir=arguments.folder)
        sources = Sources(Path(stack.enter_context(place)), arguments.size)
        titles = list(WORKS)
        while titles:
            lines, lost = run(titles.pop(0), sources, tree, arguments)
            found += lines
            skipped += lost
            sources.keep(_wanted_later(titles))
    for text in skipped:
        print(f"left out: {text}")
    if arguments.record:
        goals.record(arguments.record, found, arguments.repeat, skipped)


if __name__ == "__main__":
    main()
