"""Models of other depths than stock: there and back, as folders and single files, and in the
runtime."""

from __future__ import annotations

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
