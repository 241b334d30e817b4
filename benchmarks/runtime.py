"""The runtime beside diffusers, in turns, and our goals:

    python benchmarks/runtime.py [start] [load] [file] [step] [parts] [flow] [image] [cuda]
        [--threads N...] [--size N...] [--dtype NAME...] [--repeat N] [--folder DIR]
        [--record FILE] [--against REVISION]

start    import, and process start to a loaded pipeline
load     a UNet of Stable Diffusion 1.5 in float32 cast to float16 and bfloat16, from the page cache
         and from the disk, without what imports take
file     a pipeline of an original checkpoint of Stable Diffusion 1.5 in float32, `.safetensors` and
         `.ckpt`, from the page cache, without what imports take; memory also without the pages of
         files (`anon`, imports included), and by how much that grew
step     one step of that UNet on the CPU, batch 2; float32 at 256x256, on one thread and on two
parts    its VAE decodes such an image, its text encoder reads two prompts
flow     one step of the transformers of Stable Diffusion 3.5 medium (3 of 24 blocks) and of FLUX.1
         (1 + 2 of 19 + 38) on the CPU, in float32 at 256x256
image    from the start of Python to a picture of 20 steps, once; also by OpenVINO and by
         stable-diffusion.cpp (`stable-diffusion-cpp-python`), if installed
cuda     eager and compiled steps on a GPU, float16 and bfloat16, at 512x512 and 1024x1024

Weights are random; they are written to a temporary folder. Ratios are of ours to diffusers' in the
same round, and the median over rounds; CPU seconds are user and system time, which a busy machine
disturbs less than wall time. `worst` is the highest ratio of a round; what runs on one thread is
judged by CPU seconds. Memory is resident, or that allocated on the GPU, at its highest. Of steps
also: the first one, and the relative L2 difference of the output. What is needed and not there is
said, and left out.

`--record` keeps the figures with machine and commit; `benchmarks/results/runtime.json` is one, and
`python benchmarks/goals.py RECORD PICTURE` draws it.

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
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import goals
import trees
from goals import Line
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
STEPS = 20  # of an image
MEASURED_BY = "of diffusers in the same round"
Figures = Mapping[str, float]
NONE: Mapping[str, Figures] = MappingProxyType({})
START_GOAL = {"ratio": 0.35}
LOAD_GOAL = {"ratio": 0.5}
FILE_GOAL = {"ratio": 0.6, "MB ratio": 0.5}
STEP_GOALS = {"eager": 0.95, "packed": 0.65}  # in every round
PART_GOAL = 1.0
# Blocks of transformers, of which all are alike.
TRANSFORMERS = {
    "sd35_medium": {"num_layers": 3, "dual_attention_layers": [0]},
    "flux": {"num_layers": 1, "num_single_layers": 2},
}
IMAGE_GOALS = {"eager": {"ratio": 0.95}, "packed": {"ratio": 0.7}}
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
    """What is measured: a side, beside a peer.

    Attributes:
        found: what was measured.
        skipped: what could not be, and why.
    """

    ours: Side
    peer: Side
    unet: Path
    repo: Path
    options: argparse.Namespace
    found: list[Line] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

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


def write_transformer(folder: Path, family: str, own: Mapping[str, Any]) -> None:
    """The transformer of a family with random weights in float32, and a config of its own."""
    import torch

    import weightport
    from weightport.mappings.families import families

    known = families()[family].components["transformer"]
    torch.manual_seed(0)
    kind = getattr(weightport, known.class_name)
    kind(**{**known.config, **own}).save_pretrained(folder)


def show(
    bench: Bench,
    title: str,
    rounds: list[Round],
    peers: Mapping[str, str],
    wanted: Mapping[str, Figures] = NONE,
    more: Mapping[str, Figures] = NONE,
) -> None:
    """Print and keep one line a program: medians, and ratios to its peer in the same round.

    Args:
        wanted: program -> its goals; beside another commit there are none.
        more: program -> other figures of it.
    """
    if bench.peer.package == OURS:
        wanted = NONE
    found = []
    for name in rounds[0]:
        runs = [one[name] for one in rounds]
        others = [one[peers[name]] for one in rounds]
        known = {**figures(runs, others), **more.get(name, {})}
        found.append(Line(title, name, known, wanted.get(name, {})))
    print("\n" + goals.table(found, list(found[0].figures), places=4), flush=True)
    bench.found.extend(found)


def figures(runs: Sequence[Run], others: Sequence[Run]) -> dict[str, float]:
    """What runs took, beside others in the same rounds."""
    pairs = list(zip(runs, others, strict=True))
    walls = [run.wall / other.wall for run, other in pairs]
    cpus = [run.cpu / other.cpu for run, other in pairs]
    memory = max(run.rss for run in runs)
    return {
        "wall s": median(run.wall for run in runs),
        "ratio": median(walls),
        "worst": max(walls),
        "CPU s": median(run.cpu for run in runs),
        "CPU ratio": median(cpus),
        "CPU worst": max(cpus),
        "MB": memory / 1000,
        "MB ratio": memory / max(other.rss for other in others),
    }


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
    show(bench, "start", rounds[1:], peers, {f"{bench.ours.name}: {LOADED}": START_GOAL})


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
    """What its work took, on average over `count` times."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    with watched(worker.pid) as seen:
        before = seen["RssAnon"]
        worker.stdin.write(f"{count}\n")
        worker.stdin.flush()
        wall, cpu, peak = json.loads(worker.stdout.readline())
    return Run(wall, cpu, peak, seen["RssAnon"], grown=seen["RssAnon"] - before)


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
        wanted = {bench.ours.name: LOAD_GOAL} if dtype == "float16" else NONE
        show(bench, f"float32, {place} -> {dtype}", rounds[1:], peers, wanted)


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
        highest = {name: max(one[name].anon for one in rounds[1:]) for name in peers}
        anonymous = {
            name: {
                "anon MB": highest[name] / 1000,
                "anon ratio": highest[name] / highest[peers[name]],
                "grown MB": max(one[name].grown for one in rounds[1:]) / 1000,
            }
            for name in peers
        }
        wanted = {bench.ours.name: FILE_GOAL}
        show(bench, f"from_single_file, {path.suffix}", rounds[1:], peers, wanted, anonymous)


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


def turns(
    bench: Bench,
    title: str,
    commands: Mapping[str, Command],
    peers: Mapping[str, str],
    wanted: Mapping[str, Figures] = NONE,
    count: int = 1,
) -> None:
    """Living workers in turns; all are in memory at once.

    Args:
        commands: workers, whose last argument is the file that their result goes to.
        wanted: as of `show`.
        count: how often each does its work in a round.
    """
    import torch

    with living(commands) as workers:
        first = {name: ask(worker).wall for name, worker in workers.items()}
        rounds = [
            {name: ask(worker, count) for name, worker in workers.items()}
            for _ in range(bench.options.repeat)
        ]
    results = {name: torch.load(command[-1]).double() for name, command in commands.items()}
    more = {}
    for name, result in results.items():
        expected = results[peers[name]]
        difference = float((result - expected).norm() / expected.norm())
        more[name] = {"first s": first[name], "differs": difference}
    show(bench, title, rounds, peers, wanted, more)


def steps(
    bench: Bench, levers: Sequence[str], device: str, dtype: str, size: int, threads: int
) -> None:
    """Steps of the UNet in turns; beside another commit one lever after the other, for memory."""
    if bench.peer.package != OURS:
        steps_of(bench, levers, device, dtype, size, threads)
        return
    for lever in levers:
        steps_of(bench, [lever], device, dtype, size, threads)


def steps_of(
    bench: Bench, levers: Sequence[str], device: str, dtype: str, size: int, threads: int
) -> None:
    """Steps with these levers."""
    commands = {}
    peers = {}
    wanted = {}
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
                if device == "cpu" and side is bench.ours and lever in STEP_GOALS:
                    wanted[name] = {judged(threads, "worst"): STEP_GOALS[lever]}
        place = device if device == "cuda" else f"step, {said(threads)}"
        count = 10 if device == "cuda" else 1
        turns(bench, f"{place}, {dtype}, {size}x{size}", commands, peers, wanted, count)


def judged(threads: int, column: str) -> str:
    """The column that a goal is for: on one thread that of CPU seconds."""
    return f"CPU {column}" if threads == 1 else column


def said(threads: int) -> str:
    """So many threads."""
    return f"{threads} thread{'s' * (threads > 1)}"


def step(bench: Bench) -> None:
    """Steps on the CPU."""
    dtypes = bench.options.dtype or ["float32"]
    sizes = bench.options.size or [256]
    for threads, dtype, size in itertools.product(bench.options.threads, dtypes, sizes):
        steps(bench, ["eager", "packed"], "cpu", dtype, size, threads)


def parts(bench: Bench) -> None:
    """What else a run computes with."""
    sizes = bench.options.size or [256]
    compare_works(
        bench,
        [
            *((f"VAE decodes {size}x{size}", ["decode", bench.repo, size]) for size in sizes),
            ("text encoder reads 2 prompts", ["read", bench.repo, 77]),
        ],
    )


def flow(bench: Bench) -> None:
    """Steps of transformers, in full width and of few blocks."""
    sizes = bench.options.size or [256]
    works: list[Work] = []
    for family, own in TRANSFORMERS.items():
        folder = bench.repo.with_name(family)
        if not folder.is_dir():
            write_transformer(folder, family, own)
        works += [(f"{family}, {size}x{size}", ["transform", folder, size]) for size in sizes]
    compare_works(bench, works)


Work = tuple[str, list[object]]  # what it is called; the work of a worker, and its arguments


def compare_works(bench: Bench, works: Sequence[Work]) -> None:
    """Works of living workers that do nothing else, on as many threads as are asked for."""
    for threads, (title, (work, *arguments)) in itertools.product(bench.options.threads, works):
        with tempfile.TemporaryDirectory() as outputs:
            commands = {
                side.name: side.worker(
                    work, side.package, *arguments, threads, Path(outputs, side.name)
                )
                for side in bench.sides
            }
            peers = dict.fromkeys(commands, bench.peer.name)
            wanted = {bench.ours.name: {judged(threads, "ratio"): PART_GOAL}}
            turns(bench, f"{title}, {said(threads)}", commands, peers, wanted)


def image(bench: Bench) -> None:
    """Whole processes, on as many threads as are asked for last."""
    size = (bench.options.size or [256])[-1]
    threads = bench.options.threads[-1]
    programs = {
        f"{side.name}, {lever}": side.worker(
            "image", side.package, bench.repo, size, threads, lever, STEPS
        )
        for side in bench.sides
        for lever in (["eager", "packed"] if side.package == OURS else ["eager"])
    }
    title = f"image of {STEPS} steps, {size}x{size}, {said(threads)}"
    if find_spec("openvino"):
        prepared = bench.repo.with_name(f"openvino-{size}") / "unet.xml"
        graph = [bench.repo, size, threads, prepared, STEPS]
        programs["OpenVINO"] = bench.peer.worker("openvino", *graph)
        if not prepared.exists():
            subprocess.run(bench.peer.worker("openvino", *graph[:-1], 0), check=True)
    else:
        bench.skipped.append(f"{title}, OpenVINO: openvino is not installed")
    if find_spec("stable_diffusion_cpp"):
        checkpoint = bench.repo.with_suffix(".safetensors")
        if not checkpoint.exists():
            convert = ["-m", "weightport", "convert", "-q", bench.repo, "-o", checkpoint]
            subprocess.run(bench.ours.python(*convert, "--to=ldm"), check=True)
        script = Path(__file__).with_name("stable_diffusion_cpp_image.py")
        command = bench.ours.python(script, checkpoint, size, threads, STEPS)
        programs["stable-diffusion.cpp"] = command
    else:
        bench.skipped.append(f"{title}: stable-diffusion-cpp-python is not installed")
    peers = dict.fromkeys(programs, f"{bench.peer.name}, eager")
    wanted = {f"{bench.ours.name}, {lever}": goal for lever, goal in IMAGE_GOALS.items()}
    rounds = [{name: measure(command) for name, command in programs.items()}]
    show(bench, title, rounds, peers, wanted)


def cuda(bench: Bench) -> None:
    """Eager and compiled on a GPU."""
    import torch

    if not torch.cuda.is_available():
        bench.skipped.append("cuda: there is no GPU")
        return
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    dtypes = bench.options.dtype or ["float16", "bfloat16"]
    sizes = bench.options.size or [512, 1024]
    for dtype, size in itertools.product(dtypes, sizes):
        steps(bench, ["eager", "packed", "compiled"], "cuda", dtype, size, 1)


PARTS = {
    "start": start,
    "load": load,
    "file": file,
    "step": step,
    "parts": parts,
    "flow": flow,
    "image": image,
    "cuda": cuda,
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    option("--size", type=int, nargs="+", help="edges of the images of steps")
    option("--dtype", nargs="+", choices=["float32", "float16", "bfloat16"], help="of steps")
    option("--threads", type=int, nargs="+", default=[1, 2], help="of steps on the CPU")
    option("--repeat", type=int, default=5)
    option("--folder", type=Path, help="where the repository is, or is put and left")
    option("--record", type=Path, metavar="FILE", help="keep the figures as JSON")
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
    for text in bench.skipped:
        print(f"left out: {text}")
    if options.record:
        goals.record(options.record, bench.found, options.repeat, bench.skipped, MEASURED_BY)


if __name__ == "__main__":
    main()
