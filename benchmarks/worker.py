"""A process of `runtime.py` that stays alive.

It prepares, then does its work as often as each line of its input says.

worker.py load PACKAGE FOLDER DTYPE
worker.py file PACKAGE FILE REPO
worker.py step PACKAGE FOLDER DEVICE DTYPE SIZE THREADS LEVER OUTPUT
worker.py decode PACKAGE REPO SIZE THREADS OUTPUT
worker.py read PACKAGE REPO TOKENS THREADS OUTPUT
worker.py transform PACKAGE FOLDER SIZE THREADS OUTPUT

`load` casts a UNet in a float32 file. `file` loads a pipeline from an original checkpoint; REPO has
the configs, which diffusers asks for. `step` is one of the UNet, `transform` one of a transformer,
`decode` the VAE's work on a size, `read` the text encoder's on two prompts; they put the result of
the last time in the file OUTPUT.

These do their work once, and end:

worker.py image PACKAGE REPO SIZE THREADS LEVER STEPS
worker.py openvino REPO SIZE THREADS GRAPH STEPS

Both make a picture. OpenVINO's UNet is made by no steps, and kept in the file GRAPH.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def decode(package: str, repo: str, size: str, threads: str, output: str) -> None:
    """The VAE's work on latents of an image."""
    torch.set_num_threads(int(threads))
    vae = importlib.import_module(package).AutoencoderKL.from_pretrained(Path(repo, "vae"))
    side = int(size) // 8
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    serve_result(lambda: vae.decode(latents).sample, output)


def read(package: str, repo: str, tokens: str, threads: str, output: str) -> None:
    """The text encoder's work on two prompts."""
    torch.set_num_threads(int(threads))
    library = importlib.import_module("transformers" if package == "diffusers" else package)
    encoder = library.CLIPTextModel.from_pretrained(Path(repo, "text_encoder"))
    ids = torch.randint(49406, (2, int(tokens)), generator=torch.Generator().manual_seed(0))
    serve_result(lambda: encoder(ids)[0], output)


def transform(package: str, folder: str, size: str, threads: str, output: str) -> None:
    """A step of a transformer: of SD 3, guided, or of FLUX.1."""
    torch.set_num_threads(int(threads))
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    kind = getattr(importlib.import_module(package), config["_class_name"])
    model = kind.from_pretrained(folder)
    side = int(size) // 8
    is_patched = "axes_dims_rope" in config  # its caller makes the patches
    count = 1 if is_patched else 2

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))

    given = {
        "encoder_hidden_states": noise(154, config["joint_attention_dim"]),
        "pooled_projections": noise(config["pooled_projection_dim"]),
        "timestep": torch.full((count,), 0.5 if is_patched else 500.0),
    }
    if is_patched:
        rows, columns = torch.meshgrid(*[torch.arange(side // 2)] * 2, indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1)
        given |= {
            "hidden_states": noise((side // 2) ** 2, config["in_channels"]),
            "img_ids": places.reshape(-1, 3).float(),
            "txt_ids": torch.zeros(154, 3),
            "guidance": torch.full((count,), 3.5),
        }
    else:
        given["hidden_states"] = noise(config["in_channels"], side, side)
    serve_result(lambda: model(**given).sample, output)


def serve_result(work: Callable[[], torch.Tensor], output: str) -> None:
    """Serve work, and keep its last result."""
    results = [torch.empty(0)]

    def again() -> None:
        results[0] = work()

    with torch.no_grad():
        serve(again)
    torch.save(results[0], output)


def image(package: str, repo: str, size: str, threads: str, lever: str, steps: str) -> None:
    """A picture by a pipeline."""
    torch.set_num_threads(int(threads))
    pipe = importlib.import_module(package).StableDiffusionPipeline.from_pretrained(repo)
    if lever == "packed":
        pipe.pack()
    draw(pipe, size, steps)


def openvino(repo: str, size: str, threads: str, graph: str, steps: str) -> None:
    """A picture by diffusers, its UNet run by OpenVINO in float32."""
    import diffusers
    import openvino as ov

    torch.set_num_threads(int(threads))
    if not int(steps):
        unet = diffusers.UNet2DConditionModel.from_pretrained(Path(repo, "unet"))
        side = int(size) // 8
        inputs = (torch.randn(2, 4, side, side), torch.tensor(1), torch.randn(2, 77, 768))
        unet.forward = functools.partial(unet.forward, return_dict=False)
        Path(graph).parent.mkdir()
        shapes = [tuple(one.shape) for one in inputs]
        converted = ov.convert_model(unet, example_input=inputs, input=shapes)
        ov.save_model(converted, graph, compress_to_fp16=False)
        return
    options = {"INFERENCE_NUM_THREADS": int(threads), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.compile_model(graph, "CPU", options)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(repo)

    def forward(
        sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor]:
        result = compiled([sample, timestep, encoder_hidden_states])[0]
        return (torch.from_numpy(result),)

    pipe.unet.forward = forward
    draw(pipe, size, steps)


def draw(pipe: Any, size: str, steps: str) -> None:
    """A picture of a prompt."""
    edges = {"height": int(size), "width": int(size)}
    noise = torch.Generator().manual_seed(0)
    pipe("a photo of a cat", num_inference_steps=int(steps), generator=noise, **edges)


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
    works = (load, file, step, decode, read, transform, image, openvino)
    {work.__name__: work for work in works}[sys.argv[1]](*sys.argv[2:])
