"""Original keys and diffusers keys are paired as diffusers' own converters pair them, and what is
written loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import weightport
from weightport.converters.planning.candidates import Candidate, candidates

from ...support.synthetic import State, config, weights, write_original

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl_refiner")
TABLES = [
    c
    for c in candidates("ldm")
    if c.family.name in FAMILIES
    and c.part != "controlnet"
    and not c.table.about.keys() & {"read_only", "alone"}
]
IDS = [f"{c.table.name}-{c.family.name}" for c in TABLES]
every_table = pytest.mark.parametrize("candidate", TABLES, ids=IDS)
every_family = pytest.mark.parametrize("family", FAMILIES)
Tensors = Mapping[str, torch.Tensor]


CLASSES = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


@pytest.fixture(scope="module")
def converted(
    original_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Family -> the repo that its original checkpoint becomes."""
    folder = tmp_path_factory.mktemp("converted")
    for family in FAMILIES:
        weightport.convert(
            original_of(family), folder / family, prediction_type="epsilon", residue=False
        )
    return {family: folder / family for family in FAMILIES}


def by_diffusers(candidate: Candidate, checkpoint: Tensors, settings: Mapping[str, Any]) -> Tensors:
    """What a table reads, converted by diffusers."""
    if candidate.part == "unet":
        with torch.device("meta"):
            settings = dict(UNet2DConditionModel(**settings).config)
        return convert_ldm_unet_checkpoint(checkpoint, settings)
    if candidate.part == "vae":
        return convert_ldm_vae_checkpoint(checkpoint, settings)
    if candidate.table.name.startswith("openclip"):
        model = SimpleNamespace(config=SimpleNamespace(**settings))
        return convert_open_clip_checkpoint(model, checkpoint, candidate.table.prefix)
    return convert_ldm_clip_checkpoint(checkpoint)


def read(file: Path, prefix: str) -> Tensors:
    """The tensors of a file whose keys begin with a prefix."""
    with safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys() if key.startswith(prefix)}  # noqa: SIM118


# --- pairs ----------------------------------------------------------------------------------------


@every_table
def test_same_pairs_as_diffusers(candidate: Candidate) -> None:
    """Every key at full size. Each tensor is one number, or three if it is fused: numbers tell
    where they went."""
    links = list(dict.fromkeys(candidate.links.values()))
    stock = candidate.component.manifest()
    checkpoint: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    for number, link in enumerate(links):
        rank = len(link.source_shape(stock))
        source = (
            np.arange(len(link.targets), dtype=np.float32).reshape(-1, *[1] * (rank - 1))
            + 3 * number
        )
        checkpoint[link.sources[0]] = torch.from_numpy(source)
        results = link.op.apply([source], len(link.targets)) if link.op else [source]
        expected |= {
            target: result.item() for target, result in zip(link.targets, results, strict=True)
        }
    settings = dict(candidate.component.config)
    if "hidden_size" in settings:
        settings["hidden_size"] = 1
    converted = by_diffusers(candidate, checkpoint, settings)
    assert {key: tensor.item() for key, tensor in converted.items()} == expected
    assert expected.keys() == stock.keys()


@every_table
def test_same_tensors_as_diffusers(
    candidate: Candidate, original_of: Callable[[str], Path]
) -> None:
    family = candidate.family.name
    converted = by_diffusers(
        candidate, read(original_of(family), candidate.table.prefix), config(family, candidate.part)
    )
    expected = weights(family, candidate.part)
    assert converted.keys() == expected.keys()
    assert all(np.array_equal(converted[key].numpy(), expected[key]) for key in expected)


@pytest.mark.parametrize(("folder", "encoder"), [("sdxl", "1"), ("sdxl_refiner", "0")])
def test_sdxl_text_projection_is_turned_round(
    folder: str, encoder: str, original_of: Callable[[str], Path]
) -> None:
    """OpenCLIP computes `x @ W`, `nn.Linear` computes `x @ W.T`: the pooled vector must be the
    same."""
    w = load_file(original_of(folder))[f"conditioner.embedders.{encoder}.model.text_projection"]
    linear = torch.nn.Linear(w.shape[0], w.shape[1], bias=False)
    converted = weights(folder, "text_encoder_2")["text_projection.weight"]
    linear.load_state_dict({"weight": torch.from_numpy(converted)})
    x = np.random.default_rng(0).standard_normal((2, w.shape[0]), np.float32)
    np.testing.assert_allclose(
        linear(torch.from_numpy(x)).detach().numpy(), x @ w, rtol=1e-4, atol=1e-6
    )


def test_a_square_text_projection_is_turned_round_too() -> None:
    """At full size both ways round have the same shape, so nothing but the numbers tells them
    apart."""
    for name in ("openclip_sdxl", "openclip_refiner"):
        candidate = next(c for c in TABLES if c.table.name == name)
        (link,) = {
            link for link in candidate.links.values() if link.targets == ("text_projection.weight",)
        }
        w = np.arange(9, dtype=np.float32).reshape(3, 3)
        assert np.array_equal(link.op.apply([w], 1)[0], w.T)


@pytest.mark.parametrize("family", ["sd2", "sdxl", "sdxl_refiner"])
def test_fused_qkv_is_split_and_fused_again_bit_for_bit(
    family: str,
    original_of: Callable[[str], Path],
    converted: dict[str, Path],
    tmp_path: Path,
) -> None:
    part = "text_encoder" if family == "sd2" else "text_encoder_2"
    before, parts = load_file(original_of(family)), weights(family, part)
    fused = [key for key in before if key.endswith((".in_proj_weight", ".in_proj_bias"))]
    assert len(fused) == 2 * config(family, part)["num_hidden_layers"]
    for key in fused:
        layer, kind = key.split("resblocks.")[1].split(".")[0], key.rpartition("_")[2]
        names = [f"text_model.encoder.layers.{layer}.self_attn.{p}_proj.{kind}" for p in "qkv"]
        assert np.concatenate([parts[name] for name in names]).tobytes() == before[key].tobytes()
    write_original(converted[family], tmp_path / "again.safetensors")
    assert_same(load_file(tmp_path / "again.safetensors"), before)


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(found[key].dtype == expected[key].dtype for key in expected)
    assert all(found[key].tobytes() == expected[key].tobytes() for key in expected)


# --- loading --------------------------------------------------------------------------------------


@every_family
def test_diffusers_and_transformers_load_it_strictly(
    family: str, converted: dict[str, Path]
) -> None:
    """Nothing is missing, nothing unexpected, and every tensor is the one that the original
    held."""
    repo = converted[family]
    for name, cls in CLASSES.items():
        if not (repo / name).is_dir():
            continue
        model, found = cls.from_pretrained(repo / name, output_loading_info=True)
        assert not any(
            found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        )
        expected = weights(family, name)
        state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
        if (
            state.keys() != expected.keys()
        ):  # transformers from 5.6 on drops the prefix of CLIPTextModel
            state = {f"text_model.{key}": value for key, value in state.items()}
        assert_same(state, expected)


def test_an_sdxl_pipeline_runs(converted: dict[str, Path]) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(converted["sdxl"], add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", num_inference_steps=1, height=64, width=64, output_type="np").images[
        0
    ]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()
