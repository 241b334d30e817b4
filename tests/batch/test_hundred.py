"""A hundred jobs of every family and layout, of which ten are damaged in different ways: in
processes here, on a cluster, and from the Hub to the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

import pytest

import weightport
from weightport.batch.gather import gather
from weightport.batch.jobs import Job, placed

from ..support.command import COMMAND, Run, run
from ..support.forks import run_command
from ..support.hub_server import Fault, HubServer
from .cluster import Cluster
from .results import at_work, finished, left_in_part, statuses, wait_for
from .shelves import COUNT, DAMAGED, Shelf, name_of

pytestmark = pytest.mark.full

GOOD = COUNT - DAMAGED
BAD = {f"bad-{number}" for number in range(DAMAGED)}
OPTIONS = ("--no-sync",)
Digests = dict[str, str]


@pytest.fixture(scope="module")
def shelf(
    tmp_path_factory: pytest.TempPathFactory,
    repo_of: Callable[[str], Path],
    original_of: Callable[[str], Path],
    keras_of: Callable[[str, str], dict[str, Path]],
) -> Shelf:
    """The sources."""
    return Shelf(tmp_path_factory.mktemp("hundred"), repo_of, original_of, keras_of)


@pytest.fixture(scope="module")
def alone(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Digests]:
    """What each of the whole ones becomes by a call of its own: name -> file -> sha256."""
    folder = tmp_path_factory.mktemp("alone")
    found = {}
    for job in jobs_of(shelf, folder):
        if job.name not in BAD:
            weightport.convert(job.sources, job.target, **job.options)
            found[job.name] = results(folder, job.name)
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


def jobs_of(shelf: Shelf, folder: Path) -> list[Job]:
    """As the command makes them."""
    entries, _ = gather([str(one) for one in shelf.jobs], folder)
    return placed(entries, folder, {"sync": False}, weightport.__version__)


def results(folder: Path, name: str) -> Digests:
    """The files that a job of this name wrote -> sha256."""
    files = [*folder.glob(f"{name}.*"), *(folder / name).rglob("*")]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file()
    }


def check(ended: Run, shelf: Shelf, out: Path, alone: dict[str, Digests], good: set[str]) -> None:
    """Ninety are done, with the bytes of single runs; ten are named; nothing is left in part."""
    assert ended.status == 1
    found = statuses(out)
    assert found.keys() == {name_of(path) for path in shelf.paths}
    assert len(found) == COUNT
    assert {name for name, status in found.items() if status == "failed"} == BAD
    assert {status for name, status in found.items() if name not in BAD} <= good
    jobs: list[dict[str, Any]] = json.loads((out / "batch.json").read_text())["jobs"]
    for job in jobs:
        if job["name"] in BAD:
            assert str(shelf.folder / job["name"]) in job["error"]
            assert job["error"] in ended.out
    assert len({job["error"] for job in jobs if job["error"]}) == DAMAGED
    assert left_in_part(out) == []
    assert len(alone) == GOOD
    for name, expected in alone.items():
        assert results(out, name) == expected, name


def test_in_processes_here(shelf: Shelf, alone: dict[str, Digests], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = run("batch", *shelf.jobs, "-o", out, "--workers", "2", *OPTIONS)
    check(ended, shelf, out, alone, {"converted"})


def test_on_a_cluster_that_loses_a_worker_and_its_client(
    shelf: Shelf, alone: dict[str, Digests], tmp_path: Path
) -> None:
    """A worker is killed in mid-job, then the client, and another client goes on."""
    pytest.importorskip("distributed")
    cluster = Cluster(tmp_path)
    out = tmp_path / "out"
    command = [*COMMAND, "batch", *map(str, shelf.jobs), "-o", str(out), *OPTIONS]
    command += ["--dask", cluster.address]
    first = Popen(command, stdout=DEVNULL, stderr=DEVNULL)
    try:
        wait_for(lambda: len(finished(out)) >= 10 and at_work(out))
        os.kill(at_work(out)[0], signal.SIGKILL)
        wait_for(lambda: len(finished(out)) >= 30)
        first.kill()
        first.wait()
        before = finished(out)
        assert len(before) < GOOD, "the client was killed too late to tell"
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    finally:
        first.kill()
        cluster.close()
    assert ended.stderr == ""
    again = Run(ended.returncode, ended.stdout, ended.stderr)
    check(again, shelf, out, alone, {"converted", "done before"})
    found = statuses(out)
    assert {found[name] for name in before} == {"done before"}
    after = finished(out)
    assert {name: after[name] for name in before} == before, "nothing is done twice"


def test_from_the_hub_to_the_hub(
    shelf: Shelf, alone: dict[str, Digests], hub: HubServer, tmp_path: Path
) -> None:
    """Nothing is kept here, and much goes wrong on the way; a second batch, elsewhere, finds all
    repositories done."""
    jobs = []
    for job in jobs_of(shelf, tmp_path / "out"):
        path = next(one for one in shelf.paths if name_of(one) == job.name)
        options = {**job.options, "output": job.output}
        if job.options.get("to") not in ("ldm", "kerascv"):  # push takes repositories and adapters
            options |= {"push": f"tester/{job.name}", "keep": False, "allow_unverified": True}
        jobs.append({"sources": offered(hub, path), **options})
    listed = tmp_path / "jobs.jsonl"
    listed.write_text("\n".join(map(json.dumps, jobs)), encoding="utf-8")
    hub.faults += [
        *(Fault("GET", f"/api/models/org/keras-0{n}", status=503, times=2) for n in range(3)),
        *(Fault("GET", f"/org/keras-0{n}/resolve/", cut=1000, times=2) for n in range(3, 6)),
        *(Fault("GET", f"/org/keras-0{n}/resolve/", status=500, times=2) for n in range(6, 9)),
        *(Fault("POST", f"/tester/keras-1{n}/commit/", status=503) for n in range(3)),
        *(Fault("PUT", "/lfs/", cut=1000) for _ in range(5)),
        Fault("POST", "/api/repos/create", status=502, times=3),
    ]
    asked = ("batch", listed, "--workers", "2", "--retries", "9", "--no-sync")
    environment = hub.environment(tmp_path / "home")
    ended = run_command(*asked, "-o", tmp_path / "out", environment=environment)
    found = statuses(tmp_path / "out")
    assert {name for name, status in found.items() if status == "failed"} == BAD, ended.out
    assert list(found.values()).count("converted") == GOOD
    assert ended.status == 1
    assert [fault for fault in hub.faults if fault.times] == []
    assert left_in_part(tmp_path / "out") == []
    for name, expected in alone.items():
        made = results(tmp_path / "out", name)
        if (pushed := hub.repos.get(f"tester/{name}")) is not None:
            assert made == {}, "it is not kept"
            assert len(pushed.history()) == 2, "one commit, beside the first"
            made = digests(name, pushed.files())
        assert same_weights(made, expected), name

    again = run_command(*asked, "-o", tmp_path / "other", environment=environment)
    repositories = {name for name, files in alone.items() if f"{name}/conversion.json" in files}
    found = statuses(tmp_path / "other")
    assert {name for name, status in found.items() if status == "done before"} == repositories
    assert {name for name, status in found.items() if status == "failed"} == BAD, again.out


def offered(hub: HubServer, path: Path) -> str:
    """The name on the Hub of a source that is put there."""
    repo_id = f"org/{name_of(path)}"
    if not path.is_dir():
        files = {path.name: path.read_bytes()} if path.exists() else {}
        hub.add(repo_id, {"README.md": b"mine", **files})
        return f"hub:{repo_id}"
    is_model = not (path / "model_index.json").exists() and not [*path.glob("model.*h5")]
    folder = "model/" if is_model else ""
    files = {
        f"{folder}{one.relative_to(path).as_posix()}": one.read_bytes()
        for one in path.rglob("*")
        if one.is_file()
    }
    hub.add(repo_id, files)
    return f"hub:{repo_id}/model" if is_model else f"hub:{repo_id}"


def digests(name: str, files: Mapping[str, bytes]) -> Digests:
    """Files of a repo -> sha256, called as where they would be kept."""
    inside = "/" if "conversion.json" in files else ""
    return {
        f"{name}{inside}{path}" if inside else path: hashlib.sha256(content).hexdigest()
        for path, content in files.items()
    }


SAID = ("conversion.json", "README.md", ".gitattributes", ".residue.safetensors")
"""What names the sources, is the Hub's own, or lies beside a repository and is not pushed."""


def same_weights(made: Digests, expected: Digests) -> bool:
    """Whether two results are the same, as far as the Hub has them."""
    first, second = (
        {name: digest for name, digest in found.items() if not name.endswith(SAID)}
        for found in (made, expected)
    )
    return first == second
