"""The runtime beside diffusers, in the same run and in turns: runtime.py [start] [load] [step]
[cuda]

start    import, and process start to a loaded pipeline
load     a UNet of Stable Diffusion 1.5 in float32 cast to float16 and bfloat16, from the page cache and from the disk,
         without what imports take
step     one step of that UNet on the CPU, eager, batch 2; float32 at 256x256, on one thread
cuda     eager and compiled steps on a GPU, float16 and bfloat16, at 512x512 and 1024x1024

Weights are random; they are written to a temporary folder. Ratios are of ours to diffusers' in the
same round, and the median over rounds; CPU seconds are user and system time, which a busy machine
disturbs less than wall time. Memory is resident, or that allocated on the GPU, at its highest. Of
steps also: the first one, and the relative L2 difference of the output.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from measure import Run, measure

UNET = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
START = {
    "import torch": "import torch",
    "import weightport": "import weightport, sys; assert 'torch' not in sys.modules",
    "from weightport import DiffusionPipeline": "from weightport import DiffusionPipeline",
    "from diffusers import DiffusionPipeline": "from diffusers import DiffusionPipeline",
    "diffusers, loaded": (
        "from diffusers import StableDiffusionPipeline as P; P.from_pretrained({repo!r})"
    ),
    "weightport, loaded": (
        "from weightport import DiffusionPipeline as P; P.from_pretrained({repo!r})"
    ),
}


def write_repo(folder: Path) -> None:
    """A repository of Stable Diffusion 1.5's shapes, random and in float32."""
    import torch

    import weightport
    from weightport.converters.repo.tokenizer import write_tokenizer

    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer")
    clip = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
    }
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    weightport.StableDiffusionPipeline(
        vae=weightport.AutoencoderKL(
            {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, **blocks}
        ),
        text_encoder=weightport.CLIPTextModel({**clip, "projection_dim": 768}),
        tokenizer=weightport.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=weightport.UNet2DConditionModel(UNET),
        scheduler=weightport.DDIMScheduler(),
        requires_safety_checker=False,
    ).save_pretrained(folder / "repo")


Round = dict[str, Run]


def show(
    title: str, rounds: list[Round], peer: str, notes: Mapping[str, str] = MappingProxyType({})
) -> None:
    """One line a program: medians, and ratios to the peer of the same round."""
    print(f"\n{title:44}{'wall s':>8}{'ratio':>8}{'CPU s':>8}{'ratio':>8}{'MB':>8}{'ratio':>8}")
    for name in rounds[0]:
        line = f"  {name:42}"
        for kind in ("wall", "cpu"):
            times = [getattr(one[name], kind) for one in rounds]
            ratios = [
                time / getattr(one[peer], kind) for time, one in zip(times, rounds, strict=True)
            ]
            line += f"{statistics.median(times):8.4f}{statistics.median(ratios):8.2f}"
        memory, theirs = (max(one[who].rss for one in rounds) for who in (name, peer))
        print(f"{line}{memory / 1000:8.0f}{memory / theirs:8.2f}{notes.get(name, '')}", flush=True)


def start(folder: Path, options: argparse.Namespace) -> None:
    """Imports, and process start to a loaded pipeline; the first round warms the caches."""
    programs = {name: code.format(repo=str(folder / "repo")) for name, code in START.items()}
    rounds = [
        {name: measure([sys.executable, "-c", code]) for name, code in programs.items()}
        for _ in range(options.repeat + 1)
    ]
    show("start", rounds[1:], "diffusers, loaded")


@contextlib.contextmanager
def living(programs: Mapping[str, Sequence[object]]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Workers with these arguments, all ready; they end at the end."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, arguments in programs.items():
            command = [
                sys.executable,
                str(Path(__file__).with_name("worker.py")),
                *map(str, arguments),
            ]
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
    worker.stdin.write(f"{count}\n")
    worker.stdin.flush()
    wall, cpu, peak = json.loads(worker.stdout.readline())
    return Run(wall, cpu, peak, 0)


def load(folder: Path, options: argparse.Namespace) -> None:
    """float32 file -> float16 and bfloat16, each in a new process; the first round warms the
    caches.

    Who comes first changes from round to round: the memory that a process left may be cheaper to
    get than other memory.
    """
    unet = folder / "repo" / "unet"
    for cold, dtype in itertools.product((False, True), options.dtype or ["float16", "bfloat16"]):
        rounds: list[Round] = []
        for number in range(options.repeat + 1):
            rounds.append({})
            packages = sorted(("diffusers", "weightport"), reverse=bool(number % 2))
            with living(
                {package: ("load", package, unet, dtype) for package in packages}
            ) as workers:
                for package, worker in workers.items():
                    if cold:
                        drop_cache(unet)
                    rounds[-1][package] = ask(worker)
        show(
            f"float32, {'on the disk' if cold else 'in the page cache'} -> {dtype}",
            rounds[1:],
            "diffusers",
        )


def drop_cache(folder: Path) -> None:
    """Let the system read weights from the disk again."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def steps(
    levers: list[str], unet: Path, device: str, dtype: str, size: int, options: argparse.Namespace
) -> None:
    """Steps of the UNet in turns."""
    import torch

    peer, count = "diffusers, eager", 10 if device == "cuda" else 1
    names = [peer, *(f"weightport, {lever}" for lever in levers)]
    with tempfile.TemporaryDirectory() as outputs:
        programs = {}
        for name in names:
            package, lever = name.split(", ")
            programs[name] = (
                "step",
                package,
                unet,
                device,
                dtype,
                size,
                options.threads,
                lever,
                Path(outputs, name),
            )
        with living(programs) as workers:
            first = {name: ask(worker).wall for name, worker in workers.items()}
            rounds = [
                {name: ask(worker, count) for name, worker in workers.items()}
                for _ in range(options.repeat)
            ]
        results = {name: torch.load(Path(outputs, name)).double() for name in names}
    notes = {}
    for name, result in results.items():
        difference = float((result - results[peer]).norm() / results[peer].norm())
        notes[name] = f"  first {first[name]:.1f} s, differs by {difference:.0e}"
    threads = "" if device == "cuda" else f", {options.threads} threads"
    show(f"{device}{threads}, {dtype}, {size}x{size}", rounds, peer, notes)


def step(folder: Path, options: argparse.Namespace) -> None:
    """Eager."""
    for dtype, size in itertools.product(options.dtype or ["float32"], options.size or [256]):
        steps(
            ["eager", "channels last", "packed"],
            folder / "repo" / "unet",
            "cpu",
            dtype,
            size,
            options,
        )


def cuda(folder: Path, options: argparse.Namespace) -> None:
    """Eager and compiled on a GPU."""
    import torch

    if not torch.cuda.is_available():
        print("\ncuda: there is no GPU")
        return
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for dtype, size in itertools.product(
        options.dtype or ["float16", "bfloat16"], options.size or [512, 1024]
    ):
        steps(
            ["eager", "packed", "compiled"], folder / "repo" / "unet", "cuda", dtype, size, options
        )


PARTS = {"start": start, "load": load, "step": step, "cuda": cuda}


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--size", type=int, nargs="+", help="edges of the images of steps")
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "float16", "bfloat16"], help="of steps"
    )
    parser.add_argument("--threads", type=int, default=1, help="of steps on the CPU")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the repository is, or is put and left")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "repo").is_dir():
            write_repo(folder)
        for part in options.parts or PARTS:
            began = time.perf_counter()
            PARTS[part](folder, options)
            print(f"({part}: {time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    main()
