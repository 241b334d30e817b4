"""`weightport batch` from the Hub and back to it, on the tests' Hub with its faults."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ..support.command import Run, assert_refused
from ..support.forks import run_command, run_python
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


RUN = """import json, sys
from pathlib import Path
import weightport
from weightport.batch.gather import gather
from weightport.batch.jobs import placed
from weightport.batch.run import run

folder = Path(sys.argv[1])
dry_run, options = json.loads(sys.argv[2])
entries, _ = gather(sys.argv[3:], folder)
jobs = placed(entries, folder, options, weightport.__version__)
print(json.dumps({job.name: run(job, dry_run=dry_run).to_dict() for job in jobs}))
"""


def test_what_is_on_the_hub_alone_is_done(
    hub: HubServer, sd1_keras: dict[str, Path], tmp_path: Path
) -> None:
    """The same sources, tables and options, as the `conversion.json` there says; nobody kept a
    record. Another source or option is another conversion."""
    source = sd1_keras["image_encoder"].read_bytes()
    hub.add("org/keras", {"image_encoder.h5": source})
    local = tmp_path / "mine.h5"
    local.symlink_to(sd1_keras["image_encoder"])

    def outcomes(folder: str, dry_run: bool = False, **options: object) -> dict[str, Any]:
        common = {"push": "tester/{name}", "allow_unverified": True, "sync": False, **options}
        arguments = (tmp_path / folder, json.dumps([dry_run, common]), "hub:org/keras", local)
        environment = hub.environment(tmp_path / f"home of {folder}")
        found: dict[str, Any] = json.loads(run_python(RUN, *arguments, environment=environment).out)
        return found

    def statuses_of(found: dict[str, Any]) -> list[str]:
        return [one["status"] for one in found.values()]

    assert statuses_of(outcomes("first", keep=False)) == ["converted"] * 2
    commits = {name: len(hub.repos[f"tester/{name}"].history()) for name in ("keras", "mine")}
    hub.requests.clear()
    for dry_run in (True, False):
        again = outcomes("second", dry_run)
        assert statuses_of(again) == ["done before"] * 2
        assert again["keras"]["pushed"].startswith(f"{hub.endpoint}/tester/keras/commit/")
    assert hub.downloads()["image_encoder.h5"] < 2 * len(source), "headers alone"
    assert not [one for one in hub.requests if one.method == "PUT"]
    assert not (tmp_path / "second" / "keras").exists()

    local.unlink()
    local.symlink_to(sd1_keras["decoder"])
    assert statuses_of(outcomes("third", license="mit")) == ["converted"] * 2
    for name, count in commits.items():
        assert len(hub.repos[f"tester/{name}"].history()) == count + 1


def test_a_dry_run_says_all_and_downloads_headers_alone(
    hub: HubServer, command: Command, sources: Path, tmp_path: Path
) -> None:
    """What each is, what it becomes, its size, and which cannot be converted and why."""
    large = {"decoder": {"dtype": "F32", "shape": [50_000_000], "data_offsets": [0, 200_000_000]}}
    header = json.dumps(large).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(1 << 20)
    hub.add("org/cut", {"model.safetensors": content})
    with sources.open("a", encoding="utf-8") as file:
        file.write("hub:org/cut\n")
    ended = command(sources, "-o", tmp_path / "out", "--dry-run", "--json")
    assert ended.status == 1
    assert not (tmp_path / "out").exists()
    jobs = {job["name"]: job for job in json.loads(ended.out)["jobs"]}
    planned = {"decoder", "keras", "bin"}
    for name in planned:
        said = jobs[name]
        assert (said["status"], said["becomes"], said["output"]) == ("planned", "diffusers", name)
        assert said["family"].startswith("Stable Diffusion")
    parts = ["vae (decoder): Keras weights (.weights.h5)"]
    assert jobs["decoder"]["parts"] == parts
    assert jobs["keras"]["parts"] == [*parts, "vae (image_encoder): Keras weights (.weights.h5)"]
    size = len(hub.repos["org/one"].files()["deep/decoder.h5"])
    assert jobs["decoder"]["read"] == size
    assert {job["status"] for name, job in jobs.items() if name not in planned} == {"failed"}
    assert "the tensors end at byte 2000000" in jobs["cut"]["error"]
    assert re.match("hub:org/cut@[0-9a-f]{40}/model.safetensors: ", jobs["cut"]["error"])
    assert "holds a.ckpt, b.ckpt" in jobs["two"]["error"]
    fetched = hub.downloads()
    assert fetched["model.safetensors"] < len(content) / 8
    assert fetched[f"{VAE}.bin"] < len(hub.repos["org/bin"].files()[f"{VAE}.bin"]) / 2
    cached = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not [path for path in cached if path.stat().st_size > 100_000]


def test_a_glance_gets_over_faults_and_takes_no_more_than_it_asks_for(
    hub: HubServer, sources: Path, tmp_path: Path
) -> None:
    environment = hub.environment(tmp_path / "home")
    arguments = ("inspect", "hub:org/one/deep/decoder.h5")
    hub.faults += [
        Fault("GET", "resolve/.*/decoder.h5", status=503),
        Fault("GET", "resolve/.*/decoder.h5", cut=1000),
    ]
    assert run_command(*arguments, environment=environment).status == 0
    hub.faults.append(Fault("GET", "resolve/.*/decoder.h5", times=100, status=200))
    ended = run_command(*arguments, environment=environment)
    reason = "its server sends more than the part of a file that was asked for"
    assert_refused(ended, "org/one: deep/decoder.h5", reason)
