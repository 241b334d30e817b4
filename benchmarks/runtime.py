"""The runtime beside diffusers, in the same run and in turns: runtime.py [start] [load] [step] [compile] [cuda]

start    import, and process start to a loaded pipeline
load     a UNet of Stable Diffusion 1.5 in float32 cast to float16 and bfloat16, from the page cache and from the disk
step     one step of that UNet on the CPU, eager, batch 2; float32 at 256x256, on one thread
compile  the same, compiled (many minutes); --small takes a UNet of half the layers
cuda     eager and compiled steps on a GPU, float16 and bfloat16, at 512x512 and 1024x1024

Weights are random; they are written to a temporary folder. Ratios are of ours to diffusers' in the same round, and the
median over rounds; CPU seconds are user and system time, which a busy machine disturbs less than wall time. Memory is
resident, or that allocated on the GPU, at its highest. Of steps also: the first one, and the relative L2 difference of
the output.
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
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from measure import Run, measure

UNET = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
START = {
    "import torch": "import torch",
    "import weightport": "import weightport, sys; assert 'torch' not in sys.modules",
    "from weightport import DiffusionPipeline": "from weightport import DiffusionPipeline",
    "from diffusers import DiffusionPipeline": "from diffusers import DiffusionPipeline",
    "diffusers, loaded": "from diffusers import StableDiffusionPipeline as P; P.from_pretrained({repo!r})",
    "weightport, loaded": "from weightport import DiffusionPipeline as P; P.from_pretrained({repo!r})",
}
LOAD = "import torch; from {package} import UNet2DConditionModel as U; {body}"
CAST = "U.from_pretrained({unet!r}, torch_dtype=torch.{dtype})"


def write_repo(folder: Path) -> None:
    """A repository of Stable Diffusion 1.5's shapes, random and in float32."""
    import torch

    import weightport
    from weightport.converters.tokenizer import write_tokenizer

    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer")
    clip = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "hidden_act": "quick_gelu"}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    weightport.StableDiffusionPipeline(
        vae=weightport.AutoencoderKL({"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, **blocks}),
        text_encoder=weightport.CLIPTextModel({**clip, "projection_dim": 768}),
        tokenizer=weightport.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=weightport.UNet2DConditionModel(UNET),
        scheduler=weightport.DDIMScheduler(),
        requires_safety_checker=False,
    ).save_pretrained(folder / "repo")


def processes(programs: dict[str, str], repeat: int, cold: Iterable[Path] = ()) -> dict[str, list[Run]]:
    """Each program in a process of its own, all of them once a round; the first round warms the caches.

    Files in `cold` are dropped from the page cache before each.
    """
    rounds = []
    for _ in range(repeat + 1):
        rounds.append({})
        for name, code in programs.items():
            for path in cold:
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            rounds[-1][name] = measure([sys.executable, "-c", code])
    return {name: [one[name] for one in rounds[1:]] for name in programs}


def show(
    title: str,
    runs: dict[str, list[Run]],
    peer: str,
    before: Mapping[str, str] = MappingProxyType({}),
    notes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """One line a program: medians, and ratios to the peer of the same round; `before` is what to leave out of times."""
    print(f"\n{title:44}{'wall s':>8}{'ratio':>8}{'CPU s':>8}{'ratio':>8}{'MB':>8}{'ratio':>8}")

    def times(name: str, kind: str) -> list[float]:
        parts = runs[before[name]] if before else [Run(0, 0, 0, 0)] * len(runs[name])
        return [getattr(run, kind) - getattr(part, kind) for run, part in zip(runs[name], parts, strict=True)]

    for name in before or runs:
        line = f"  {name:42}"
        for kind in ("wall", "cpu"):
            mine, theirs = times(name, kind), times(peer, kind)
            ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            line += f"{statistics.median(mine):8.4f}{ratio:8.2f}"
        rss, theirs_rss = (max(run.rss for run in runs[one]) for one in (name, peer))
        print(f"{line}{rss / 1000:8.0f}{rss / theirs_rss:8.2f}{notes.get(name, '')}", flush=True)


def start(folder: Path, options: argparse.Namespace) -> None:
    """Imports, and process start to a loaded pipeline."""
    programs = {name: code.format(repo=str(folder / "repo")) for name, code in START.items()}
    show("start", processes(programs, options.repeat), "diffusers, loaded")


def load(folder: Path, options: argparse.Namespace) -> None:
    """float32 file -> float16 and bfloat16, without what the imports take."""
    unet = folder / "repo" / "unet"
    for title, cold in (("in the page cache", []), ("on the disk", list(unet.glob("*.safetensors")))):
        for dtype in ("float16", "bfloat16"):
            body = CAST.format(unet=str(unet), dtype=dtype)
            packages = ("diffusers", "weightport")
            programs = {f"{p}, imports": LOAD.format(package=p, body="") for p in packages}
            programs |= {p: LOAD.format(package=p, body=body) for p in packages}
            runs = processes(programs, options.repeat, cold)
            show(f"float32, {title} -> {dtype}", runs, "diffusers", {p: f"{p}, imports" for p in packages})


STEP = """
import contextlib, json, re, sys, time, torch
from pathlib import Path
package, folder, device, dtype, size, threads, lever, output = sys.argv[1:]
torch.set_num_threads(int(threads))
if package == "diffusers":
    from diffusers import UNet2DConditionModel as U
else:
    from weightport import UNet2DConditionModel as U
    from weightport.runtime.speed import compile_model, constant_context, pack_model
unet = U.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
if lever == "channels last":
    unet.to(memory_format=torch.channels_last)
if lever == "packed":
    pack_model(unet)
if lever == "compiled":
    compile_model(unet)

def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, unet.dtype)

def times():
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()

def peak():
    if device == "cuda":
        return torch.cuda.max_memory_allocated() // 1000
    status = Path("/proc/self/status").read_text()  # ru_maxrss is also the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])

x, text, t = noise(2, 4, int(size) // 8, int(size) // 8), noise(2, 77, 768), torch.tensor(500, device=device)
with torch.no_grad(), constant_context(unet) if package == "weightport" else contextlib.nullcontext():
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        start = times()
        for _ in range(count):
            y = unet(x, t, encoder_hidden_states=text).sample
        took = [(end - begin) / count for begin, end in zip(start, times())]
        torch.save(y.cpu(), output)
        print(json.dumps([*took, peak()]), flush=True)
"""


def ask(process: subprocess.Popen[str], count: int) -> Run:
    """What one of `count` steps took."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{count}\n")
    process.stdin.flush()
    wall, cpu, peak = json.loads(process.stdout.readline())
    return Run(wall, cpu, peak, 0)


def steps(levers: list[str], unet: Path, device: str, dtype: str, size: int, options: argparse.Namespace) -> None:
    """Steps of the UNet in turns, every program in a process that stays alive."""
    import torch

    peer, notes = "diffusers, eager", {}
    runs: dict[str, list[Run]] = {}
    with contextlib.ExitStack() as stack:
        outputs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = {}
        for name in (peer, *(f"weightport, {lever}" for lever in levers)):
            package, lever = name.split(", ")
            place = [package, str(unet), device, dtype, str(size), str(options.threads), lever, str(outputs / name)]
            command = [sys.executable, "-c", STEP, *place]
            running[name] = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
        for process in running.values():
            assert process.stdout is not None
            process.stdout.readline()
        for name, process in running.items():
            first, output, expected = ask(process, 1), *(torch.load(outputs / one).double() for one in (name, peer))
            difference = float((output - expected).norm() / expected.norm())
            notes[name] = f"  first {first.wall:.1f} s, differs by {difference:.0e}"
        for _ in range(options.repeat):
            for name, process in running.items():
                runs.setdefault(name, []).append(ask(process, 10 if device == "cuda" else 1))
    threads = "" if device == "cuda" else f", {options.threads} threads"
    show(f"{device}{threads}, {dtype}, {size}x{size}", runs, peer, notes=notes)


def step(folder: Path, options: argparse.Namespace) -> None:
    """Eager."""
    for dtype, size in itertools.product(options.dtype or ["float32"], options.size or [256]):
        steps(["eager", "channels last", "packed"], folder / "repo" / "unet", "cpu", dtype, size, options)


def compiled(folder: Path, options: argparse.Namespace) -> None:
    """Compiled."""
    unet = folder / "repo" / "unet"
    if options.small:
        import weightport

        unet = folder / "small"
        weightport.UNet2DConditionModel({**UNET, "layers_per_block": 1}).save_pretrained(unet)
    for dtype, size in itertools.product(options.dtype or ["float32"], options.size or [256]):
        steps(["packed", "compiled"], unet, "cpu", dtype, size, options)


def cuda(folder: Path, options: argparse.Namespace) -> None:
    """Eager and compiled on a GPU."""
    import torch

    if not torch.cuda.is_available():
        print("\ncuda: there is no GPU")
        return
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for dtype, size in itertools.product(options.dtype or ["float16", "bfloat16"], options.size or [512, 1024]):
        steps(["eager", "packed", "compiled"], folder / "repo" / "unet", "cuda", dtype, size, options)


PARTS = {"start": start, "load": load, "step": step, "compile": compiled, "cuda": cuda}


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all but compile")
    parser.add_argument("--size", type=int, nargs="+", help="edges of the images of steps")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "float16", "bfloat16"], help="of steps")
    parser.add_argument("--threads", type=int, default=1, help="of steps on the CPU")
    parser.add_argument("--small", action="store_true", help="compile a smaller UNet")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the repository is, or is put and left")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "repo").is_dir():
            write_repo(folder)
        for part in options.parts or ["start", "load", "step", "cuda"]:
            began = time.perf_counter()
            PARTS[part](folder, options)
            print(f"({part}: {time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    main()
