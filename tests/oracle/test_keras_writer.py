"""Keras files written from a repo are loaded by the real keras-cv classes, with every weight to the
bit."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import h5py
import pytest

import weightport

from ..support import digests
from ..support.kept import content_of, kept
from ..support.keras_files import MODELS, interpreter, keras
from ..support.keras_skeletons import legacy_names, load
from .test_keras_files import RUNS, made_by

LOAD = Path(__file__).with_name("load_keras.py")
SCRIPTS = (LOAD, Path(digests.__file__), *MODELS)
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
def loaded(written: Path) -> dict[str, Path]:
    """Environment -> the folder of what its Keras loads from each file."""
    jobs = [
        {
            "component": part,
            "version": version,
            "files": [str(_file(written, version, part, suffix)) for suffix in LAYOUTS],
        }
        for version, part in LOADED
    ]
    path = written / "jobs.json"
    path.write_text(json.dumps(jobs))
    files = [_file(written, *model, suffix) for model in LOADED for suffix in LAYOUTS]
    given = json.dumps([LOADED, LAYOUTS, [content_of(file) for file in files]]).encode()
    return {
        environment: kept(
            interpreter(environment), SCRIPTS, given, partial(_load, environment, path)
        )
        for environment in ("k2", "k3")
    }


def _file(folder: Path, version: str, part: str, suffix: str) -> Path:
    return folder / version / f"keras.{part}{suffix}"


def _load(environment: str, jobs: Path, folder: Path) -> None:
    ended = keras(environment).script(LOAD, jobs, folder)
    assert ended.status == 0, ended.err[-4000:]


@pytest.mark.parametrize("environment", ["k2", "k3"])
@pytest.mark.parametrize("suffix", LAYOUTS)
@pytest.mark.parametrize(("version", "part"), LOADED)
def test_keras_loads_what_keras_saved(
    loaded: dict[str, Path], version: str, part: str, suffix: str, environment: str
) -> None:
    """From Keras to a repo and back into Keras: both generations, both layouts, bit for bit."""
    found = loaded[environment] / f"{version}.keras.{part}{suffix}.json"
    truth = made_by(MADE[version], RUNS[MADE[version]]).truth(part)
    assert json.loads(found.read_text()) == {name: digests.digest(truth[name]) for name in truth}


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
