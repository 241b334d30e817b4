"""What people use instead, each a program: peers.py NAME SOURCE OUT [REPO]

The output is on the disk when it ends.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
PROJECTIONS = ("q", "k", "v", "proj_out")  # 1x1 convolutions in the original VAE
ORDERS = {2: (1, 0), 4: (3, 2, 0, 1)}  # of the axes of kernels


def keras_script(source: Path, out: Path) -> None:
    """What people write by hand: h5py, `np.transpose`, `save_file`; no hashes, no checks."""
    import h5py
    from safetensors.numpy import save_file

    tensors = {}

    def add(name: str, node: object) -> None:
        if isinstance(node, h5py.Dataset):
            order = ORDERS.get(node.ndim, range(node.ndim))
            tensors[name] = np.ascontiguousarray(node[...].transpose(*order))

    with h5py.File(source) as file:
        file.visititems(add)
    save_file(tensors, out)


def rename_script(source: Path, out: Path) -> None:
    """`load_file` or `torch.load`, rename, reshape, `save_file`; no hashes, checks, configs."""
    import torch
    from safetensors.torch import load_file, save_file

    if source.suffix == ".ckpt":
        weights = torch.load(source, weights_only=True)["state_dict"]
    else:
        weights = load_file(source)
    components: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, (component, target, shape) in _renames().items():
        tensor = weights[key]
        components[component][target] = tensor.reshape(tensor.shape[: len(shape)])
    for component, tensors in components.items():
        path = out / FILES[component]
        path.parent.mkdir(parents=True)
        save_file(tensors, path)


def rename_back_script(source: Path, out: Path) -> None:
    """`load_file` of every component, rename, reshape, one `save_file`."""
    from safetensors.torch import load_file, save_file

    repo = {component: load_file(source / file) for component, file in FILES.items()}
    weights = {}
    for key, (component, target, _) in _renames().items():
        tensor = repo[component][target]
        projection = ".mid.attn_1." in key and key.split(".")[-2] in PROJECTIONS
        weights[key] = tensor[:, :, None, None] if projection and tensor.ndim == 2 else tensor
    save_file(weights, out)


def diffusers(source: Path, out: Path, repo: Path) -> None:
    """diffusers' single-file loader, offline, in the file's precision, with a repo's configs."""
    import diffusers as library
    import torch
    from safetensors import safe_open

    dtype = torch.float32
    if source.suffix == ".safetensors":
        with safe_open(source, "pt") as file:
            dtype = file.get_tensor("betas").dtype
    index = json.loads((repo / "model_index.json").read_text())
    kind = getattr(library, index["_class_name"])
    pipeline = kind.from_single_file(
        source, config=str(repo), local_files_only=True, torch_dtype=dtype
    )
    pipeline.save_pretrained(out)


def flux_transformer(source: Path, out: Path, repo: Path) -> None:
    """diffusers' single-file loader for the transformer of FLUX.1 alone, in bfloat16."""
    import torch
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_single_file(
        source,
        config=str(repo),
        subfolder="transformer",
        local_files_only=True,
        torch_dtype=torch.bfloat16,
    )
    model.save_pretrained(out)


def _renames() -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Original key -> component, its key in diffusers and stock shape there.

    A script has them as string replacements.
    """
    from weightport.converters.planning.candidates import candidates

    renames = {}
    for candidate in candidates("ldm"):
        component = candidate.component
        is_stock = candidate.family.components.get(component.name) is component
        written = is_stock and not candidate.table.about.get("read_only")
        if candidate.family.name == "sd1" and candidate.part in FILES and written:
            shapes = component.manifest()
            for key, link in candidate.links.items():
                (target, *_) = link.targets
                renames[key] = (candidate.part, target, shapes[target])
    return renames


def main() -> None:
    """Run one of them and bring its output to the disk."""
    functions = (keras_script, rename_script, rename_back_script, diffusers, flux_transformer)
    programs = {function.__name__: function for function in functions}
    name, *paths = sys.argv[1:]
    source, out, *repo = map(Path, paths)
    programs[name](source, out, *repo)
    for file in [out] if out.is_file() else out.rglob("*"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


if __name__ == "__main__":
    main()
