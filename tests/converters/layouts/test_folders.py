"""Folders in which a model lies somewhere inside: repos of pickles, training runs, the Hub's cache."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ...support.command import assert_refused, run
from ...support.synthetic import STEMS, State, config, weights, write_repo

PICKLED = {"model": "pytorch_model", "diffusion_pytorch_model": "diffusion_pytorch_model"}
VAE = "vae/diffusion_pytorch_model.safetensors"


def pickled(state: State, path: Path) -> None:
    """What torch.save writes of a state dict."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: torch.from_numpy(array) for key, array in state.items()}, path)


def as_pickles(repo: Path, shards: int = 1) -> Path:
    """The same repo with `.bin` weights in place of safetensors, or shards of them and indexes."""
    for file in sorted(repo.rglob("*.safetensors")):
        state = load_file(file)
        stem = PICKLED[file.stem]
        where: dict[str, str] = {}
        for number in range(shards):
            part = dict(list(state.items())[number::shards])
            name = f"{stem}.bin"
            if shards > 1:
                name = f"{stem}-{number + 1:05d}-of-{shards:05d}.bin"
            pickled(part, file.with_name(name))
            where |= dict.fromkeys(part, name)
        if shards > 1:
            index = {"metadata": {}, "weight_map": where}
            file.with_name(f"{stem}.bin.index.json").write_text(json.dumps(index))
        file.unlink()
    return repo


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repo of a VAE alone: where the parts do not matter, it stands for all."""
    return write_repo(tmp_path_factory.mktemp("small") / "repo", "sd1", components=["vae"])


@pytest.fixture
def repo(place: Path, small: Path) -> Path:
    """A copy of the small repo, to be changed."""
    return Path(shutil.copytree(small, place / "repo"))


def converted(place: Path, source: Path, *options: str) -> Path:
    """The repo that a source becomes."""
    out = place / "out"
    ended = run("convert", source, "-o", out, "--overwrite", *options)
    assert ended.status == 0, ended.err
    return out


def assert_same_weights(out: Path, repo: Path, *names: str) -> None:
    for name in names:
        file = f"{name}/{STEMS[name]}.safetensors"
        found = load_file(out / file)
        expected = load_file(repo / file)
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            assert np.array_equal(found[key], array), key


def dropped(out: Path) -> dict[str, str]:
    """What `conversion.json` says was left out."""
    report = json.loads((out / "conversion.json").read_text())
    left: dict[str, str] = {}
    for source in report["sources"]:
        left |= source["dropped"]
    return left


# ---- pickles


@pytest.mark.parametrize("shards", [1, 2])
def test_repo_of_pickles(place: Path, sd1_repo: Path, shards: int) -> None:
    repo = Path(shutil.copytree(sd1_repo, place / "repo"))
    out = converted(place, as_pickles(repo, shards))
    assert_same_weights(out, sd1_repo, "unet", "vae", "text_encoder")
    assert "PyTorch" in run("inspect", repo / "vae").out


def test_component_of_pickles(place: Path, small: Path, repo: Path) -> None:
    assert_same_weights(converted(place, as_pickles(repo) / "vae"), small, "vae")


def test_pickle_of_a_repo_is_not_executed(place: Path, repo: Path) -> None:
    as_pickles(repo)
    file = repo / "vae" / "diffusion_pytorch_model.bin"

    class Harmful:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {place}/ran",)

    file.write_bytes(pickle.dumps({"decoder.conv_in.weight": Harmful()}))
    ended = run("convert", repo, "-o", place / "out")
    assert_refused(ended, file, "system")
    assert not (place / "ran").exists()
    assert not (place / "out").exists()


def test_shard_of_pickles_that_is_missing(place: Path, repo: Path) -> None:
    as_pickles(repo, 2)
    (repo / "vae" / "diffusion_pytorch_model-00002-of-00002.bin").unlink()
    index = repo / "vae" / "diffusion_pytorch_model.bin.index.json"
    assert_refused(run("convert", repo, "-o", place / "out"), index, "shard .* is missing")


def test_weights_that_are_something_else(place: Path, repo: Path) -> None:
    file = repo / VAE
    file.write_text("<html>404</html>")
    assert_refused(run("convert", repo, "-o", place / "out"), file, "HTML page")


# ---- what training programs leave


def test_training_checkpoint_with_an_average(place: Path, repo: Path) -> None:
    """`checkpoint-N` of diffusers' scripts: models, averages, and the state of the training."""
    (repo / "model_index.json").unlink()
    average = weights("sd1", "vae", seed=5)
    folder = repo / "vae_ema"
    folder.mkdir()
    ema = {"decay": 0.9999, "optimization_step": 7, "_class_name": "AutoencoderKL"}
    (folder / "config.json").write_text(json.dumps(config("sd1", "vae") | ema))
    pickled(average, folder / "diffusion_pytorch_model.bin")
    torch.save({"state": {}}, repo / "optimizer.bin")
    (repo / "random_states_0.pkl").write_bytes(pickle.dumps({"step": 1}))

    out = converted(place, repo)
    assert_same_weights(out, repo, "vae")
    assert "--ema" in dropped(out)["vae_ema/"]
    assert dropped(out)["optimizer.bin"] == "state of the optimizer"
    assert "random numbers" in dropped(out)["random_states_0.pkl"]
    assert "moving average of vae/" in run("inspect", repo).out

    out = converted(place, repo, "--ema")
    found = load_file(out / VAE)
    assert all(np.array_equal(found[key], array) for key, array in average.items())
    assert "decay" not in json.loads((out / "vae" / "config.json").read_text())


def test_state_of_accelerate(place: Path, sd1_repo: Path) -> None:
    """`save_state` without hooks: numbered files without configs."""
    state = place / "checkpoint-10"
    state.mkdir()
    shutil.copy(sd1_repo / "text_encoder" / "model.safetensors", state / "model.safetensors")
    pickled(weights("sd1", "vae"), state / "pytorch_model_1.bin")
    torch.save({}, state / "scheduler.bin")
    out = converted(place, state)
    assert_same_weights(out, sd1_repo, "text_encoder", "vae")
    assert "learning-rate" in dropped(out)["scheduler.bin"]


def deepspeed(step: Path, *names: str) -> None:
    """A step of a DeepSpeed run."""
    step.mkdir(parents=True)
    module = {key: torch.from_numpy(array) for key, array in weights("sd1", "vae").items()}
    for name in names:
        content = {"module": module, "ds_version": "0.14"} if "model" in name else {"zero": 3}
        torch.save(content, step / name)


@pytest.mark.parametrize("named", ["global_step7", "checkpoint"])
def test_deepspeed_run(place: Path, small: Path, named: str) -> None:
    run_folder = place / "run"
    shards = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    deepspeed(run_folder / named, "mp_rank_00_model_states.pt", shards)
    deepspeed(run_folder / "global_step3", "mp_rank_00_model_states.pt")
    (run_folder / "latest").write_text(f"{named}\n")
    assert_same_weights(converted(place, run_folder), small, "vae")
    assert_same_weights(converted(place, run_folder / named), small, "vae")


@pytest.mark.parametrize(
    "names",
    [
        ["zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt"],
        ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"],
        ["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"],
    ],
)
def test_deepspeed_in_shards(place: Path, small: Path, names: list[str]) -> None:
    run_folder = place / "run"
    deepspeed(run_folder / "global_step7", *names)
    (run_folder / "latest").write_text("global_step7")
    for source in (run_folder, run_folder / "global_step7"):
        ended = run("convert", source, "-o", place / "out")
        assert_refused(ended, source, "DeepSpeed.*shards.*zero_to_fp32")
        assert run("inspect", source).err == ended.err
    shutil.copy(small / VAE, run_folder / "model.safetensors")
    assert_same_weights(converted(place, run_folder), small, "vae")


@pytest.mark.parametrize("name", ["../elsewhere", "/", "", "\0", "a" * 400])
def test_newest_step_that_leads_elsewhere(place: Path, name: str) -> None:
    deepspeed(place / "elsewhere", "mp_rank_00_model_states.pt")
    run_folder = place / "run"
    run_folder.mkdir()
    (run_folder / "latest").write_text(name)
    assert_refused(run("convert", run_folder, "-o", place / "out"), run_folder, "a folder, but")


# ---- the Hub's cache


def cached(repo: Path, cache: Path, commit: str, absolute: bool = False) -> Path:
    """The snapshot of a repo in the cache of the Hub's client."""
    snapshot = cache / "snapshots" / commit
    (cache / "blobs").mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in repo.rglob("*") if path.is_file())
    for number, file in enumerate(files):
        blob = cache / "blobs" / f"{commit[0]}{number:039x}"
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(repo)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob if absolute else os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture
def cache(place: Path, small: Path) -> Path:
    """A cache with two revisions; `main` is the older one."""
    folder = place / "models--org--name"
    cached(small, folder, "a" * 40)
    other = write_repo(place / "other", "sd1", seed=3, components=["vae"])
    newest = cached(other, folder, "b" * 40)
    os.utime(newest, (2e9, 2e9))
    (folder / "refs" / "pr").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    (folder / "refs" / "pr" / "1").write_text("b" * 40)
    return folder


def test_root_of_a_cache(place: Path, small: Path, cache: Path) -> None:
    assert_same_weights(converted(place, cache), small, "vae")
    assert "vae" in run("inspect", cache).out
    for revision in ("pr/1", "b" * 40):
        assert_same_weights(converted(place, cache, "--revision", revision), place / "other", "vae")
    (cache / "refs" / "main").unlink()
    assert_same_weights(converted(place, cache), place / "other", "vae")  # the newest


def test_cache_as_a_base(place: Path, small: Path, cache: Path) -> None:
    out = converted(place, small / "vae", "--base", str(cache))
    assert_same_weights(out, small, "vae")


@pytest.mark.parametrize("revision", ["v2", "../snapshots", "/etc/passwd", "c" * 40])
def test_revision_that_is_not_there(place: Path, cache: Path, revision: str) -> None:
    ended = run("convert", cache, "-o", place / "out", "--revision", revision)
    assert_refused(ended, cache, "no revision")


def test_revision_of_what_is_no_cache(place: Path, small: Path) -> None:
    ended = run("convert", small, "-o", place / "out", "--revision", "main")
    assert_refused(ended, "--revision main", "no source is the folder of a Hub cache")


def test_cache_without_a_snapshot(place: Path, cache: Path) -> None:
    shutil.rmtree(cache / "snapshots")
    (cache / "snapshots").mkdir()
    assert_refused(run("convert", cache, "-o", place / "out"), cache, "without a snapshot")


@pytest.mark.parametrize("absolute", [False, True])
def test_local_folder_of_links(place: Path, small: Path, absolute: bool) -> None:
    """`local_dir=` of older clients holds links into the cache."""
    snapshot = cached(small, place / "hub" / "models--org--name", "a" * 40, absolute)
    local = place / "local"
    for link in (path for path in snapshot.rglob("*") if path.is_symlink()):
        copy = local / link.relative_to(snapshot)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(os.path.realpath(link))
    assert_same_weights(converted(place, snapshot), small, "vae")
    assert_same_weights(converted(place, local), small, "vae")


def test_cache_whose_blobs_were_not_copied(place: Path, small: Path) -> None:
    cache = place / "models--org--name"
    snapshot = cached(small, cache, "a" * 40)
    shutil.rmtree(cache / "blobs")
    (cache / "blobs").mkdir()
    ended = run("convert", snapshot / "vae", "-o", place / "out")
    assert ended.status == 1
    assert "not there" in ended.err or "no such" in ended.err or "folder, but" in ended.err


@pytest.mark.parametrize("name", ["blobs/secret", "secret", f"blobs/{'a' * 39}g"])
def test_link_to_what_is_no_blob(place: Path, repo: Path, name: str) -> None:
    """Only a file that the Hub's client named by its hash may lie outside a repo."""
    elsewhere = place / "models--org--name" / name
    elsewhere.parent.mkdir(parents=True)
    (repo / VAE).rename(elsewhere)
    (repo / VAE).symlink_to(elsewhere)
    ended = run("convert", repo, "-o", place / "out")
    assert_refused(ended, repo / VAE, "a link that leads out of the repo")


def test_folder_of_two_of_a_kind(place: Path, small: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (place / "some").mkdir(exist_ok=True)
        shutil.copy(small / VAE, place / "some" / name)
    assert_refused(run("convert", place / "some", "-o", place / "out"), "some/b", "a second vae")
