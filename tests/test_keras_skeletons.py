"""Every layout that Keras ever wrote, remade from skeletons: each tensor is found under its key, with its content."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from weightport.converters.checkpoint import DTYPES, Checkpoint
from weightport.converters.keras import read_keras
from weightport.converters.keras_layers import model_layers
from weightport.converters.keras_leaves import Lora
from weightport.converters.recognise import Candidate, candidates, recognise
from weightport.converters.sniff import sniff

from .keras_skeletons import SKELETONS, Array, component, content, golden_keys, keys_of, load, narrow, write


def candidate(part: str) -> Candidate:
    """The part as the tables know it, in Stable Diffusion 1."""
    return next(c for c in candidates("kerascv") if c.part == part and c.family.name == "sd1")


def full_shapes(part: str) -> dict[str, tuple[int, ...]]:
    """Canonical key -> the shape that the family's manifest demands of it."""
    found, manifest = candidate(part), candidate(part).component.manifest()
    return {
        key: link.op.inverse.shapes([manifest[link.targets[0]]])[0] if link.op else manifest[link.targets[0]]
        for key, link in found.links.items()
    }


def read(path: Path, lora: Lora | None = None) -> list[Checkpoint]:
    """The components in a file, named where the file names nothing."""
    return [recognise(checkpoint).checkpoint for checkpoint in read_keras(path, sniff(path), lora or Lora())]


def check(checkpoint: Checkpoint, part: str, dtype: str = "F32") -> None:
    """The checkpoint has exactly the part's keys, and every tensor is the one of its key."""
    assert set(checkpoint.tensors) == set(golden_keys(part))
    for key, shape in full_shapes(part).items():
        expected = content(key, narrow(shape), DTYPES[dtype])
        assert checkpoint.tensors[key].dtype == dtype
        assert checkpoint.tensors[key].shape == expected.shape, key
        assert checkpoint.tensors[key].numpy().tobytes() == expected.tobytes(), key


@pytest.mark.parametrize("part", ["text_encoder", "unet", "decoder", "image_encoder"])
def test_the_tables_name_what_kerascv_creates(part: str) -> None:
    order = [key for _, keys in model_layers(part, candidate(part).links) for key in keys]
    assert order == golden_keys(part)


@pytest.mark.parametrize("name", [name for name in SKELETONS if name != "k3_te_s.weights"])
def test_skeleton(name: str, tmp_path: Path) -> None:
    document = load(name)
    keys = keys_of(name, document)
    path = write(tmp_path / "file", document, keys)
    (checkpoint,) = read(path)
    check(checkpoint, component(name))
