"""Damaged copies of files of weights, of those that we write beside them, and of those that others
write for the runtime; each must be read, or refused in one line."""

from __future__ import annotations

import copy
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from weightport.api import inspect
from weightport.converters.outputs.diffusers import pipeline_class
from weightport.converters.outputs.ldm_residue import read_residue, residue_path
from weightport.converters.readers.object_graph import Node
from weightport.converters.repo.card import body, model_card
from weightport.errors import ConversionError
from weightport.push import _card, _read, read_report, unverified
from weightport.recipe import CHUNK, read_recipe
from weightport.runtime.schedulers import DDIMScheduler
from weightport.runtime.text.tokenizer import CLIPTokenizer

from . import hdf5_files
from .tf_bundle_writer import write_bundle

REFUSED = (ConversionError, OSError, ValueError)
_HASH = "0" * 64
_ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, 10**40, "", "a\nb", "\x1b[31m", "../../x", "x" * 300, [], [[]], {},
    {"": {}}, [None, "a"],
)  # fmt: skip
CONVERSION = {
    "weightport_version": "1",
    "family": "sd1",
    "sources": [{"path": "a.h5", "format": "Keras", "part": "unet", "files": {"a.h5": _HASH}}],
    "tables": {"kerascv_unet": _HASH},
    "options": {"variant": None, "license": "mit", "base_model": None},
    "notes": ["one"],
    "components": {"unet": {"class": "UNet2DConditionModel"}},
    "files": {"unet/config.json": {"nbytes": 2, "sha256": _HASH}},
}
_ERROR = {"max_abs": 1e-5, "relative_l2": 1e-6, "cosine": 1.0, "psnr": None}
_CHECK = {"name": "unet", "against": "kerascv", "tolerance": 1e-6, "passed": True}
PARITY = {
    "passed": True,
    "dtype": "float32",
    "files": [{"name": "repo/unet", "sha256": _HASH}],
    "checks": [{**_CHECK, "matched": _ERROR, "as_diffusers": None}],
}
CARD = """---
license: mit
tags:
- weightport
base_model: a/b
---
# Title
"""
RECIPE = {"repo": "a/b", "prompt": "x", "seed": 1, "dtype": "float32", "device": "cpu"}
RESIDUE = {
    "keys": '{"a": "unet b"}',
    "metadata": '{"format": "pt"}',
    "tables": '{"unet": "ldm_unet"}',
    "shapes": '{"a": [1, 2]}',
}
TOKENIZER = {
    "model": {"vocab": {"a": 0, "b</w>": 1}, "merges": ["a b"]},
    "added_tokens": [{"id": 2, "content": "<|endoftext|>"}],
}
TOKENIZER_CONFIG = {
    "model_max_length": 77,
    "bos_token": {"content": "a"},
    "added_tokens_decoder": {"2": {"content": "x"}},
}
SHARDS = {"metadata": {"total_size": 4}, "weight_map": {"a": "m-00001-of-00001.safetensors"}}


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: of the file.
        whole: what it holds: text, bytes, or what JSON is made of.
        read: reads the folder that it lies in.
        place: writes its content; by default into a file of its name.
    """

    name: str
    whole: Any
    read: Callable[[Path], object]
    place: Callable[[Path, bytes], None] | None = None

    def write(self, folder: Path, content: bytes) -> None:
        """Write a file with some content."""
        if self.place is not None:
            self.place(folder, content)
        else:
            (folder / self.name).write_bytes(content)


def damaged(whole: Any, dice: random.Random) -> bytes:
    """A copy in which something is otherwise."""
    if isinstance(whole, bytes):
        return _damaged_bytes(whole, dice)
    if isinstance(whole, str):
        text = whole.encode()
    else:
        content = json.loads(json.dumps(whole))
        for _ in range(dice.randint(0, 3)):
            _change(content, dice)
        text = json.dumps(content, ensure_ascii=dice.random() < 0.5).encode(
            "utf-8", "surrogatepass"
        )
    how = dice.random()
    if how < 0.1:
        text = text[: dice.randrange(len(text) + 1)]
    elif how < 0.2:
        text = b'{"a":' * dice.choice((10, 5_000)) + text
    elif how < 0.6 or isinstance(whole, str):
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(text) + 1)
            text = text[:at] + bytes([dice.randrange(256)]) + text[at + dice.randint(0, 2) :]
    return text


def _damaged_bytes(whole: bytes, dice: random.Random) -> bytes:
    """Cut, or with a few bytes changed, left out or put in; mostly near the beginning, where names
    are."""
    if dice.random() < 0.1:
        return whole[: dice.randrange(len(whole))]
    data = bytearray(whole)
    for _ in range(dice.randint(1, 8)):
        at = dice.randrange(1 + int((len(data) - 1) * dice.random()))
        put = dice.randbytes(dice.choice((1, 1, 1, 2, 4, 8)))
        left_out = len(put) if dice.random() < 0.8 else dice.randint(0, 8)
        data[at : at + left_out] = put
    return bytes(data)


def _change(content: Any, dice: random.Random) -> None:
    """Change one place in what JSON is made of."""
    places = list(_places(content))
    if not places:
        return
    owner, key = dice.choice(places)
    how = dice.random()
    if how < 0.3:
        del owner[key]
    elif how < 0.5 and isinstance(owner, dict):
        owner[dice.choice(("", "x" * 300, "\ud800", "../x", "__proto__"))] = owner.pop(key)
    else:
        owner[key] = copy.deepcopy(dice.choice(_ODD))


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(entries):
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


# ---- how each kind is read


def _report(folder: Path) -> None:
    report = read_report(folder)
    parity = _read(folder, "parity.json")
    assert report is not None
    unverified(report, parity)
    model_card(report, "StableDiffusionPipeline")
    body(report, "StableDiffusionPipeline", "a/b", None, parity)


def _with_report(folder: Path, content: bytes) -> None:
    (folder / "conversion.json").write_text(json.dumps(CONVERSION), encoding="utf-8")
    (folder / "parity.json").write_bytes(content)


def _image(folder: Path, content: bytes) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(CHUNK, content.decode("utf-8", "replace"))
    Image.new("L", (1, 1)).save(folder / "image.png", pnginfo=chunks)


def _residue(folder: Path, content: bytes) -> None:
    path = residue_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        texts = json.loads(content.decode("utf-8", "replace"))
        metadata = {_whole_text(key): _whole_text(value) for key, value in texts.items()}
    except (ValueError, AttributeError, RecursionError):
        metadata = {**RESIDUE, "keys": content.decode("utf-8", "replace")}
    save_file({"a": np.zeros(1, "f4")}, path, metadata)


def _whole_text(value: object) -> str:
    return str(value).encode("utf-8", "replace").decode()


def _with_tokenizer(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
    (folder / "tokenizer_config.json").write_bytes(content)


def _shards(folder: Path, content: bytes) -> None:
    save_file({"a": np.zeros(1, "f4")}, folder / "m-00001-of-00001.safetensors")
    (folder / "m.safetensors.index.json").write_bytes(content)


KINDS = (
    Kind("conversion.json", CONVERSION, _report),
    Kind("parity.json", PARITY, _report, _with_report),
    Kind("README.md", CARD, lambda folder: _card(folder, CONVERSION, "text", {})),
    Kind("model_index.json", {"_class_name": "StableDiffusionPipeline"}, pipeline_class),
    Kind("image.png", RECIPE, lambda folder: read_recipe(folder / "image.png"), _image),
    Kind("residue", RESIDUE, read_residue, _residue),
    Kind("tokenizer.json", TOKENIZER, CLIPTokenizer.from_pretrained),
    Kind(
        "tokenizer_config.json",
        TOKENIZER_CONFIG,
        CLIPTokenizer.from_pretrained,
        _with_tokenizer,
    ),
    Kind("scheduler_config.json", dict(DDIMScheduler().config), DDIMScheduler.from_pretrained),
    Kind(
        "m.safetensors.index.json",
        SHARDS,
        lambda folder: inspect(folder / "m.safetensors.index.json"),
        _shards,
    ),
)


def weight_kinds(folder: Path) -> tuple[Kind, ...]:
    """Kinds of files of weights, small ones of every reader; the whole ones are made in a folder."""
    state = {f"model.diffusion_model.out.{i}.weight": torch.ones(i + 1, 2) for i in range(4)}
    save_file({key: one.numpy() for key, one in state.items()}, folder / "m.safetensors")
    torch.save({"state_dict": state, "global_step": 1}, folder / "m.ckpt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    with h5py.File(folder / "m.weights.h5", "w") as file:
        hdf5_files.modern(file)
    with h5py.File(folder / "m.h5", "w", libver="latest") as file:
        hdf5_files.few(file)
    with zipfile.ZipFile(folder / "m.keras", "w") as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.15.1"}')
        archive.writestr("config.json", '{"class_name": "ImageEncoder"}')
        archive.write(folder / "m.weights.h5", "model.weights.h5")
    arrays = {f"w/{i}/.ATTRIBUTES/VARIABLE_VALUE": np.ones((2, i), "f4") for i in range(4)}
    nodes = [Node({str(i): i + 1 for i in range(4)}, {})]
    nodes += [Node({}, {"VARIABLE_VALUE": name}) for name in arrays]
    write_bundle(folder / "tf", arrays, nodes)
    single = ("m.safetensors", "m.ckpt", "old.pt", "m.weights.h5", "m.h5", "m.keras")
    index, data = "tf.index", "tf.data-00000-of-00001"
    return (
        *(_weights(name, (folder / name).read_bytes()) for name in single),
        _bundle(folder, index, data),
        _bundle(folder, data, index),
    )


def _weights(name: str, whole: bytes) -> Kind:
    return Kind(name, whole, lambda folder: inspect(folder / name))


def _bundle(made: Path, name: str, other: str) -> Kind:
    """One file of a TensorFlow checkpoint, beside the other, which is whole."""
    beside = (made / other).read_bytes()

    def place(folder: Path, content: bytes) -> None:
        (folder / name).write_bytes(content)
        (folder / other).write_bytes(beside)

    return Kind(
        name, (made / name).read_bytes(), lambda folder: inspect(folder / "tf.index"), place
    )


def faults(kind: Kind, folder: Path, count: int, seed: int) -> list[str]:
    """Read so many damaged files of a kind; what was wrong with the answers."""
    dice = random.Random(f"{kind.name} {seed}")
    found = []
    for number in range(count):
        content = damaged(kind.whole, dice)
        kind.write(folder, content)
        try:
            kind.read(folder)
        except REFUSED as error:
            said = str(error)
            wrong = "\n" in said or type(error) not in (ConversionError, OSError, ValueError)
            if not wrong and str(folder) in said:
                continue
        except Exception as error:
            said = repr(error)
        else:
            continue
        found.append(f"{kind.name} {number}: {said[:300]!r} of {content[:200]!r}")
    return found
