"""ControlNets and the x4 upscaler: original layout -> what diffusers loads, and back; a VAE from
another file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import weightport
from weightport.mappings.families import families
from weightport.mappings.library import load_table

from ..support.synthetic import State, weights, write_controlnet, write_repo

BASES = ("sd1", "sd2", "sdxl")
WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = {"README.md", "config.json", "conversion.json", WEIGHTS}


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(a[key].tobytes() == b[key].tobytes() for key in a)


@pytest.fixture(scope="module", params=BASES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def controlnet(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a ControlNet, and the original file that was written from it."""
    folder = tmp_path_factory.mktemp("controlnet")
    repo = write_controlnet(folder / "repo", family)
    weightport.convert(repo, folder / "control.safetensors", to="ldm")
    return repo, folder / "control.safetensors"


# --- ControlNet -----------------------------------------------------------------------------------


def test_a_controlnet_alone_becomes_a_folder_that_diffusers_loads(
    family: str, controlnet: tuple[Path, Path], tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    repo, original = controlnet
    conversion = weightport.convert(original, tmp_path / "out")
    assert conversion.family == family
    assert conversion.lacks == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert _same(load_file(repo / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS))
    model, info = diffusers.ControlNetModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    expected = _json(repo / "config.json")
    assert {key: model.config[key] for key in expected if key[0] != "_"} == {
        key: value for key, value in expected.items() if key[0] != "_"
    }


def test_the_way_back_is_exact(controlnet: tuple[Path, Path], tmp_path: Path) -> None:
    _, original = controlnet
    weightport.convert(original, tmp_path / "out")
    weightport.convert(tmp_path / "out", tmp_path / "again.safetensors", to="ldm")
    assert _same(load_file(original), load_file(tmp_path / "again.safetensors"))


def test_a_file_without_prefix(controlnet: tuple[Path, Path], tmp_path: Path) -> None:
    repo, original = controlnet
    bare = {
        key.removeprefix("control_model."): tensor for key, tensor in load_file(original).items()
    }
    save_file(bare, tmp_path / "bare.safetensors")
    weightport.convert(tmp_path / "bare.safetensors", tmp_path / "out")
    assert _same(load_file(repo / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS))
    weightport.convert(tmp_path / "out", tmp_path / "again.safetensors", to="ldm")
    assert _same(bare, load_file(tmp_path / "again.safetensors"))


def test_a_file_with_diffusers_names(
    family: str, controlnet: tuple[Path, Path], tmp_path: Path
) -> None:
    repo, _ = controlnet
    conversion = weightport.convert(repo / WEIGHTS, tmp_path / "out", dtype="float16")
    assert conversion.family == family
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert {tensor.dtype for tensor in written.values()} == {np.dtype(np.float16)}


def test_pairs_equal_those_of_diffusers(family: str) -> None:
    """At full size, each tensor marked by its own name."""
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    component = families()[family].components["controlnet"]
    ours = {
        link.targets[0]: link.sources[0].removeprefix("control_model.")
        for link in load_table("ldm_controlnet").links(component.manifest(), component.config)
    }
    theirs = utils.convert_controlnet_checkpoint(
        {key: key for key in ours.values()}, component.config
    )
    if family == "sdxl":  # diffusers drops these two layers, which an SDXL ControlNet has
        assert not theirs.keys() & {key for key in ours if key.startswith("add_embedding")}
        ours = {key: source for key, source in ours.items() if not key.startswith("add_embedding")}
    assert ours == theirs


def test_a_whole_checkpoint_with_a_controlnet_becomes_its_pipeline(
    controlnet: tuple[Path, Path], family: str, tmp_path: Path
) -> None:
    """As lllyasviel published them first: the ControlNet beside the whole model."""
    repo = write_repo(tmp_path / "repo", family)
    weightport.convert(repo, tmp_path / "model.safetensors", to="ldm")
    both = load_file(tmp_path / "model.safetensors") | load_file(controlnet[1])
    save_file(both, tmp_path / "both.safetensors")
    weightport.convert(tmp_path / "both.safetensors", tmp_path / "out", prediction_type="epsilon")
    index = _json(tmp_path / "out" / "model_index.json")
    assert index["_class_name"] == families()[family].components["controlnet"].pipelines[4]
    assert index["controlnet"] == ["diffusers", "ControlNetModel"]
    weightport.convert(tmp_path / "out", tmp_path / "again.safetensors", to="ldm")
    assert _same(both, load_file(tmp_path / "again.safetensors"))

    weightport.convert(tmp_path / "both.safetensors", tmp_path / "alone", component="controlnet")
    assert {path.name for path in (tmp_path / "alone").iterdir()} == FILES
    assert not (tmp_path / "alone.residue.safetensors").exists()


def test_a_controlnet_needs_no_base_and_a_model_no_controlnet(
    repo_of: Callable[[str], Path], tmp_path: Path
) -> None:
    assert weightport.convert(repo_of("sd1"), tmp_path / "out", dry_run=True).lacks == []


# --- x4 upscaler ----------------------------------------------------------------------------------


def test_the_upscaler_becomes_its_pipeline(
    repo_of: Callable[[str], Path], original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    conversion = weightport.convert(original_of("upscaler"), tmp_path / "out")
    assert (conversion.family, conversion.lacks) == ("upscaler", [])
    pipeline = diffusers.StableDiffusionUpscalePipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert type(pipeline.low_res_scheduler).__name__ == "DDPMScheduler"
    assert (pipeline.low_res_scheduler.config.beta_start, pipeline.config.max_noise_level) == (
        0.0001,
        350,
    )
    assert pipeline.vae.config.scaling_factor == 0.08333
    assert pipeline.unet.config.num_class_embeds == 1000
    for name in ("unet", "vae"):
        assert _same(
            load_file(repo_of("upscaler") / name / WEIGHTS),
            load_file(tmp_path / "out" / name / WEIGHTS),
        )


def test_the_upscaler_goes_back_with_its_buffers(
    original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    original = load_file(original_of("upscaler"))
    assert original["model.diffusion_model.label_emb.weight"].shape == (1000, 128)
    original["low_scale_model.sqrt_alphas_cumprod"] = np.linspace(1, 0, 1000, dtype=np.float32)
    save_file(original, tmp_path / "original.safetensors")
    weightport.convert(tmp_path / "original.safetensors", tmp_path / "out")
    weightport.convert(tmp_path / "out", tmp_path / "again.safetensors", to="ldm")
    assert _same(original, load_file(tmp_path / "again.safetensors"))


def test_the_image_size_of_the_upscaler_counts_its_two_halvings(
    original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    weightport.convert(original_of("upscaler"), tmp_path / "out", image_size=256)
    sizes = [
        _json(tmp_path / "out" / name / "config.json")["sample_size"] for name in ("unet", "vae")
    ]
    assert sizes == [64, 256]


def test_upscaler_pairs_equal_those_of_diffusers() -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    torch = pytest.importorskip("torch")
    for name, prefix in (("unet", "model.diffusion_model."), ("vae", "first_stage_model.")):
        component = families()["upscaler"].components[name]
        links = load_table(f"ldm_{name}").links(component.manifest(), component.config)
        sources = [link.sources[0] for link in links]
        marked = {key: torch.tensor([float(i)]) for i, key in enumerate(sources)}
        if name == "vae":  # it squeezes 1x1 convolutions by their shape
            marked = {key: tensor.reshape(1, 1, 1) for key, tensor in marked.items()}
        theirs = getattr(utils, f"convert_ldm_{name}_checkpoint")(marked, component.config)
        found = {key: sources[int(tensor.flatten()[0])] for key, tensor in theirs.items()}
        assert found == {link.targets[0]: link.sources[0] for link in links}
        assert all(source.startswith(prefix) for source in sources)


# --- a separate VAE -------------------------------------------------------------------------------


@pytest.fixture
def vae_file(tmp_path: Path) -> Path:
    """A VAE alone, in the original layout and without its prefix, as VAEs are published for web
    UIs."""
    repo = write_repo(tmp_path / "vae_repo", "sd1", seed=7, components=["vae"])
    weightport.convert(repo, tmp_path / "prefixed.safetensors", to="ldm")
    bare = {
        key.removeprefix("first_stage_model."): t
        for key, t in load_file(tmp_path / "prefixed.safetensors").items()
    }
    save_file(bare, tmp_path / "vae.safetensors")
    return tmp_path / "vae.safetensors"


def test_a_separate_vae_is_baked_in(
    original_of: Callable[[str], Path],
    repo_of: Callable[[str], Path],
    vae_file: Path,
    tmp_path: Path,
) -> None:
    original = load_file(original_of("sd1")) | {"betas": np.linspace(0, 1, 1000, dtype=np.float32)}
    save_file(original, tmp_path / "original.safetensors")
    conversion = weightport.convert(
        tmp_path / "original.safetensors", tmp_path / "out", vae=vae_file
    )
    assert conversion.lacks == []
    assert _same(load_file(tmp_path / "out" / "vae" / WEIGHTS), weights("sd1", "vae", seed=7))
    assert _same(
        load_file(tmp_path / "out" / "unet" / WEIGHTS), load_file(repo_of("sd1") / "unet" / WEIGHTS)
    )
    assert conversion.report["options"]["vae"] == "vae.safetensors"

    weightport.convert(tmp_path / "out", tmp_path / "again.safetensors", to="ldm")
    again = load_file(tmp_path / "again.safetensors")
    changed = {key for key in original if original[key].tobytes() != again[key].tobytes()}
    assert again.keys() == original.keys()
    assert {key.split(".")[0] for key in changed} == {"first_stage_model"}


@pytest.mark.parametrize("place", ["vae_repo", "vae_repo/vae", f"vae_repo/vae/{WEIGHTS}"])
def test_a_vae_may_come_from_a_repo(
    original_of: Callable[[str], Path], vae_file: Path, place: Path, tmp_path: Path
) -> None:
    weightport.convert(original_of("sd1"), tmp_path / "out", vae=tmp_path / place)
    assert _same(load_file(tmp_path / "out" / "vae" / WEIGHTS), weights("sd1", "vae", seed=7))


def test_a_vae_fills_what_the_sources_lack(vae_file: Path, tmp_path: Path) -> None:
    repo = write_repo(tmp_path / "repo", "sd1", components=["unet", "text_encoder"])
    assert weightport.convert(repo, tmp_path / "out", vae=vae_file).lacks == []


def test_a_file_without_vae_is_refused(
    original_of: Callable[[str], Path], controlnet: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(weightport.ConversionError, match="holds no VAE"):
        weightport.convert(original_of("sd1"), tmp_path / "out", vae=controlnet[1])
    assert not (tmp_path / "out").exists()


def test_a_vae_of_another_family_is_refused(
    original_of: Callable[[str], Path], vae_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(weightport.ConversionError, match="not of one family"):
        weightport.convert(original_of("upscaler"), tmp_path / "out", vae=vae_file)
