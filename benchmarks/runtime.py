"""The runtime beside diffusers, in the same run and in turns: runtime.py [start] [load] [step] [compile] [cuda]

start    import, and process start to a loaded pipeline
load     a UNet of Stable Diffusion 1.5 in float32 cast to float16 and bfloat16, from the page cache and from the disk
step     one step of that UNet on the CPU, eager, batch 2, on one thread
compile  the same, compiled (many minutes); --small takes a UNet of half the layers
cuda     eager and compiled steps on a GPU, float16 and bfloat16, at 512x512 and 1024x1024

Weights are random; they are written to a temporary folder. Ratios are of ours to diffusers' in the same round, and the
median over rounds; CPU seconds are user and system time, which a busy machine disturbs less than wall time.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

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


def show(title: str, runs: dict[str, list[Run]], peer: str, before: dict[str, str] | None = None) -> None:
    """One line a program: medians, and ratios to the peer of the same round; `before` is what to leave out of times."""
    print(f"\n{title:44}{'wall s':>8}{'ratio':>8}{'CPU s':>8}{'ratio':>8}{'RSS MB':>8}{'ratio':>8}")

    def times(name: str, kind: str) -> list[float]:
        parts = runs[before[name]] if before else [Run(0, 0, 0, 0)] * len(runs[name])
        return [getattr(run, kind) - getattr(part, kind) for run, part in zip(runs[name], parts, strict=True)]

    for name in before or runs:
        line = f"  {name:42}"
        for kind in ("wall", "cpu"):
            mine, theirs = times(name, kind), times(peer, kind)
            ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            line += f"{statistics.median(mine):8.2f}{ratio:8.2f}"
        rss, theirs_rss = (max(run.rss for run in runs[one]) for one in (name, peer))
        print(f"{line}{rss / 1000:8.0f}{rss / theirs_rss:8.2f}")


def start(folder: Path, repeat: int) -> None:
    """Imports, and process start to a loaded pipeline."""
    programs = {name: code.format(repo=str(folder / "repo")) for name, code in START.items()}
    show("start", processes(programs, repeat), "diffusers, loaded")


def load(folder: Path, repeat: int) -> None:
    """float32 file -> float16 and bfloat16, without what the imports take."""
    unet = folder / "repo" / "unet"
    for title, cold in (("in the page cache", []), ("on the disk", list(unet.glob("*.safetensors")))):
        for dtype in ("float16", "bfloat16"):
            body = CAST.format(unet=str(unet), dtype=dtype)
            packages = ("diffusers", "weightport")
            programs = {f"{p}, imports": LOAD.format(package=p, body="") for p in packages}
            programs |= {p: LOAD.format(package=p, body=body) for p in packages}
            runs = processes(programs, repeat, cold)
            show(f"float32, {title} -> {dtype}", runs, "diffusers", {p: f"{p}, imports" for p in packages})


STEP = """
import contextlib, json, re, sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
package, folder, device, dtype, size, lever = sys.argv[1:]
if package == "diffusers":
    from diffusers import UNet2DConditionModel as U
else:
    from weightport import UNet2DConditionModel as U
    from weightport.runtime.speed import compile_model, constant_context, pack_model
unet = U.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
if "channels last" in lever:
    unet.to(memory_format=torch.channels_last)
if "packed" in lever:
    pack_model(unet)
if "compiled" in lever:
    compile_model(unet)

def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, unet.dtype)

def measured():
    if device == "cpu":
        peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())  # ru_maxrss is also the parent's
        return time.process_time(), int(peak[1]) / 1e3
    torch.cuda.synchronize()
    return time.perf_counter(), torch.cuda.max_memory_allocated() / 1e6

x, text, t = noise(2, 4, int(size) // 8, int(size) // 8), noise(2, 77, 768), torch.tensor(500, device=device)
with torch.no_grad(), constant_context(unet) if package == "weightport" else contextlib.nullcontext():
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        start = measured()[0]
        for _ in range(count):
            y = unet(x, t, encoder_hidden_states=text).sample
        end, memory = measured()
        print(json.dumps([(end - start) / count, memory, y.double().norm().item()]), flush=True)
"""


def steps(levers: list[str], unet: Path, repeat: int, device: str, dtype: str, size: int) -> None:
    """Steps of the UNet in turns, every program in a process that stays alive."""
    names = {
        "diffusers, eager": ("diffusers", "eager"),
        **{f"weightport, {one}": ("weightport", one) for one in levers},
    }
    running = {}
    for name, (package, lever) in names.items():
        command = [sys.executable, "-c", STEP, package, str(unet), device, dtype, str(size), lever]
        running[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(name: str, count: int) -> list[float]:
        process = running[name]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{count}\n")
        process.stdin.flush()
        answer: list[float] = json.loads(process.stdout.readline())
        return answer

    for process in running.values():
        assert process.stdout is not None
        process.stdout.readline()
    first = {name: ask(name, 1) for name in names}
    rounds = [{name: ask(name, 1 if device == "cpu" else 10) for name in names} for _ in range(repeat)]
    title = f"{device}, {dtype}, {size}x{size}"
    print(f"\n{title:44}{'s':>8}{'ratio':>8}{'min/min':>8}{'MB':>8}{'ratio':>8}{'first s':>8}{'rel. diff':>11}")
    peer = next(iter(names))
    for name in names:
        times, theirs = ([one[who][0] for one in rounds] for who in (name, peer))
        ratio = statistics.median(a / b for a, b in zip(times, theirs, strict=True))
        memory, norm, expected = rounds[-1][name][1], first[name][2], first[peer][2]
        print(
            f"  {name:42}{statistics.median(times):8.3f}{ratio:8.2f}{min(times) / min(theirs):8.2f}{memory:8.0f}"
            f"{memory / rounds[-1][peer][1]:8.2f}{first[name][0]:8.1f}{abs(norm - expected) / expected:11.1e}"
        )
    for process in running.values():
        process.communicate()


def step(folder: Path, repeat: int, size: int = 256) -> None:
    """Eager."""
    steps(["eager", "eager, channels last", "packed"], folder / "repo" / "unet", repeat, "cpu", "float32", size)


def compiled(folder: Path, repeat: int, small: bool = False) -> None:
    """Compiled."""
    unet = folder / "repo" / "unet"
    if small:
        import weightport

        unet = folder / "small"
        weightport.UNet2DConditionModel({**UNET, "layers_per_block": 1}).save_pretrained(unet)
    steps(["packed", "compiled"], unet, repeat, "cpu", "float32", 256)


def cuda(folder: Path, repeat: int) -> None:
    """Eager and compiled on a GPU."""
    import torch

    if not torch.cuda.is_available():
        print("\ncuda: there is no GPU")
        return
    for dtype in ("float16", "bfloat16"):
        for size in (512, 1024):
            levers = ["eager", "eager, channels last", "compiled", "compiled, channels last"]
            steps(levers, folder / "repo" / "unet", repeat, "cuda", dtype, size)


PARTS: dict[str, Callable[[Path, int], None]] = {
    "start": start,
    "load": load,
    "step": step,
    "compile": compiled,
    "cuda": cuda,
}


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all but compile")
    parser.add_argument("--size", type=int, default=256, help="edge of the images of step")
    parser.add_argument("--small", action="store_true", help="compile a smaller UNet")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the repository is, or is put and left")
    arguments = parser.parse_args()
    parts = {**PARTS, "compile": functools.partial(compiled, small=arguments.small)}
    parts["step"] = functools.partial(step, size=arguments.size)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "repo").is_dir():
            write_repo(folder)
        for part in arguments.parts or ["start", "load", "step", "cuda"]:
            began = time.perf_counter()
            parts[part](folder, arguments.repeat)
            print(f"({part}: {time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    main()
