"""Files of textual inversion as others write them: torch, safetensors and Pillow, under the names
that the programs give."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

SIDE = 64  # pixels of a picture


class Theirs(TextualInversionLoaderMixin):
    """diffusers' loader, around the text encoder and the tokenizer of a repo."""

    components: dict[str, Any] = {}  # noqa: RUF012
    hf_device_map = None

    def __init__(self, repo: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(repo / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(repo / "text_encoder").eval()


def vectors(count: int = 3, width: int = 768, seed: int = 0) -> Tensor:
    """Random ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator)


def a1111(tensor: Tensor, name: str = "my-style") -> dict[str, Any]:
    """What AUTOMATIC1111 saves."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": tensor},
        "name": name,
        "step": 1500,
        "sd_checkpoint": "cc6cb27103",
        "sd_checkpoint_name": "v1-5-pruned",
    }


def _json(tensor: Tensor) -> bytes:
    content = a1111(tensor)
    content["string_to_param"] = {"*": {"TORCHTENSOR": tensor.tolist()}}
    return json.dumps(content).encode()


def write_chunk(path: Path, tensor: Tensor) -> None:
    """A picture with the embedding in a text chunk."""
    info = PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(_json(tensor)).decode())
    Image.new("RGB", (SIDE, SIDE), "teal").save(path, pnginfo=info)


def write_pixels(path: Path, tensor: Tensor) -> None:
    """A picture with the embedding in half bytes at its left and right, each behind a black line:
    masked by a generator of random numbers, the upper bits are decoration."""
    packed = np.frombuffer(zlib.compress(_json(tensor), 9), np.uint8)
    row = SIDE * 3
    padded = np.resize(packed, -(-len(packed) // row) * row).reshape(SIDE, -1, 3)
    seed = 0
    mask = np.empty(padded.size, np.uint8)
    for i in range(mask.size):
        seed = (seed * 1664525 + 1013904223) % 2**32
        mask[i] = seed % 255 & 15
    mask = mask.reshape(padded.shape)
    noise = np.random.default_rng(0).integers(1, 16, padded.shape, np.uint8) << 4
    low = (padded & 15 ^ mask) | noise
    high = (padded >> 4 ^ mask) | noise
    line = np.zeros((SIDE, 1, 3), np.uint8)
    steps = np.arange(SIDE * SIDE * 3).reshape(SIDE, SIDE, 3)
    photo = (steps % 200 + 40).astype(np.uint8)
    pixels = np.concatenate([low, line, photo, line, high], axis=1)
    Image.fromarray(pixels).save(path)


def write_all(
    folder: Path, widths: tuple[int, int, int] = (768, 1280, 1024)
) -> dict[str, tuple[Path, dict[str, dict[str, Tensor]]]]:
    """Every form: name -> the file, and what is in it: word -> encoder -> vectors.

    Args:
        widths: of the text encoders of SDXL, and of that of SD 2.x.
    """
    large = vectors(3, widths[0])
    wide = vectors(3, widths[1], 1)
    one = vectors(1, widths[0], 2)[0]
    other = vectors(2, widths[0], 3)
    sd2 = vectors(2, widths[2], 4)
    both = {"clip_l": large, "clip_g": wide}
    style = {"my-style": {"": large}}
    cat = {"<cat>": {"": large}}
    old = {"_use_new_zipfile_serialization": False}
    gal: dict[str, Any] = {"string_to_token": {"*": torch.tensor(265)}}
    gal["string_to_param"] = nn.ParameterDict({"*": nn.Parameter(large)})
    stated = a1111(large) | {"step": None, "sd_checkpoint": None}
    torch_files: dict[str, tuple[Any, Any, Any]] = {
        "a1111.pt": (a1111(large), {}, style),
        "a1111-old.pt": (a1111(nn.Parameter(large)), old, style),
        "a1111-none.pt": (stated, {}, style),
        "gal-style.pt": (gal, {}, {"gal-style": {"": large}}),
        "gal-token.pt": ({"string_to_param": {"<cat>": large}}, {}, cat),
        "one.bin": ({"<cat>": one}, {}, {"<cat>": {"": one}}),
        "vectors.bin": ({"<cat>": nn.Parameter(large)}, old, cat),
        "several.bin": ({"<cat>": large, "<dog>": one}, {}, cat | {"<dog>": {"": one}}),
        "sd2.bin": ({"<cat>": sd2}, {}, {"<cat>": {"": sd2}}),
        "pair.pt": (both, {}, {"pair": both}),
    }
    bundle = {"bundle_emb.a.b.clip_l": large, "bundle_emb.a.b.clip_g": wide}
    tensors: dict[str, tuple[dict[str, Tensor], Any]] = {
        "one.safetensors": ({"<cat>": one}, {"<cat>": {"": one}}),
        "vectors.safetensors": ({"<cat>": large}, cat),
        "several.safetensors": ({"<cat>": large, "<dog>": one}, cat | {"<dog>": {"": one}}),
        "half.safetensors": ({"<cat>": large.half()}, {"<cat>": {"": large.half()}}),
        "params.safetensors": ({"emb_params": large}, {"params": {"": large}}),
        "pair.safetensors": (both, {"pair": both}),
        "left.safetensors": ({"clip_l": large}, {"left": {"clip_l": large}}),
        "scripts.safetensors": (
            {"text_encoders_0": large, "text_encoders_1": wide},
            {"scripts": both},
        ),
        "out.safetensors": (
            both | {"clip_l_out": other},
            {"out": both | {"clip_l_out": other}},
        ),
        "onetrainer.safetensors": (
            {"emp_params": torch.zeros_like(other), "emp_params_out": other},
            {"onetrainer": {"clip_l": torch.zeros_like(other), "clip_l_out": other}},
        ),
        "bundle.safetensors": (bundle, {"a.b": both}),
        "bundle-sd1.safetensors": (
            {"bundle_emb.<x>.string_to_param.*": large, "bundle_emb.<y>.emb_params": other},
            {"<x>": {"": large}, "<y>": {"": other}},
        ),
    }
    made = {}
    for name, (content, options, held) in torch_files.items():
        torch.save(content, folder / name, **options)
        made[name] = folder / name, held
    for name, (state, held) in tensors.items():
        save_file(state, folder / name)
        made[name] = folder / name, held
    write_chunk(folder / "chunk.png", large)
    write_pixels(folder / "pixels.png", large)
    made["chunk.png"] = folder / "chunk.png", style
    made["pixels.png"] = folder / "pixels.png", style
    library = folder / "library"
    library.mkdir()
    torch.save({"<cat>": large}, library / "learned_embeds.bin")
    save_file({"<cat>": wide}, library / "learned_embeds_2.safetensors")
    made["library"] = library, {"<cat>": both}
    return made
