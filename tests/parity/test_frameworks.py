"""What `mappings/facts/parity.toml` says fits families, runners and sources."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import weightport
from weightport import FluxTransformer2DModel
from weightport.converters.layouts.sources import LAYOUTS
from weightport.errors import ConversionError
from weightport.mappings.facts import facts
from weightport.mappings.families import families, halves
from weightport.parity.frameworks import OURS, call_of, framework_of, frameworks
from weightport.parity.process import RUNNERS

from ..support import transformer_families
from ..support.runners import warm_runners
from ..support.tiny_autoencoder import write_tiny_autoencoder

CHECKS = {name for family in families().values() for name in family.components} | set(halves())


def test_every_framework_has_its_runner() -> None:
    scripts = {path.stem.removeprefix("run_") for path in RUNNERS.glob("run_*.py")}
    assert scripts == set(frameworks())
    assert OURS in frameworks()


def test_every_model_can_be_called() -> None:
    for family in families().values():
        for name, component in family.components.items():
            if not family.runs and name == family.denoiser:
                with pytest.raises(ConversionError, match=f"no {component.class_name}"):
                    call_of(name, component.class_name)
                continue
            for check in component.halves or [name]:
                assert call_of(check, component.class_name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_a_framework(layout: str) -> None:
    for family in families().values():
        denoiser = family.components[family.denoiser].class_name
        assert framework_of(layout, family.name, denoiser, family.denoiser, sys.executable)


def test_facts_name_checks_that_there_are() -> None:
    known = facts("parity")
    named = set(known["tolerances"]) - {"every"}
    for framework in frameworks().values():
        named |= set(framework.differs)
    for source in known["sources"]:
        assert source["framework"] in frameworks()
        for family, checks in source.get("checks", {}).items():
            assert set(checks) <= set(families()[family].components) | set(halves())
    assert named <= CHECKS


@pytest.mark.parametrize(
    ("layout", "family", "check", "name"),
    [
        ("kerascv", "sd2", "unet", "kerascv"),
        ("diffusers", "sdxl", "vae", "diffusers"),
        ("ldm", "sd1", "text_encoder", "ldm"),
        ("ldm", "sd2", "decoder", "ldm"),
        ("ldm", "sdxl", "unet", "diffusers"),
        ("ldm", "sd1", "controlnet", "diffusers"),
    ],
)
def test_who_runs_what(layout: str, family: str, check: str, name: str) -> None:
    assert framework_of(layout, family, "any", check, sys.executable).name == name


def test_diffusers_takes_the_place_of_what_is_not_installed() -> None:
    assert framework_of("ldm", "sd2", "any", "text_encoder", "/no/python").name == "diffusers"


@pytest.mark.parametrize(
    ("layout", "class_name"),
    [("x", "AutoencoderKL"), ("ldm", "AutoencoderTiny"), ("ldm", "AsymmetricAutoencoderKL")],
)
def test_a_source_that_no_one_runs(layout: str, class_name: str) -> None:
    said = f"no program is known that runs a file of {class_name} with {layout}'s names"
    with pytest.raises(ConversionError, match=said):
        framework_of(layout, "sd1", class_name, "decoder", sys.executable)


def test_a_tiny_autoencoder_is_compared(tmp_path: Path) -> None:
    write_tiny_autoencoder(tmp_path / "vae")
    weightport.convert(tmp_path / "vae", tmp_path / "repo")
    with pytest.MonkeyPatch.context() as patch:
        warm_runners(patch)
        found = weightport.parity(tmp_path / "repo")
    assert [check.name for check in found.checks] == ["decoder", "image_encoder"]
    assert found.passed


def test_the_models_of_sd3_are_compared(tmp_path: Path) -> None:
    file = transformer_families.write(
        tmp_path / "sd3.safetensors", transformer_families.bundle("sd3")
    )
    weightport.convert(file, tmp_path / "repo", family="sd3")
    with pytest.MonkeyPatch.context() as patch:
        warm_runners(patch)
        found = weightport.parity(tmp_path / "repo", layers=True)
    names = [check.name for check in found.checks]
    encoders = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert sorted(names) == sorted([*encoders, "transformer", "decoder", "image_encoder"])
    assert found.passed
    assert all(len(check.layers) > 10 for check in found.checks)


def test_the_transformer_of_flux_is_compared(tmp_path: Path) -> None:
    FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).save_pretrained(tmp_path / "transformer")
    weightport.convert(tmp_path / "transformer", tmp_path / "repo")
    with pytest.MonkeyPatch.context() as patch:
        warm_runners(patch)
        found = weightport.parity(tmp_path / "repo")
    assert [check.name for check in found.checks] == ["transformer"]
    assert found.passed


def test_our_runtime_follows_the_sources_maths_first() -> None:
    kerascv = frameworks()["kerascv"]
    assert kerascv.semantics("unet") == ("kerascv", "diffusers")
    assert kerascv.semantics("text_encoder") == ("kerascv",)
    assert frameworks()["ldm"].semantics("unet") == ("diffusers",)
