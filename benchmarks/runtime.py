"""The runtime beside diffusers, in the same run and in turns: runtime.py [start] [load] [step] [compile] [--repeat N]

start    import, and process start to a loaded pipeline
load     a UNet of Stable Diffusion 1.5 in float32 cast to float16 and bfloat16
step     one step of that UNet, eager, batch 2, on one thread
compile  the same, compiled (several minutes)

Weights are random; they are written to a temporary folder. Ratios are of ours to diffusers' in the same round, and the
median over rounds; CPU seconds are user and system time, which a busy machine disturbs less than wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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


def processes(programs: dict[str, str], repeat: int) -> dict[str, list[Run]]:
    """Each program in a process of its own, all of them once a round; the first round warms the caches."""
    rounds = [
        {name: measure([sys.executable, "-c", code]) for name, code in programs.items()} for _ in range(repeat + 1)
    ]
    return {name: [one[name] for one in rounds[1:]] for name in programs}


def show(title: str, runs: dict[str, list[Run]], peer: str) -> None:
    """One line a program: medians, and ratios to the peer of the same round."""
    print(f"\n{title:44}{'wall s':>8}{'CPU s':>8}{'ratio':>8}{'RSS MB':>8}{'ratio':>8}")
    for name, mine in runs.items():
        wall, cpu = (statistics.median(getattr(run, kind) for run in mine) for kind in ("wall", "cpu"))
        ratio = statistics.median(a.cpu / b.cpu for a, b in zip(mine, runs[peer], strict=True))
        memory = max(run.rss for run in mine) / max(run.rss for run in runs[peer])
        rss = max(run.rss for run in mine) / 1000
        print(f"  {name:42}{wall:8.2f}{cpu:8.2f}{ratio:8.2f}{rss:8.0f}{memory:8.2f}")


def start(folder: Path, repeat: int) -> None:
    """Imports, and process start to a loaded pipeline."""
    programs = {name: code.format(repo=str(folder / "repo")) for name, code in START.items()}
    show("start", processes(programs, repeat), "diffusers, loaded")


def load(folder: Path, repeat: int) -> None:
    """float32 file -> float16 and bfloat16; what the imports take is shown, and is in the other rows."""
    for dtype in ("float16", "bfloat16"):
        body = CAST.format(unet=str(folder / "repo" / "unet"), dtype=dtype)
        programs = {f"{p}, imports": LOAD.format(package=p, body="") for p in ("diffusers", "weightport")}
        programs |= {p: LOAD.format(package=p, body=body) for p in ("diffusers", "weightport")}
        runs = processes(programs, repeat)
        show(f"float32 -> {dtype}", runs, "diffusers")
        net = {
            p: [a.cpu - b.cpu for a, b in zip(runs[p], runs[f"{p}, imports"], strict=True)]
            for p in ("diffusers", "weightport")
        }
        ratio = statistics.median(a / b for a, b in zip(net["weightport"], net["diffusers"], strict=True))
        print(f"  without the imports: {statistics.median(net['weightport']):.2f} CPU s, ratio {ratio:.2f}")


STEP = """
import json, sys, time, torch, resource
torch.set_num_threads(1)
package, folder, dtype, size, lever = sys.argv[1:]
if package == "diffusers":
    from diffusers import UNet2DConditionModel as U
else:
    from weightport import UNet2DConditionModel as U
unet = U.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
x = torch.randn(2, 4, int(size) // 8, int(size) // 8, generator=torch.Generator().manual_seed(0)).to(unet.dtype)
text = torch.randn(2, 77, 768, generator=torch.Generator().manual_seed(1)).to(unet.dtype)
if lever != "plain":
    unet.to(memory_format=torch.channels_last)
with torch.no_grad():
    if package == "weightport":
        from weightport.runtime.speed import compile_model, constant_context
        if lever == "compile":
            compile_model(unet)
        context = constant_context(unet)
        context.__enter__()
    print("ready", flush=True)
    for line in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        y = unet(x, torch.tensor(500), encoder_hidden_states=text).sample
        print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, y.double().norm().item()]), flush=True)
"""


def steps(title: str, folder: Path, repeat: int, levers: list[str], dtype: str = "float32", size: int = 256) -> None:
    """One step of the UNet in turns, every program in a process that stays alive."""
    names = {"diffusers": ("diffusers", "plain"), **{f"weightport, {lever}": ("weightport", lever) for lever in levers}}
    running = {}
    for name, (package, lever) in names.items():
        command = [sys.executable, "-c", STEP, package, str(folder / "repo" / "unet"), dtype, str(size), lever]
        running[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(name: str) -> list[float]:
        process = running[name]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        answer: list[float] = json.loads(process.stdout.readline())
        return answer

    for process in running.values():
        assert process.stdout is not None
        process.stdout.readline()
    first = {name: ask(name) for name in names}
    measured = [{name: ask(name) for name in names} for _ in range(repeat)]
    print(f"\n{title:44}{'CPU s':>8}{'ratio':>8}{'min/min':>8}{'RSS MB':>8}{'first s':>8}{'rel. diff':>11}")
    for name in names:
        cpu = [one[name][0] for one in measured]
        ratio = statistics.median(one[name][0] / one["diffusers"][0] for one in measured)
        best = min(cpu) / min(one["diffusers"][0] for one in measured)
        norm, expected = first[name][3], first["diffusers"][3]
        print(
            f"  {name:42}{statistics.median(cpu):8.2f}{ratio:8.2f}{best:8.2f}{measured[-1][name][2] / 1000:8.0f}"
            f"{first[name][1]:8.1f}{abs(norm - expected) / expected:11.1e}"
        )
    for process in running.values():
        process.communicate()


def step(folder: Path, repeat: int) -> None:
    """Eager."""
    steps("step, eager, float32, 256x256", folder, repeat, ["plain", "channels_last"])


def compiled(folder: Path, repeat: int) -> None:
    """Compiled."""
    steps("step, compiled, float32, 256x256", folder, repeat, ["compile"])


PARTS: dict[str, Callable[[Path, int], None]] = {"start": start, "load": load, "step": step, "compile": compiled}


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all but compile")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the repository is, or is put and left")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "repo").is_dir():
            write_repo(folder)
        for part in arguments.parts or ["start", "load", "step"]:
            began = time.perf_counter()
            PARTS[part](folder, arguments.repeat)
            print(f"({part}: {time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    main()
