"""Fixtures that many tests share: tiny models, made once a session. Treat their files as
read-only."""

from __future__ import annotations

import socket
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from .support.hub_server import HubServer
from .support.synthetic import write_keras, write_original, write_repo

# The longest files, which begin first, or the last one would keep one core idle.
# `test_keras_files` makes what the other tests of Keras need.
LONGEST = (
    "oracle/test_keras_files.py",
    "runtime/pipelines/test_pipelines.py",
    "converters/outputs/test_ldm.py",
    "converters/layouts/test_ldm_evidence.py",
    "cli/test_cli.py",
    "oracle/test_parity.py",
    "oracle/test_keras_writer.py",
    "oracle/test_ldm.py",
    "oracle/test_sampler.py",
    "hub/test_server.py",
    "attacks/test_bad_output.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and mark those of `oracle/`."""
    here = Path(__file__).parent
    ranks = {here / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    for item in items:
        if item.path.is_relative_to(here / "oracle"):
            item.add_marker(pytest.mark.oracle)


@pytest.fixture(scope="session")
def sd1_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers repo of a narrow Stable Diffusion 1 model."""
    return write_repo(tmp_path_factory.mktemp("sd1") / "repo", "sd1")


@pytest.fixture(scope="session")
def sd2_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers repo of a narrow Stable Diffusion 2 model."""
    return write_repo(tmp_path_factory.mktemp("sd2") / "repo", "sd2")


@pytest.fixture(scope="session")
def sd1_keras(sd1_repo: Path) -> dict[str, Path]:
    """Part -> the `.weights.h5` file of `sd1_repo`."""
    return write_keras(sd1_repo, sd1_repo.parent / "keras", ".weights.h5")


@pytest.fixture(scope="session")
def sd1_legacy(sd1_repo: Path) -> dict[str, Path]:
    """Part -> the legacy `.h5` file of `sd1_repo`."""
    return write_keras(sd1_repo, sd1_repo.parent / "legacy", ".h5")


@pytest.fixture(scope="session")
def sd2_keras(sd2_repo: Path) -> dict[str, Path]:
    """Part -> the `.weights.h5` file of `sd2_repo`."""
    return write_keras(sd2_repo, sd2_repo.parent / "keras", ".weights.h5")


@pytest.fixture(scope="session")
def sd1_archive(sd1_keras: dict[str, Path]) -> Path:
    """The image encoder of `sd1_repo` as a `.keras` archive."""
    path = sd1_keras["image_encoder"].with_name("image_encoder.keras")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.15.1"}')
        archive.writestr("config.json", '{"class_name": "ImageEncoder"}')
        archive.write(sd1_keras["image_encoder"], "model.weights.h5")
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a current directory of its own below it."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


@pytest.fixture(scope="session")
def repo_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> a diffusers repo of a narrow model, complete."""
    return cache(lambda family: write_repo(tmp_path_factory.mktemp(family) / "repo", family))


@pytest.fixture(scope="session")
def original_of(repo_of: Callable[[str], Path]) -> Callable[[str], Path]:
    """Family -> the original checkpoint of `repo_of`, one `.safetensors` file."""
    return cache(
        lambda family: write_original(
            repo_of(family), repo_of(family).with_name("original.safetensors")
        )
    )


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub on loopback, empty. Its clients run in processes of their own, with
    `hub.environment(home)`."""
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks for another machine fails: everything here works offline."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(f"a test asked the network for {arguments[-1] if arguments else options}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
