"""What a repo says and holds beside the models that are converted stays, or is said to be left out."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ...support.command import assert_refused, run
from ...support.synthetic import write_repo

CHECKER = ["stable_diffusion", "StableDiffusionSafetyChecker"]
EXTRACTOR = ["transformers", "CLIPImageProcessor"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repo with a denoiser."""
    return write_repo(tmp_path_factory.mktemp("plain") / "repo", "sd1", components=["unet"])


@pytest.fixture
def repo(place: Path, plain: Path) -> Path:
    """A copy of it with a safety checker and its feature extractor."""
    folder = Path(shutil.copytree(plain, place / "repo"))
    model(folder / "safety_checker", {"architectures": CHECKER[1:]})
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    said(folder, safety_checker=CHECKER, feature_extractor=EXTRACTOR, requires_safety_checker=True)
    return folder


def model(folder: Path, config: dict[str, Any]) -> None:
    """A model of another kind."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": np.arange(3.0)}, folder / "model.safetensors", {"format": "pt"})


def said(repo: Path, **entries: object) -> None:
    """Entries of the index."""
    path = repo / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def converted(place: Path, *sources: str | Path) -> tuple[Path, dict[str, Any], str]:
    """The repo, its index, and what was printed."""
    out = place / "out"
    ended = run("convert", *sources, "-o", out, "--overwrite")
    assert ended.status == 0, ended.err
    return out, json.loads((out / "model_index.json").read_text()), ended.out


def report(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "conversion.json").read_text())
    return content


def test_folders_and_flags_stay(place: Path, repo: Path) -> None:
    (repo / "logs").mkdir()
    (repo / "old.ckpt").write_bytes(b"x")
    (repo / ".git").mkdir()
    out, index, told = converted(place, repo, "--dtype", "float16")
    for name in ("safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json"):
        assert (out / name).read_bytes() == (repo / name).read_bytes()
        assert report(out)["files"][name]["sha256"]
    assert index["requires_safety_checker"] is True
    assert index["safety_checker"] == CHECKER
    assert index["feature_extractor"] == EXTRACTOR
    assert "taken over as they are, not converted: safety_checker/, feature_extractor/" in told
    assert "logs/ is no component of the repo" in told
    dropped = report(out)["sources"][0]["dropped"]
    assert dropped["old.ckpt"] == "a file beside the folders of the repo"
    assert dropped.keys() == {"safety_checker/", "feature_extractor/", "logs/", "old.ckpt"}
    inspected = run("inspect", repo).out
    assert "safety_checker/ is not converted: a safety checker" in inspected


def test_one_component_leaves_the_rest(place: Path, repo: Path) -> None:
    out, index, told = converted(place, repo, "--component", "unet")
    assert not (out / "safety_checker").exists()
    assert "safety_checker" not in index
    assert "left out: safety_checker/" in told


def test_other_layouts_leave_them_by_name(place: Path, repo: Path) -> None:
    ended = run("convert", repo, "-o", place / "m.safetensors", "--to", "ldm")
    assert ended.status == 0, ended.err
    assert "left out: safety_checker/ is not converted" in ended.out


@pytest.mark.parametrize(
    "class_name", ["LatentConsistencyModelPipeline", "StableDiffusionImageVariationPipeline"]
)
def test_class_of_the_pipeline_stays(place: Path, repo: Path, class_name: str) -> None:
    model(repo / "image_encoder", {"architectures": ["CLIPVisionModelWithProjection"]})
    encoder = ["transformers", "CLIPVisionModelWithProjection"]
    said(repo, _class_name=class_name, image_encoder=encoder, default_steps=4)
    out, index, _ = converted(place, repo)
    assert index["_class_name"] == class_name
    assert index["default_steps"] == 4
    assert index["image_encoder"] == encoder
    assert (out / "image_encoder" / "config.json").is_file()
    card = (out / "README.md").read_text()
    assert "pipeline_tag" not in card
    assert class_name in card or "lacks" in card


def test_code_of_the_repo_is_taken_over_and_not_run(place: Path, repo: Path) -> None:
    (repo / "mine.py").write_text(f"open({str(place / 'ran')!r}, 'w')\n")
    said(repo, _class_name=["mine", "MyPipeline"])
    out, index, told = converted(place, repo)
    assert index["_class_name"] == ["mine", "MyPipeline"]
    assert (out / "mine.py").read_bytes() == (repo / "mine.py").read_bytes()
    assert "was not run: mine.py" in told
    assert not (place / "ran").exists()


@pytest.mark.parametrize(
    "entry", [["../mine", "P"], ["os", "system"], ["mine"], [["mine"], "P"], [1, 2]]
)
def test_code_that_is_not_there(place: Path, repo: Path, entry: object) -> None:
    (place / "mine.py").write_text("")
    said(repo, _class_name=entry)
    ended = run("convert", repo, "-o", place / "out")
    assert_refused(ended, repo / "model_index.json", "no file|must be string")


def test_component_of_the_index_that_is_not_there(place: Path, repo: Path) -> None:
    shutil.rmtree(repo / "safety_checker")
    _, index, told = converted(place, repo)
    assert "safety_checker" not in index
    assert "names safety_checker, which it does not have" in told


@pytest.mark.parametrize("name", ["transformer", "prior", "unet"])
def test_repo_whose_images_another_model_makes(place: Path, repo: Path, name: str) -> None:
    shutil.move(repo / "unet", repo / name)
    shutil.copytree(repo / name, repo / "vae")
    (repo / name / "config.json").write_text('{"_class_name": "PixArtTransformer2DModel"}')
    said(repo, _class_name="PixArtAlphaPipeline")
    ended = run("convert", repo, "-o", place / "out")
    assert_refused(ended, repo, f"a PixArtAlphaPipeline, whose {name}/ is PixArt")
    assert run("inspect", repo) == ended


def test_vae_of_another_class_is_taken_over(place: Path, repo: Path) -> None:
    model(repo / "vae", {"_class_name": "ConsistencyDecoderVAE"})
    entry = ["diffusers", "ConsistencyDecoderVAE"]
    said(repo, vae=entry)
    out, index, _ = converted(place, repo)
    assert index["vae"] == entry
    assert (out / "vae" / "model.safetensors").is_file()
    assert not any("vae" in gap for gap in report(out)["notes"] if gap.startswith("lacks"))


def test_given_parts_take_the_place_of_the_repo(place: Path, plain: Path, repo: Path) -> None:
    """A denoiser from elsewhere makes it another pipeline: the base's settings are not its own."""
    said(repo, _class_name="LatentConsistencyModelPipeline")
    out = place / "out"
    source = plain / "unet" / "diffusion_pytorch_model.safetensors"
    assert run("convert", source, "--base", repo, "-o", out).status == 0
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert not (out / "safety_checker").exists()


# ---- files of strangers


class Harmful:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("true",)


def test_pickles_that_are_taken_over_are_looked_through(place: Path, repo: Path) -> None:
    checker = repo / "safety_checker"
    torch.save({"w": torch.zeros(3)}, checker / "pytorch_model.bin")
    out, _, _ = converted(place, repo)
    assert not (out / "safety_checker" / "pytorch_model.bin").exists()  # the same as safetensors
    (checker / "model.safetensors").unlink()
    out, _, _ = converted(place, repo)
    assert (out / "safety_checker" / "pytorch_model.bin").exists()
    shutil.rmtree(out)
    (checker / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Harmful()}))
    ended = run("convert", repo, "-o", place / "out")
    assert_refused(ended, checker / "pytorch_model.bin", "system")
    assert not out.exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_links_that_lead_elsewhere(place: Path, repo: Path, kind: str) -> None:
    secret = place / "secret"
    secret.mkdir()
    (secret / "key").write_text("SECRET")
    target = secret / "key" if kind == "file" else secret
    (repo / "safety_checker" / "extra").symlink_to(target)
    ended = run("convert", repo, "-o", place / "out")
    if kind == "file":
        assert_refused(ended, repo / "safety_checker" / "extra", "leads out of the repo")
    else:  # a folder behind a link is not entered
        assert not (place / "out" / "safety_checker" / "extra").exists()


@pytest.mark.parametrize("name", ["../secret", "a/b", "..", ""])
def test_names_that_lead_elsewhere(place: Path, repo: Path, name: str) -> None:
    (place / "secret").mkdir()
    (place / "secret" / "key").write_text("SECRET")
    said(repo, **{name: ["diffusers", "X"]})
    out, index, _ = converted(place, repo)
    assert name not in index
    assert not list(out.rglob("key"))


@pytest.mark.parametrize(
    ("name", "reason"), [(5, "must be"), ({"a": 1}, "must be"), ([1], "must be"), ("x" * 999, "")]
)
def test_a_class_that_is_none_is_refused_before_anything_is_written(
    name: object, reason: str, repo: Path, place: Path
) -> None:
    said(repo, _class_name=name)
    for ended in (run("inspect", repo), run("convert", repo, "-o", place / "out")):
        assert_refused(ended, repo / "model_index.json", f"`_class_name.*{reason}")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("block_out_channels", [8]),
        ("layers_per_block", -1),
        ("cross_attention_dim", {"a": 1}),
        ("down_block_types", "CrossAttnDownBlock2D"),
        ("class_embed_type", "timestep"),
    ],
)
def test_both_commands_say_where_a_config_is_not_that_of_its_weights(
    option: str, value: object, repo: Path, place: Path
) -> None:
    path = repo / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {option: value}))
    ended = run("convert", repo, "-o", place / "out")
    assert_refused(ended, path, f"`{option}` is .* but the weights have")
    assert f"nothing as it is: {ended.err[7:-1]}" in run("inspect", repo).out
