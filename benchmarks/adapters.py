"""Adapters: what they cost. adapters.py [bake] [load] [step] [--repeat N] [--folder DIR]

bake     a LoRA of rank 16 on the 264 modules that kohya's scripts train, baked into a whole Stable
         Diffusion 1.5 checkpoint in float32 (4.3 GB), beside the plain conversion of the same file
load     a LoRA of rank 16 on the attention of SDXL, in kohya's names, into models that are there,
         beside diffusers
step     one step of the UNet of Stable Diffusion 1.5 with a LoRA on its attention and without, on
         one thread at 256x256, beside diffusers with PEFT

Weights are random. Rows take turns; ratios are of the same round, and the median over rounds.
`load` and `step` say CPU seconds, user and system, which a busy machine disturbs less than wall
time.
`bake` takes 14 GB of disk; `load` and `step` need diffusers and peft.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import models
import numpy as np
import trees
from measure import end_in_order, rounds, table

from weightport.mappings.conventions import conventions, stock_layers
from weightport.mappings.families import families

WEIGHTPORT = [*trees.python(trees.ROOT), "-m", "weightport"]
RANK = 16
KOHYA = ("transformer_blocks.", ".proj_in", ".proj_out", "self_attn.", ".mlp.")
"""Parts of the names of the modules that kohya's scripts train."""
OURS = "weightport"
PEER = "diffusers"


def write_lora(path: Path, family: str, only: str = "") -> int:
    """A LoRA in kohya's names, of one component or all; returns the number of its modules."""
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    seen: set[tuple[str, str]] = set()
    name = "kohya" if family == "sd1" else "kohya-sgm"
    shapes = {
        component.name: component.manifest() for component in families()[family].components.values()
    }
    for naming in conventions()[name].namings:
        for module, layer in stock_layers(naming, family).items():
            rows, *columns = shapes[naming.component][f"{module}.weight"]
            is_known = any(part in f".{module}" for part in KOHYA) and columns
            place = (naming.component, module)
            is_other = only not in ("", naming.component)
            is_fused = len(layer.modules) > 1
            if not is_known or is_other or is_fused or place in seen or "norm" in module:
                continue
            seen.add(place)
            ones = [1] * (len(columns) - 1)
            down = random.standard_normal((RANK, *columns)) * 0.01
            up = random.standard_normal((rows, RANK, *ones)) * 0.01
            tensors[f"{layer.name}.lora_down.weight"] = down.astype(np.float16)
            tensors[f"{layer.name}.lora_up.weight"] = up.astype(np.float16)
            tensors[f"{layer.name}.alpha"] = np.array(8, np.float16)
    save_file(tensors, path)
    return len(tensors) // 3


def bake(folder: Path, repeat: int) -> None:
    """Rows of conversions."""
    source = folder / "sd15.safetensors"
    lora = folder / "lora.safetensors"
    models.original(source, "sd1", "F32")
    count = write_lora(lora, "sd1")
    out = folder / "out"
    convert = [*WEIGHTPORT, "convert", "-q", str(source), "-o", str(out / "repo")]
    rows = {"plain": convert, f"with a LoRA of {count} modules": [*convert, "--lora", str(lora)]}
    print(table("SD 1.5 .safetensors -> repo", list(rounds(rows, out, repeat))), flush=True)


# --- in a process of its own ----------------------------------------------------------------------


def load(folder: Path, repeat: int) -> None:
    """CPU seconds of `load_lora_weights` of each library, in turns."""
    lora = folder / "xl.safetensors"
    count = write_lora(lora, "sdxl")
    print(f"SDXL LoRA of {count} modules, load_lora_weights")
    _in_turns("load", {OURS: (OURS, str(lora)), PEER: (PEER, str(lora))}, repeat, OURS, PEER)


def step(folder: Path, repeat: int) -> None:
    """CPU seconds of a step with a LoRA and without, of each library."""
    lora = folder / "lora.safetensors"
    write_lora(lora, "sd1", "unet")
    print("a step of SD 1.5's UNet, 256x256, batch 2, one thread")
    for library in (OURS, PEER):
        run = _child("step", library, str(lora), str(repeat))
        ratio = median(a / b for a, b in zip(run["with"], run["without"], strict=True))
        seconds = {name: median(values) for name, values in run.items()}
        print(
            f"  {library:12} {seconds['without']:8.2f} s without {seconds['with']:8.2f} s with"
            f" {ratio:8.3f}",
            flush=True,
        )


def _in_turns(
    what: str, rows: dict[str, tuple[str, ...]], repeat: int, ours: str, theirs: str
) -> None:
    """Run rows in turns; print medians, and the ratio of two."""
    taken: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeat):
        for name, arguments in rows.items():
            taken[name].append(_child(what, *arguments)["seconds"])
    for name, values in taken.items():
        print(f"  {name:12} {median(values):8.2f} CPU s")
    pairs = zip(taken[ours], taken[theirs], strict=True)
    print(f"  ratio {median(a / b for a, b in pairs):.3f}", flush=True)


def _child(what: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, f"--child={what}", *arguments]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def _loaded(library: str, lora: str) -> dict[str, Any]:
    """The time to load into models of SDXL whose weights nobody has touched."""
    pipe = _pipeline(library, "sdxl")
    start = time.process_time()
    pipe.load_lora_weights(lora)
    return {"seconds": time.process_time() - start}


def _stepped(library: str, lora: str, repeat: str) -> dict[str, Any]:
    """The times of steps with a LoRA and without, in turns."""
    import torch

    pipe = _pipeline(library, "sd1", components=("unet",))
    unet = pipe.unet.to(torch.float32)
    for parameter in unet.parameters():
        parameter.data.normal_(std=0.02)
    x = torch.randn(2, 4, 32, 32)
    text = torch.randn(2, 77, 768)
    pipe.load_lora_weights(lora)
    taken: dict[str, list[float]] = {"without": [], "with": []}
    with torch.no_grad():
        for number in range(int(repeat) + 1):
            for name, change in (("without", pipe.disable_lora), ("with", pipe.enable_lora)):
                change()
                start = time.process_time()
                unet(x, 500, text)
                if number:  # the first one warms up
                    taken[name].append(time.process_time() - start)
    return taken


def _pipeline(library: str, family: str, components: tuple[str, ...] = ()) -> Any:
    """What adapters are loaded into: models of a family, and the methods of a pipeline."""
    import torch

    torch.set_num_threads(1)
    known = families()[family].components
    names = components or tuple(name for name in known if name in _CLASSES)
    made = {}
    for name in names:
        with torch.device("meta"):
            model = _model(library, known[name].class_name, known[name].config)
        made[name] = model.to(torch.float16).to_empty(device="cpu").eval()
    if library == OURS:
        from weightport.runtime.pipelines.adapters import LoadsAdapters

        pipe: Any = LoadsAdapters()
    else:
        import transformers.integrations.peft
        from diffusers import loaders

        transformers.integrations.peft.MIN_PEFT_VERSION = "0.18.0"
        mixin = f"StableDiffusion{'XL' if family == 'sdxl' else ''}LoraLoaderMixin"
        pipe = getattr(loaders, mixin)()
        pipe.components = made
        pipe.hf_device_map = None
    for name in _CLASSES:
        setattr(pipe, name, made.get(name))
    return pipe


_CLASSES = ("unet", "text_encoder", "text_encoder_2")


def _model(library: str, class_name: str, config: dict[str, Any]) -> Any:
    if library == OURS:
        import weightport.models
        from weightport.runtime.models import clip

        kind: Any = getattr(clip, class_name, None) or getattr(weightport.models, class_name)
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    import diffusers
    import transformers

    if hasattr(diffusers, class_name):
        return getattr(diffusers, class_name).from_config(config)
    return getattr(transformers, class_name)(transformers.CLIPTextConfig(**config))


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {"load": _loaded, "step": _stepped}
WORKS: dict[str, Callable[[Path, int], None]] = {"bake": bake, "load": load, "step": step}


def main() -> None:
    """Run what the command line names, by default everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)}; default: all")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--folder", help="where the files go (default: a temporary one)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child](*arguments.works)))
        return
    for name in arguments.works:
        if name not in WORKS:
            sys.exit(f"{name}: unknown; one of {', '.join(WORKS)}")
    end_in_order()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name in arguments.works or WORKS:
            WORKS[name](Path(folder), arguments.repeat)


if __name__ == "__main__":
    main()
