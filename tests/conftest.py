"""Fixtures that many tests share: tiny models, made once a session. Treat their files as
read-only."""

from __future__ import annotations

import gc
import os
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from .support.hub_server import HubServer
from .support.kept import Fill, filled_once
from .support.synthetic import PARTS, write_keras, write_original, write_repo

# The longest files, which begin first, or the last one would keep one core idle.
# `test_keras_files` makes what the other tests of Keras need: these begin when that is done.
LONGEST = (
    "oracle/test_keras_files.py",
    "oracle/test_sdxl.py",
    "converters/outputs/test_ldm.py",
    "runtime/pipelines/test_pipelines.py",
    "runtime/test_single_file.py",
    "runtime/pipelines/test_flow.py",
    "oracle/test_parity.py",
    "oracle/test_keras_writer.py",
    "oracle/test_sampler.py",
    "converters/layouts/test_ldm_evidence.py",
    "hub/test_runtime.py",
    "hub/test_push.py",
    "cli/test_cli.py",
    "converters/test_convert.py",
    "converters/outputs/test_adapters.py",
    "runtime/test_speed.py",
    "runtime/schedulers/test_schedulers.py",
    "oracle/test_ldm.py",
    "attacks/test_bad_output.py",
    "hub/test_server.py",
    "runtime/loading/test_source.py",
)

gc.disable()  # while files are collected: what they import stays


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and mark those of `oracle/`."""
    here = Path(__file__).parent
    ranks = {here / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    for item in items:
        if item.path.is_relative_to(here / "oracle"):
            item.add_marker(pytest.mark.oracle)


def pytest_collection_finish() -> None:
    """Look for cycles in what tests make, and not in all that was imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Fill], Path]:
    """A folder of this name, filled once for all processes of a run."""
    base = tmp_path_factory.getbasetemp()
    models = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "models"

    return lambda name, make: filled_once(models / name, make)


@pytest.fixture(scope="session")
def repo_of(made: Callable[[str, Fill], Path]) -> Callable[[str], Path]:
    """Family -> a diffusers repo of a narrow model, complete."""
    return cache(
        lambda family: made(family, lambda folder: write_repo(folder / "repo", family)) / "repo"
    )


@pytest.fixture(scope="session")
def original_of(
    repo_of: Callable[[str], Path], made: Callable[[str, Fill], Path]
) -> Callable[[str], Path]:
    """Family -> the original checkpoint of `repo_of`, one `.safetensors` file."""
    name = "original.safetensors"

    def original(family: str) -> Path:
        repo = repo_of(family)
        return made(f"{family}_ldm", lambda folder: write_original(repo, folder / name)) / name

    return cache(original)


@pytest.fixture(scope="session")
def keras_of(
    repo_of: Callable[[str], Path], made: Callable[[str, Fill], Path]
) -> Callable[[str, str], dict[str, Path]]:
    """Family and suffix -> the Keras files of `repo_of`: part -> path."""

    def keras(family: str, suffix: str) -> dict[str, Path]:
        repo = repo_of(family)
        folder = made(f"{family}_keras{suffix}", lambda folder: write_keras(repo, folder, suffix))
        return {part: folder / f"model.{part}{suffix}" for part in PARTS}

    return keras


@pytest.fixture(scope="session")
def sd1_repo(repo_of: Callable[[str], Path]) -> Path:
    """A diffusers repo of a narrow Stable Diffusion 1 model."""
    return repo_of("sd1")


@pytest.fixture(scope="session")
def sd2_repo(repo_of: Callable[[str], Path]) -> Path:
    """A diffusers repo of a narrow Stable Diffusion 2 model."""
    return repo_of("sd2")


@pytest.fixture(scope="session")
def sd1_keras(keras_of: Callable[[str, str], dict[str, Path]]) -> dict[str, Path]:
    """Part -> the `.weights.h5` file of `sd1_repo`."""
    return keras_of("sd1", ".weights.h5")


@pytest.fixture(scope="session")
def sd1_legacy(keras_of: Callable[[str, str], dict[str, Path]]) -> dict[str, Path]:
    """Part -> the legacy `.h5` file of `sd1_repo`."""
    return keras_of("sd1", ".h5")


@pytest.fixture(scope="session")
def sd2_keras(keras_of: Callable[[str, str], dict[str, Path]]) -> dict[str, Path]:
    """Part -> the `.weights.h5` file of `sd2_repo`."""
    return keras_of("sd2", ".weights.h5")


@pytest.fixture(scope="session")
def sd1_archive(sd1_keras: dict[str, Path], made: Callable[[str, Fill], Path]) -> Path:
    """The image encoder of `sd1_repo` as a `.keras` archive."""
    name = "image_encoder.keras"

    def write(folder: Path) -> None:
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("metadata.json", '{"keras_version": "3.15.1"}')
            archive.writestr("config.json", '{"class_name": "ImageEncoder"}')
            archive.write(sd1_keras["image_encoder"], "model.weights.h5")

    return made("sd1_archive", write) / name


@pytest.fixture(scope="module", autouse=True)
def folders_of_a_file(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """What the fixtures of a file wrote goes with it, or the disk fills; a failed test keeps it."""
    base = tmp_path_factory.getbasetemp()
    before = {*base.iterdir(), base / "models"}
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed == failed:
        for folder in set(base.iterdir()) - before:
            if folder.is_symlink():
                folder.unlink()
            else:
                shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a current directory of its own below it."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub on loopback, empty. Its clients run in processes of their own, with
    `hub.environment(home)`."""
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """No test pulls the plug: files need not reach the disk. Who asks for it is tested apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(os, "fdatasync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks for another machine fails: everything here works offline."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(f"a test asked the network for {arguments[-1] if arguments else options}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
