"""A process of `runtime.py` that stays alive.

It prepares, then does its work as often as each line of its input says.

worker.py load PACKAGE FOLDER DTYPE
worker.py file PACKAGE FILE REPO
worker.py step PACKAGE FOLDER DEVICE DTYPE SIZE THREADS LEVER OUTPUT

`load` casts a UNet in a float32 file. `file` loads a pipeline from an original checkpoint; REPO has
the configs, which diffusers asks for. `step` puts the result of the last step in the file OUTPUT.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def measured(device: str = "cpu") -> tuple[float, float, int]:
    """Wall and CPU seconds since some moment, and the peak of memory in kB.

    Memory is resident, or allocated on the GPU.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() // 1000
    else:
        # ru_maxrss is also the parent's
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]
    return time.perf_counter(), time.process_time(), peak


def serve(work: Callable[[], object], device: str = "cpu") -> None:
    """Do the work a number of times for each line of the input, and print what one time took."""
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        wall, cpu, _ = measured(device)
        for _ in range(count):
            result = work()  # kept, so that it is not freed within the time  # noqa: F841
        wall_end, cpu_end, peak = measured(device)
        print(json.dumps([(wall_end - wall) / count, (cpu_end - cpu) / count, peak]), flush=True)


def load(package: str, folder: str, dtype: str) -> None:
    """A UNet in float32, cast."""
    library = importlib.import_module(package)
    kind = library.UNet2DConditionModel  # diffusers imports it when it is asked for
    serve(lambda: kind.from_pretrained(folder, torch_dtype=getattr(torch, dtype)))


def file(package: str, path: str, repo: str) -> None:
    """A pipeline, of an original checkpoint."""
    library = importlib.import_module(package)
    kind = library.StableDiffusionPipeline
    configs = {"config": repo, "local_files_only": True} if package == "diffusers" else {}
    serve(lambda: kind.from_single_file(path, safety_checker=None, **configs))


def step(
    package: str,
    folder: str,
    device: str,
    dtype: str,
    size: str,
    threads: str,
    lever: str,
    output: str,
) -> None:
    """A step of the UNet, batch 2."""
    torch.set_num_threads(int(threads))
    kind = importlib.import_module(package).UNet2DConditionModel
    unet = kind.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
    kept: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if package == "weightport":
        from weightport.runtime import speed
        from weightport.runtime.models.attention import constant_context

        kept = constant_context(unet)
        levers = {
            "eager": lambda _: None,
            "channels last": lambda unet: unet.to(memory_format=torch.channels_last),
            "packed": speed.pack_model,
            "compiled": speed.compile_model,
        }
        levers[lever](unet)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, unet.dtype)

    side = int(size) // 8
    x = noise(2, 4, side, side)
    text = noise(2, 77, 768)
    t = torch.tensor(500, device=device)

    def work() -> None:
        prediction.copy_(unet(x, t, encoder_hidden_states=text).sample)

    prediction = torch.empty_like(x)
    with torch.no_grad(), kept:
        serve(work, device)
    torch.save(prediction.cpu(), output)


if __name__ == "__main__":
    {"load": load, "file": file, "step": step}[sys.argv[1]](*sys.argv[2:])
