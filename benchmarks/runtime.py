"""The runtime beside diffusers, in turns: runtime.py [start] [load] [file] [step] [cuda]

start    import, and process start to a loaded pipeline
load     a UNet of Stable Diffusion 1.5 in float32 cast to float16 and bfloat16, from the page cache
         and from the disk, without what imports take
file     a pipeline of an original checkpoint of Stable Diffusion 1.5 in float32, `.safetensors` and
         `.ckpt`, from the page cache, without what imports take; also by how much anonymous memory
         grew
step     one step of that UNet on the CPU, eager, batch 2; float32 at 256x256, on one thread
cuda     eager and compiled steps on a GPU, float16 and bfloat16, at 512x512 and 1024x1024

Weights are random; they are written to a temporary folder. Ratios are of ours to diffusers' in the
same round, and the median over rounds; CPU seconds are user and system time, which a busy machine
disturbs less than wall time. Memory is resident, or that allocated on the GPU, at its highest. Of
steps also: the first one, and the relative L2 difference of the output.

With `--against REVISION` a worktree of that commit takes the place of diffusers: ratios and
differences are to weightport as it was there. Nothing is installed for it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType

import trees
from measure import Command, Round, Run, end_in_order, measure, sample

UNET = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
PEER = "diffusers"
OURS = "weightport"
COLUMNS = ("wall s", "ratio", "CPU s", "ratio", "MB", "ratio")
TORCH = "import torch"
LOADED = "loaded"
# What a process does in `start`, package by package.
START = {
    OURS: {
        "import weightport": "import weightport, sys; assert 'torch' not in sys.modules",
        "from weightport import DiffusionPipeline": "from weightport import DiffusionPipeline",
        LOADED: "from weightport import DiffusionPipeline as P; P.from_pretrained({repo!r})",
    },
    PEER: {
        "from diffusers import DiffusionPipeline": "from diffusers import DiffusionPipeline",
        LOADED: "from diffusers import StableDiffusionPipeline as P; P.from_pretrained({repo!r})",
    },
}


@dataclass(frozen=True)
class Side:
    """A program that takes part: a package, and the tree whose code it is if it is ours."""

    name: str
    package: str
    tree: Path = trees.ROOT

    def python(self, *arguments: object) -> Command:
        """A command that runs Python with it."""
        return [*trees.python(self.tree), *map(str, arguments)]

    def worker(self, *arguments: object) -> Command:
        """A process that stays alive; a tree has a worker that knows its code."""
        return self.python(self.tree / "benchmarks" / "worker.py", *arguments)


@dataclass(frozen=True)
class Bench:
    """What is measured: a side, beside a peer."""

    ours: Side
    peer: Side
    unet: Path
    repo: Path
    options: argparse.Namespace

    @property
    def sides(self) -> tuple[Side, Side]:
        """Both, the peer first."""
        return self.peer, self.ours


def write_repo(folder: Path) -> None:
    """A repository of Stable Diffusion 1.5's shapes, random and in float32."""
    import torch

    import weightport
    from weightport.converters.repo.tokenizer import write_tokenizer

    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer")
    weightport.StableDiffusionPipeline(
        vae=weightport.AutoencoderKL(**VAE),
        text_encoder=weightport.CLIPTextModel(CLIP),
        tokenizer=weightport.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=weightport.UNet2DConditionModel(**UNET),
        scheduler=weightport.DDIMScheduler(),
        requires_safety_checker=False,
    ).save_pretrained(folder / "repo")


def show(
    title: str,
    rounds: list[Round],
    peers: Mapping[str, str],
    notes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """One line a program: medians, and ratios to its peer in the same round."""
    print(f"\n{title:52}" + "".join(f"{column:>8}" for column in COLUMNS))
    for name in rounds[0]:
        runs = [one[name] for one in rounds]
        others = [one[peers[name]] for one in rounds]
        pairs = list(zip(runs, others, strict=True))
        wall = median(run.wall for run in runs)
        wall_ratio = median(run.wall / other.wall for run, other in pairs)
        cpu = median(run.cpu for run in runs)
        cpu_ratio = median(run.cpu / other.cpu for run, other in pairs)
        memory = max(run.rss for run in runs)
        memory_ratio = memory / max(other.rss for other in others)
        print(
            f"  {name:50}"
            f"{wall:8.4f}{wall_ratio:8.2f}"
            f"{cpu:8.4f}{cpu_ratio:8.2f}"
            f"{memory / 1000:8.0f}{memory_ratio:8.2f}"
            f"{notes.get(name, '')}",
            flush=True,
        )


def start(bench: Bench) -> None:
    """Imports, and process start to a loaded pipeline; the first round warms the caches."""
    programs = {TORCH: bench.ours.python("-c", TORCH)}
    peers = {TORCH: f"{bench.peer.name}: {LOADED}"}
    for side in bench.sides:
        for title, code in START[side.package].items():
            name = f"{side.name}: {title}"
            twin = f"{bench.peer.name}: {title}"
            programs[name] = side.python("-c", code.format(repo=str(bench.repo)))
            peers[name] = twin if twin in programs else peers[TORCH]
    rounds = [
        {name: measure(command) for name, command in programs.items()}
        for _ in range(bench.options.repeat + 1)
    ]
    show("start", rounds[1:], peers)


@contextlib.contextmanager
def living(commands: Mapping[str, Command]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Workers, all ready; they end at the end."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, command in commands.items():
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            workers[name] = stack.enter_context(worker)
        for worker in workers.values():
            assert worker.stdout is not None
            worker.stdout.readline()
        yield workers


def ask(worker: subprocess.Popen[str], count: int = 1) -> Run:
    """What its work took, on average over `count` times; of anonymous memory, how much it grew."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    with watched(worker.pid) as seen:
        before = seen["RssAnon"]
        worker.stdin.write(f"{count}\n")
        worker.stdin.flush()
        wall, cpu, peak = json.loads(worker.stdout.readline())
    return Run(wall, cpu, peak, seen["RssAnon"] - before)


@contextlib.contextmanager
def watched(pid: int) -> Iterator[dict[str, int]]:
    """The memory of a process at its highest, from now on."""
    seen = {"RssAnon": 0}
    sample(pid, seen)
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.005):
            sample(pid, seen)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
        sample(pid, seen)


def load(bench: Bench) -> None:
    """float32 file -> float16 and bfloat16; the first round warms the caches."""
    peers = {side.name: bench.peer.name for side in bench.sides}
    dtypes = bench.options.dtype or ["float16", "bfloat16"]
    for cold, dtype in itertools.product((False, True), dtypes):
        rounds = [load_once(bench, cold, dtype, turn) for turn in range(bench.options.repeat + 1)]
        place = "on the disk" if cold else "in the page cache"
        show(f"float32, {place} -> {dtype}", rounds[1:], peers)


def load_once(bench: Bench, cold: bool, dtype: str, turn: int) -> Round:
    """One load by each side, in a new process.

    Who comes first changes from turn to turn: the memory that a process left may be cheaper to get
    than other memory.
    """
    sides = bench.sides[:: -1 if turn % 2 else 1]
    commands = {side.name: side.worker("load", side.package, bench.unet, dtype) for side in sides}
    runs = {}
    with living(commands) as workers:
        for name, worker in workers.items():
            if cold:
                drop_cache(bench.unet)
            runs[name] = ask(worker)
    return {side.name: runs[side.name] for side in bench.sides}


def file(bench: Bench) -> None:
    """An original checkpoint -> a pipeline; the first round warms the caches."""
    import torch
    from safetensors.torch import load_file

    import weightport

    peers = {side.name: bench.peer.name for side in bench.sides}
    safe = bench.repo.with_name("original.safetensors")
    pickled = safe.with_suffix(".ckpt")
    if not safe.exists():
        weightport.convert(bench.repo, safe, to="ldm", residue=False)
        torch.save({"state_dict": load_file(safe)}, pickled)
    for path in (safe, pickled):
        rounds = [file_once(bench, path, turn) for turn in range(bench.options.repeat + 1)]
        grown = {name: max(one[name].anon for one in rounds[1:]) for name in peers}
        notes = {name: f"  anonymous {grown[name] / 1000:.0f} MB" for name in peers}
        show(f"from_single_file, {path.suffix}", rounds[1:], peers, notes)


def file_once(bench: Bench, path: Path, turn: int) -> Round:
    """One load by each side, in a new process, in turns."""
    sides = bench.sides[:: -1 if turn % 2 else 1]
    commands = {side.name: side.worker("file", side.package, path, bench.repo) for side in sides}
    with living(commands) as workers:
        runs = {name: ask(worker) for name, worker in workers.items()}
    return {side.name: runs[side.name] for side in bench.sides}


def drop_cache(folder: Path) -> None:
    """Let the system read weights from the disk again."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def steps(bench: Bench, levers: Sequence[str], device: str, dtype: str, size: int) -> None:
    """Steps of the UNet in turns; beside another commit one lever after the other, for memory."""
    if bench.peer.package != OURS:
        steps_of(bench, levers, device, dtype, size)
        return
    for lever in levers:
        steps_of(bench, [lever], device, dtype, size)


def steps_of(bench: Bench, levers: Sequence[str], device: str, dtype: str, size: int) -> None:
    """Steps with these levers; all sides are in memory at once."""
    import torch

    threads = bench.options.threads
    count = 10 if device == "cuda" else 1
    commands = {}
    peers = {}
    with tempfile.TemporaryDirectory() as outputs:
        for side in bench.sides:
            # diffusers runs as it is, and is the peer of all
            for lever in levers if side.package == OURS else ["eager"]:
                name = f"{side.name}, {lever}"
                twin = f"{bench.peer.name}, {lever}"
                commands[name] = side.worker(
                    "step", side.package, bench.unet, device, dtype, size, threads, lever,
                    Path(outputs, name),
                )  # fmt: skip
                peers[name] = twin if twin in commands else f"{bench.peer.name}, eager"
        with living(commands) as workers:
            first = {name: ask(worker).wall for name, worker in workers.items()}
            rounds = [
                {name: ask(worker, count) for name, worker in workers.items()}
                for _ in range(bench.options.repeat)
            ]
        results = {name: torch.load(Path(outputs, name)).double() for name in commands}
    notes = {}
    for name, result in results.items():
        expected = results[peers[name]]
        difference = float((result - expected).norm() / expected.norm())
        notes[name] = f"  first {first[name]:.1f} s, differs by {difference:.0e}"
    place = device if device == "cuda" else f"{device}, {threads} threads"
    show(f"{place}, {dtype}, {size}x{size}", rounds, peers, notes)


def step(bench: Bench) -> None:
    """Eager."""
    dtypes = bench.options.dtype or ["float32"]
    sizes = bench.options.size or [256]
    for dtype, size in itertools.product(dtypes, sizes):
        steps(bench, ["eager", "channels last", "packed"], "cpu", dtype, size)


def cuda(bench: Bench) -> None:
    """Eager and compiled on a GPU."""
    import torch

    if not torch.cuda.is_available():
        print("\ncuda: there is no GPU")
        return
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    dtypes = bench.options.dtype or ["float16", "bfloat16"]
    sizes = bench.options.size or [512, 1024]
    for dtype, size in itertools.product(dtypes, sizes):
        steps(bench, ["eager", "packed", "compiled"], "cuda", dtype, size)


PARTS = {"start": start, "load": load, "file": file, "step": step, "cuda": cuda}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    option("--size", type=int, nargs="+", help="edges of the images of steps")
    option("--dtype", nargs="+", choices=["float32", "float16", "bfloat16"], help="of steps")
    option("--threads", type=int, default=1, help="of steps on the CPU")
    option("--repeat", type=int, default=5)
    option("--folder", type=Path, help="where the repository is, or is put and left")
    option("--against", metavar="REVISION", help="measure beside this commit, not diffusers")
    return parser.parse_args()


def main() -> None:
    """Run the parts that are asked for."""
    options = parse()
    end_in_order()
    ours = Side(OURS, OURS)
    peer = Side(PEER, PEER)
    with contextlib.ExitStack() as stack:
        if options.against:
            tree = stack.enter_context(trees.checkout(options.against))
            peer = Side(f"{OURS} @ {options.against}", OURS, tree)
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        repo = folder / "repo"
        if not repo.is_dir():
            write_repo(folder)
        bench = Bench(ours, peer, repo / "unet", repo, options)
        for part in options.parts or PARTS:
            began = time.perf_counter()
            PARTS[part](bench)
            print(f"({part}: {time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    main()
