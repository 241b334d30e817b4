"""Which files of a folder are jobs, and which Keras files make one model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from weightport.batch.gather import gather
from weightport.batch.jobs import Job, placed
from weightport.errors import ConversionError

Lay = Callable[..., Path]


@pytest.fixture
def lay(sd1_keras: dict[str, Path], sd2_keras: dict[str, Path], tmp_path: Path) -> Lay:
    """Lays links to Keras files: path in the shelf -> part, `sd2 part`, or the text of a file."""
    known = sd1_keras | {f"sd2 {part}": path for part, path in sd2_keras.items()}

    def lay(**files: str) -> Path:
        shelf = tmp_path / "shelf"
        for name, kind in files.items():
            path = shelf / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind in known:
                path.symlink_to(known[kind])
            else:
                path.write_text(kind)
        return shelf

    return lay


def jobs_in(*texts: str | Path, results: Path = Path("/nowhere")) -> dict[str, list[str]]:
    """Name of each job -> the names of its sources."""
    entries, _ = gather([str(text) for text in texts], results)
    return {job.name: [Path(one).name for one in job.sources] for job in of(entries, results)}


def of(entries: object, results: Path) -> list[Job]:
    return placed(entries, results, {}, "")  # type: ignore[arg-type]


def test_a_folder_of_different_parts_is_a_model(lay: Lay) -> None:
    shelf = lay(
        **{"cat/my-unet.h5": "unet", "cat/other te.h5": "text_encoder", "cat/decoder.h5": "decoder"}
    )
    assert jobs_in(shelf) == {"cat": ["decoder.h5", "my-unet.h5", "other te.h5"]}


def test_names_tell_models_of_one_folder_apart(lay: Lay) -> None:
    shelf = lay(
        **{
            "cat.unet.weights.h5": "unet",
            "cat_text_encoder.h5": "text_encoder",
            "Dog-Diffusion-Model.h5": "unet",
            "dog_decoder.weights.h5": "decoder",
            "unet.h5": "unet",
        }
    )
    assert jobs_in(shelf) == {
        "cat": ["cat.unet.weights.h5", "cat_text_encoder.h5"],
        "Dog-Diffusion-Model": ["Dog-Diffusion-Model.h5"],
        "dog_decoder": ["dog_decoder.weights.h5"],
        "unet": ["unet.h5"],
    }


def test_one_name_and_none_are_one_model(lay: Lay) -> None:
    shelf = lay(
        **{
            "kcv_diffusion_model.h5": "unet",
            "kcv_decoder.h5": "decoder",
            "vae_encoder.h5": "image_encoder",
        }
    )
    assert len(jobs_in(shelf)) == 1


def test_content_decides_what_a_part_is(lay: Lay) -> None:
    """Two UNets are no model, whatever one of them is called."""
    shelf = lay(**{"cat/unet.h5": "unet", "cat/decoder.h5": "unet"})
    assert len(jobs_in(shelf)) == 2


def test_parts_of_two_families_are_two_models(lay: Lay) -> None:
    shelf = lay(**{"cat/unet.h5": "unet", "cat/text_encoder.h5": "sd2 text_encoder"})
    assert len(jobs_in(shelf)) == 2


def test_a_damaged_part_is_not_left_behind(lay: Lay) -> None:
    shelf = lay(**{"cat/unet.h5": "no HDF5", "cat/decoder.h5": "decoder"})
    assert jobs_in(shelf) == {"cat": ["decoder.h5", "unet.h5"]}


def test_folders_globs_and_files_find_the_same(lay: Lay, sd1_repo: Path) -> None:
    shelf = lay(
        **{
            "cat/unet.h5": "unet",
            "cat/decoder.h5": "decoder",
            "broken.ckpt": "",
            "README.md": "words",
            "config.json": "{}",
            ".hidden.ckpt": "",
            "deep/er/x.safetensors": "",
        }
    )
    (shelf / "repo").symlink_to(sd1_repo)
    (shelf / "loop").symlink_to(shelf)
    found = jobs_in(shelf)
    assert found.keys() == {"cat", "broken", "deep/er/x", "repo"}
    assert jobs_in(f"{shelf}/*") == found
    files = [shelf / "cat/unet.h5", shelf / "cat/decoder.h5", shelf / "broken.ckpt", shelf / "repo"]
    assert jobs_in(*files).keys() == {"cat", "broken", "repo"}
    entries, notes = gather([str(shelf)], shelf / "deep")
    assert {job.name for job in of(entries, shelf / "deep")} == {"cat", "broken", "repo"}
    assert notes == ["left out, as no checkpoints: README.md, config.json"]


def test_pieces_are_no_jobs(lay: Lay, sd1_repo: Path) -> None:
    index = '{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    shelf = lay(
        **{
            "shards/model.safetensors.index.json": index,
            "shards/model-00001-of-00002.safetensors": "x",
            "shards/model-00002-of-00002.safetensors": "x",
            "run/optimizer.pt": "x",
            "run/model.safetensors": "x",
            "big.weights.json": "{}",
            "big_00000.weights.h5": "unet",
            "repo.residue.safetensors": "x",
        }
    )
    shutil.copytree(sd1_repo, shelf / "repo", ignore=shutil.ignore_patterns("*.safetensors"))
    found = jobs_in(shelf)
    assert found.keys() == {"shards/model", "run/model", "big", "repo"}
    assert found["shards/model"] == ["model.safetensors.index.json"]


def test_one_name_for_two_gives_both_their_whole_names(lay: Lay) -> None:
    shelf = lay(**{"x.ckpt": "a", "x.safetensors": "b", "y.ckpt": "c", "y/z.ckpt": "d"})
    assert jobs_in(shelf).keys() == {"x.ckpt", "x.safetensors", "y.ckpt", "y/z.ckpt"}


@pytest.mark.parametrize("text", ["nothing/*.h5", "empty"])
def test_nothing_is_said(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"nothing has such a name|holds no checkpoint"):
        gather([text], tmp_path / "out")
