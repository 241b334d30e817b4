"""A family is one file; what is asked of all of them."""

from __future__ import annotations

import pytest

from weightport.mappings.families import FOLDER, NAMES, component_names, families, halves
from weightport.mappings.library import all_tables


def test_every_family_has_its_file() -> None:
    assert sorted(path.stem for path in (FOLDER / "families").iterdir()) == sorted(NAMES)
    assert tuple(families()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_a_family_names_is_there(name: str) -> None:
    family = families()[name]
    known = family.components.keys() | family.copied.keys()
    assert {family.denoiser, family.autoencoder, *family.text_encoders} <= known
    assert not family.components.keys() & family.copied.keys()
    assert family.components[family.denoiser].config["in_channels"] in family.pipelines
    assert family.v_prediction.keys() <= family.components.keys()
    assert family.needs.keys() <= family.pipelines.keys()


def test_components_of_all_families() -> None:
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    assert component_names() == (*encoders, "unet", "transformer", "vae", "controlnet")
    assert halves() == {"decoder": "vae", "image_encoder": "vae"}


def test_halves_are_what_their_tables_cover() -> None:
    for table in all_tables():
        for family in table.about["families"]:
            part = table.of_family("part", family)
            filled = families()[family].filled_by(table)
            assert (part in halves()) == (part != filled.name)
            known = filled.halves
            assert table.about.get("covers") == known.get(part)


def test_pixels_of_a_latent_pixel() -> None:
    assert families()["sd1"].latent_scale == 8
    assert families()["upscaler"].latent_scale == 4
