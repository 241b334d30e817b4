"""Models of other depths than stock: there and back, as folders and single files, and in the
runtime."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import weightport
from tests.support import narrow_models

CASES = [(name, seed) for name in narrow_models.CONFIGS for seed in range(50)]
SOME = [(name, 0) for name in narrow_models.CONFIGS] + [
    ("UNet2DConditionModel", n) for n in (10, 46)
]


def there_and_back(class_name: str, seed: int, folder: Path) -> None:
    """A folder of a model of a random config becomes a single file, and that a repo again."""
    config = narrow_models.CONFIGS[class_name](random.Random(seed))
    model = narrow_models.build(class_name, config)
    model.save_pretrained(folder / "model")
    options: dict[str, Any] = {"sync": False, "hashes": False}
    family = weightport.convert(folder / "model", folder / "a", **options).family
    file = folder / "single.safetensors"
    weightport.convert(folder / "model", file, to="ldm", family=family, **options)
    options["prediction_type"] = "epsilon"
    weightport.convert(file, folder / "b", family=family, **options)
    expected = narrow_models.outputs(class_name, model)
    for repo in ("a", "b"):
        place = folder / repo / narrow_models.COMPONENTS[class_name]
        loaded = narrow_models.load(class_name, place)
        assert _equal_weights(model, loaded), (repo, config)
        again = narrow_models.outputs(class_name, loaded)
        # where weights lie in memory decides the last bit
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6, msg=f"{repo} {config}")
    ours = getattr(weightport, class_name).from_pretrained(place)
    with torch.no_grad():
        found = narrow_models.outputs(class_name, ours.eval())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=f"runtime {config}")


def _equal_weights(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), two.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize(("class_name", "seed"), SOME)
def test_some_random_models_come_back(class_name: str, seed: int, tmp_path: Path) -> None:
    there_and_back(class_name, seed, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(("class_name", "seed"), CASES)
def test_200_random_models_come_back(class_name: str, seed: int, tmp_path: Path) -> None:
    there_and_back(class_name, seed, tmp_path)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow UNet of SD 1.x with 4 heads, as a folder and a file without its config."""
    folder = tmp_path_factory.mktemp("heads")
    config = narrow_models.CONFIGS["UNet2DConditionModel"](random.Random(0))
    widths = config["block_out_channels"]
    model = narrow_models.build("UNet2DConditionModel", config | {"attention_head_dim": 4})
    assert all(width % 4 == 0 for width in widths)
    model.save_pretrained(folder / "unet")
    return folder / "unet"


def heads_of(repo: Path) -> Any:
    return json.loads((repo / "unet/config.json").read_text(encoding="utf-8"))["attention_head_dim"]


def test_an_option_decides_the_heads(unet: Path, tmp_path: Path) -> None:
    """Over the family's rule for a file, and over a folder's own config."""
    file = unet / "diffusion_pytorch_model.safetensors"
    options: dict[str, Any] = {"sync": False, "hashes": False}
    family = weightport.convert(unet, tmp_path / "own", **options).family
    assert heads_of(tmp_path / "own") == 4
    for name, source in (("file", file), ("folder", unet)):
        weightport.convert(source, tmp_path / name, heads=["unet=2"], family=family, **options)
        assert heads_of(tmp_path / name) == 2
    count = len(json.loads((unet / "config.json").read_text())["block_out_channels"])
    each = ",".join(["2"] * count)
    weightport.convert(unet, tmp_path / "each", heads=[f"unet={each}"], family=family, **options)
    assert heads_of(tmp_path / "each") == [2] * count


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ("unet=7", "channels cannot be split into 7 heads"),
        ("unet=2,2,2,2,2,2,2", "one number after the =, or"),
        ("unet=0", "one number after the =, or"),
        ("unet", "one number after the =, or"),
        ("text_encoder=2", "the sources hold unet"),
    ],
)
def test_heads_that_make_no_sense(heads: str, message: str, unet: Path, tmp_path: Path) -> None:
    with pytest.raises(weightport.ConversionError, match=message) as error:
        weightport.convert(unet, tmp_path / "repo", heads=[heads])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "repo").exists()
