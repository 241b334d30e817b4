"""`weightport batch` from the Hub and back to it, on the tests' Hub with its faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..support.command import Run
from ..support.forks import run_command
from ..support.hub_server import Fault, HubServer
from .results import left_in_part, statuses

VAE = "vae/diffusion_pytorch_model"
Command = Callable[..., Run]


@pytest.fixture
def command(hub: HubServer, tmp_path: Path) -> Command:
    """Runs the command as a client of the hub, with two workers."""

    def command(*arguments: str | Path, home: str = "home") -> Run:
        environment = hub.environment(tmp_path / home)
        options = ("--workers", "2", "--no-sync", "--allow-unverified")
        return run_command("batch", *arguments, *options, environment=environment)

    return command


@pytest.fixture
def sources(hub: HubServer, sd1_keras: dict[str, Path], sd1_repo: Path, tmp_path: Path) -> Path:
    """A list of repos: Keras files, one file, a diffusers repo of `.bin` files; three that fail."""
    parts = {part: sd1_keras[part].read_bytes() for part in ("decoder", "image_encoder")}
    hub.add("org/keras", {f"{part}.h5": content for part, content in parts.items()})
    hub.add("org/one", {"README.md": b"mine", "deep/decoder.h5": parts["decoder"]})
    torch.save(load_file(sd1_repo / f"{VAE}.safetensors"), tmp_path / "vae.bin")
    config = (sd1_repo / "vae" / "config.json").read_bytes()
    index = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    files = {"vae/config.json": config, f"{VAE}.bin": (tmp_path / "vae.bin").read_bytes()}
    hub.add("org/bin", {"model_index.json": json.dumps(index).encode(), **files})
    hub.add("org/two", {"a.ckpt": b"x", "b.ckpt": b"y"})
    hub.add("org/words", {"README.md": b"nothing"})
    names = ["keras", "one/deep/decoder.h5", "bin", "two", "words", "none"]
    path = tmp_path / "ids.txt"
    path.write_text("".join(f"hub:org/{name}\n" for name in names))
    return path


EXPECTED = {"keras": "converted", "decoder": "converted", "bin": "converted"}
EXPECTED |= {"two": "failed", "words": "failed", "none": "failed"}


def test_from_the_hub_to_the_hub_in_spite_of_faults(
    hub: HubServer, command: Command, sources: Path, tmp_path: Path
) -> None:
    hub.faults += [
        Fault("GET", "/api/models/org/keras", status=503),
        Fault("GET", "resolve/.*/decoder.h5", cut=1000),
        Fault("GET", f"resolve/.*/{VAE}.bin", status=500, times=2),
        Fault("POST", "/api/models/tester/keras/commit", status=503),
        Fault("PUT", "/lfs/", cut=100_000),
    ]
    out = tmp_path / "out"
    retries = ("--retries", "4")  # one job may meet all that goes wrong
    ended = command(sources, "-o", out, "--push", "tester/{name}", *retries)
    assert ended.status == 1
    assert statuses(out) == EXPECTED, ended.out
    assert "hub:org/two: holds a.ckpt, b.ckpt; name one" in ended.out
    assert "hub:org/words: holds no weights" in ended.out
    for name in ("keras", "decoder", "bin"):
        repo = hub.repos[f"tester/{name}"]
        assert len(repo.history()) == 2, "one commit each, beside the first"
        assert (
            repo.files()[f"{VAE}.safetensors"] == (out / name / f"{VAE}.safetensors").read_bytes()
        )
    assert left_in_part(out) == []

    hub.requests.clear()
    again = command(sources, "-o", out, "--push", "tester/{name}", home="another")
    assert again.status == 1
    assert set(statuses(out).values()) == {"done before", "failed"}
    assert hub.downloads() == {}, "what is done is not fetched"
    assert not [request for request in hub.requests if request.method == "PUT"]


def test_a_pull_request_to_the_source(
    hub: HubServer, command: Command, sources: Path, tmp_path: Path
) -> None:
    """As bots do, with the weights alone where the repo has a card; nothing is kept here."""
    out = tmp_path / "out"
    options = ("-o", out, "--push-pr", "--no-keep")
    for status in ("converted", "done before"):
        ended = command("hub:org/one/deep/decoder.h5", *options)
        assert ended.status == 0, ended.out
        assert statuses(out) == {"decoder": status}
    repo = hub.repos["org/one"]
    assert repo.refs.keys() == {"main", "refs/pr/1"}
    offered = repo.files("refs/pr/1")
    assert offered["README.md"] == b"mine"
    assert {f"{VAE}.safetensors", "vae/config.json", "deep/decoder.h5"} <= offered.keys()
    assert not (out / "decoder").exists()


def test_a_dry_run_downloads_nothing(
    hub: HubServer, command: Command, sources: Path, tmp_path: Path
) -> None:
    ended = command(sources, "-o", tmp_path / "out", "--dry-run")
    assert hub.downloads() == {}
    assert not (tmp_path / "out").exists()
    assert "hub:org/two: holds a.ckpt, b.ckpt" in ended.out
    assert "decoder.h5, image_encoder.h5" in ended.out
    assert ended.status == 1
