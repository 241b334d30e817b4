"""A shelf of a hundred checkpoints: every family and layout, and ten that are damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from safetensors.torch import load_file

import weightport
from weightport import AutoencoderTiny

from ..support import keras_skeletons as skeletons
from ..support.adapter_files import kohya_state, stock_model, write_kohya
from ..support.embedding_files import a1111, vectors
from ..support.synthetic import write_controlnet
from ..support.transformer_families import FLUX, SD3, bundle, original, write

COUNT = 100
DAMAGED = 10
UNETS = ("sd1", "sd2", "sdxl", "sdxl_refiner", "upscaler")
SHARDS = "k3_te_s.weights"  # a skeleton of an index, whose shards are made of the next one
SHARDED = "k3_te_n.weights.h5"
COPIED = "k2_enc_n.weights.h5"  # the smallest


class Shelf:
    """Makes the checkpoints, each a file or a folder of its name.

    Attributes:
        folder: where those are that a batch finds.
        listed: where those are that need options, and so a list.
        options: name -> those of the jobs that need any.
    """

    def __init__(
        self,
        folder: Path,
        repo_of: Callable[[str], Path],
        original_of: Callable[[str], Path],
        keras_of: Callable[[str, str], dict[str, Path]],
    ) -> None:
        self.folder = folder / "shelf"
        self.listed = folder / "listed"
        self.options: dict[str, dict[str, Any]] = {}
        self._repo_of = repo_of
        self._original_of = original_of
        self._keras_of = keras_of
        self.folder.mkdir()
        self.listed.mkdir()
        self._add_unets()
        self._add_transformers()
        self._add_keras()
        self._add_others()
        for number, damage in enumerate(self._damaged()):
            damage(self.folder / f"bad-{number}")
        for number in range(COUNT - len(self.paths)):
            self._add_copy(number)
        for path in self.paths:
            if name_of(path) in self.options:
                path.rename(self.listed / path.name)

    @property
    def paths(self) -> list[Path]:
        """The sources, by the names of the jobs."""
        return sorted([*self.folder.iterdir(), *self.listed.iterdir()], key=name_of)

    @property
    def jobs(self) -> list[Path]:
        """What to give to the command."""
        listed = {path: self.options[name_of(path)] for path in sorted(self.listed.iterdir())}
        return [self.folder, write_list(self.folder.with_name("jobs.jsonl"), listed)]

    def _link(self, name: str, target: Path) -> None:
        (self.folder / name).symlink_to(target)

    def _add_unets(self) -> None:
        for family in UNETS:
            self._link(f"{family}-repo", self._repo_of(family))
            self._link(f"{family}.safetensors", self._original_of(family))
        self.options["sd2"] = {"prediction_type": "v_prediction"}  # its file does not say
        sd1 = self._repo_of("sd1")
        self._link("sd1-to-ldm", sd1)
        self.options["sd1-to-ldm"] = {"to": "ldm"}
        self._link("sd1-to-kerascv", sd1)
        self.options["sd1-to-kerascv"] = {"to": "kerascv"}
        self._link("sd1-half", sd1)
        self.options["sd1-half"] = {"dtype": "float16", "variant": "fp16"}
        weightport.convert(sd1, self.folder / "sd1-sharded", max_shard_size="10MB")
        state = load_file(self._original_of("sd1"))
        torch.save({"state_dict": state}, self.folder / "pickled.ckpt")
        unet = "model.diffusion_model."
        alone = {key: tensor for key, tensor in state.items() if key.startswith(unet)}
        torch.save(alone, self.folder / "unet.pt", _use_new_zipfile_serialization=False)

    def _add_transformers(self) -> None:
        for family in (*SD3, *FLUX):
            file = write(self.folder / f"{family}.safetensors", bundle(family))
            write(
                self.folder / f"{family}-transformer.safetensors", original(family, "transformer")
            )
            weightport.convert(file, self.folder / f"{family}-repo", family=family, residue=False)
            self.options[family] = {"family": family}

    def _add_keras(self) -> None:
        for family in ("sd1", "sd2"):
            for ending in (".weights.h5", ".h5"):
                model = self.folder / f"{family}{ending.replace('.', '-')}"
                model.mkdir()
                for path in self._keras_of(family, ending).values():
                    (model / path.name).symlink_to(path)
        for number, name in enumerate(skeletons.SKELETONS):
            document = skeletons.load(name)
            place = self.folder / f"keras-{number:02}{_ending(name)}"
            if name == SHARDS:
                whole = skeletons.load(SHARDED)
                place.mkdir()
                skeletons.write_shards(place, document, whole, skeletons.keys_of(SHARDED, whole))
            else:
                skeletons.write(place, document, skeletons.keys_of(name, document))
        source = self.folder / "sd3-transformer.safetensors"
        weightport.convert(source, self.folder / "kerashub.weights.h5", to="kerashub")

    def _add_others(self) -> None:
        for family in ("sd1", "sd2", "sdxl"):
            model = write_controlnet(self.folder / f"controlnet-{family}", family)
            weightport.convert(model, self.folder / f"control-{family}.safetensors", to="ldm")
        AutoencoderTiny().save_pretrained(self.folder / "tiny")
        layers = ("attn1.to_q", "attn2.to_k")
        lora = kohya_state({"lora_unet": stock_model("sd1", "unet")}, only=layers)
        write_kohya(self.folder / "lora.safetensors", lora)
        self.options["lora"] = {"to": "peft"}
        torch.save(a1111(vectors()), self.folder / "embedding.pt")
        self.options["embedding"] = {"to": "text-encoders"}

    def _damaged(self) -> Iterator[Callable[[Path], object]]:
        """Ten ways; each takes a path that still lacks its ending."""
        keras = self._keras_of("sd1", ".weights.h5")["decoder"]
        checkpoint = self._original_of("sd1")

        def bytes_of(ending: str, content: bytes) -> Callable[[Path], object]:
            return lambda place: place.with_suffix(ending).write_bytes(content)

        yield bytes_of(".ckpt", b"")
        yield bytes_of(".safetensors", b"<html>")
        yield lambda place: cut(checkpoint, place.with_suffix(".safetensors"))
        yield lambda place: cut(keras, place.with_suffix(".h5"))
        yield bytes_of(".ckpt", b"version https://git-lfs.github.com/spec/v1")
        yield bytes_of(".pt", b"PK\x03\x04" + bytes(100))
        yield bytes_of(".bin", os.urandom(1000))
        yield bytes_of(".safetensors", b"\xff" * 7 + b"\x00{}")
        yield lambda place: place.with_suffix(".ckpt").symlink_to("nowhere")
        yield lambda place: without_a_layer(keras, place.with_suffix(".h5"))

    def _add_copy(self, number: int) -> None:
        """A Keras file in which one tensor is another."""
        document = skeletons.load(COPIED)
        place = self.folder / f"copy-{number:02}.h5"
        skeletons.write(place, document, skeletons.keys_of(COPIED, document))
        with h5py.File(place, "r+") as opened:
            found: list[h5py.Dataset] = []
            opened.visititems(lambda _, one: found.append(one) if hasattr(one, "dtype") else None)
            found[0][...] = np.full(found[0].shape, number, "f4")


def name_of(path: Path) -> str:
    """Of the job."""
    return path.name.partition(".")[0]


def write_list(file: Path, jobs: Mapping[Path, Mapping[str, Any]]) -> Path:
    """A list of jobs: source -> options."""
    lines = [json.dumps({"sources": str(source), **given}) for source, given in jobs.items()]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def _ending(name: str) -> str:
    """Of what a skeleton describes; a folder has none."""
    return name[name.index(".") :] if "." in name and name != SHARDS else ""


def cut(file: Path, place: Path) -> None:
    """Half of a file."""
    shutil.copyfile(file, place)
    os.truncate(place, place.stat().st_size // 2)


def without_a_layer(file: Path, place: Path) -> None:
    """A copy of a KerasCV decoder that lacks a layer."""
    shutil.copyfile(file, place)
    with h5py.File(place, "r+") as opened:
        del opened["layers/attention_block"]
