"""Keras files written from a repo are loaded by the real keras-cv classes, with every weight to the
bit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest

import weightport

from ..support.keras_files import keras
from ..support.keras_skeletons import legacy_names, load
from .test_keras_files import RUNS, assert_equal, made_by

LOAD = Path(__file__).with_name("load_keras.py")
PARTS = ("text_encoder", "unet", "decoder", "image_encoder")
MADE = {"v1": "k2 plain", "v2": "k3 v2"}  # the run that the weights come from
LAYOUTS = (".weights.h5", ".h5")
LOADED = [("v1", part) for part in PARTS] + [
    ("v2", "text_encoder"),
    ("v2", "unet"),
]  # v2 has the VAE of v1


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keras's own files, made a repo, and back: `<version>/keras.<part>.weights.h5` and `.h5`."""
    folder = tmp_path_factory.mktemp("written")
    for version, run in MADE.items():
        files = made_by(run, RUNS[run])
        (folder / version).mkdir()
        repo = folder / version / "repo"
        weightport.convert([files.path(part, "weights.h5") for part in files.made["truth"]], repo)
        for suffix in LAYOUTS:
            weightport.convert(repo, folder / version / f"keras{suffix}", to="kerascv")
    return folder


@pytest.fixture(scope="module")
def loaded(written: Path) -> Path:
    """Each file loaded in both environments: `<environment>.<version>.<part><suffix>.npz`."""
    for environment in ("k2", "k3"):
        jobs = [
            {
                "component": part,
                "version": version,
                "files": [_job(written, environment, version, part, s) for s in LAYOUTS],
            }
            for version, part in LOADED
        ]
        path = written / f"{environment}.json"
        path.write_text(json.dumps(jobs))
        ended = keras(environment).script(LOAD, path)
        assert ended.status == 0, ended.err[-4000:]
    return written


def _job(folder: Path, environment: str, version: str, part: str, suffix: str) -> tuple[str, str]:
    out = folder / f"{environment}.{version}.{part}{suffix}.npz"
    return str(folder / version / f"keras.{part}{suffix}"), str(out)


@pytest.mark.parametrize("environment", ["k2", "k3"])
@pytest.mark.parametrize("suffix", LAYOUTS)
@pytest.mark.parametrize(("version", "part"), LOADED)
def test_keras_loads_what_keras_saved(
    loaded: Path, version: str, part: str, suffix: str, environment: str
) -> None:
    """From Keras to a repo and back into Keras: both generations, both layouts, bit for bit."""
    _, out = _job(loaded, environment, version, part, suffix)
    with np.load(out) as arrays:
        assert_equal(dict(arrays), made_by(MADE[version], RUNS[MADE[version]]).truth(part), out)


@pytest.mark.parametrize("part", PARTS)
def test_names_and_order_are_those_of_keras(written: Path, part: str) -> None:
    """All but the numbers in legacy names, which Keras itself does not look at."""
    skeleton = {"text_encoder": "te", "unet": "unet", "decoder": "dec", "image_encoder": "enc"}[
        part
    ]
    with h5py.File(written / "v1" / f"keras.{part}.weights.h5") as file:
        names: list[str] = []
        file.visititems(
            lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None
        )
    assert set(names) == set(load(f"k2_{skeleton}_n.weights.h5")["datasets"])
    with h5py.File(written / "v1" / f"keras.{part}.h5") as file:
        names = [
            f"{layer}/{name}"
            for layer in file.attrs["layer_names"]
            for name in file[layer].attrs["weight_names"]
        ]
        assert all(name in file for name in names)
    expected = legacy_names(load(f"k2_{skeleton}_w.h5"))
    assert [re.sub(r"_\d+", "", name) for name in names] == [
        re.sub(r"_\d+", "", name) for name in expected
    ]
