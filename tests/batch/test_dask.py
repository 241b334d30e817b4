"""`weightport batch --dask` on a cluster of processes: a scheduler and three workers on loopback."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, Popen

import pytest

import weightport

from ..support.command import COMMAND, Run, assert_refused, run
from .cluster import Cluster
from .results import at_work, content_of, finished, left_in_part, statuses, wait_for

pytest.importorskip("distributed")

JOBS = 8
SECONDS = 120  # for anything


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.close()


@pytest.fixture
def shelf(tmp_path: Path, sd1_keras: dict[str, Path]) -> Path:
    """Jobs, of which the last cannot be done."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for number in range(JOBS):
        shutil.copyfile(sd1_keras["decoder"], folder / f"{number}.h5")
    (folder / "broken.ckpt").write_bytes(b"")
    return folder


def command(cluster: Cluster, shelf: Path, folder: Path) -> list[str]:
    options = ["-o", str(folder), "--dask", cluster.address, "--no-sync"]
    return [*COMMAND, "batch", str(shelf), *options]


def test_a_worker_and_the_client_are_killed(
    cluster: Cluster, shelf: Path, tmp_path: Path, sd1_keras: dict[str, Path]
) -> None:
    """Nothing is lost, nothing is done twice, and nothing is left in part."""
    out = tmp_path / "out"
    first = Popen(command(cluster, shelf, out), stdout=DEVNULL)
    wait_for(lambda: at_work(out))
    victim = at_work(out)[0]
    assert victim in [worker.pid for worker in cluster.workers]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(finished(out)) >= 2)
    first.kill()
    first.wait()
    before = finished(out)
    assert len(before) < JOBS, "the client was killed too late to tell"

    ended = subprocess.run(
        command(cluster, shelf, out), capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert ended.returncode == 1, ended.stderr
    found = statuses(out)
    assert found.pop("broken") == "failed"
    assert len(found) == JOBS
    assert set(found.values()) <= {"converted", "done before"}
    assert {found[name] for name in before} == {"done before"}
    after = finished(out)
    assert {name: after[name] for name in before} == before
    assert left_in_part(out) == []
    weightport.convert(shelf / "0.h5", tmp_path / "alone", sync=False)
    expected = content_of(tmp_path / "alone")
    for number in range(JOBS):
        content = content_of(out / str(number))
        assert content.keys() == expected.keys()
        for name in expected.keys() - {"conversion.json", "README.md"}:  # they name the source
            assert content[name] == expected[name]


@pytest.mark.full
def test_memory_that_no_worker_has_is_not_waited_for(
    cluster: Cluster, shelf: Path, tmp_path: Path
) -> None:
    ended = subprocess.run(
        [*command(cluster, shelf, tmp_path / "out"), "--memory", "1GB"],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    run_ = Run(ended.returncode, ended.stdout, ended.stderr)
    assert_refused(run_, cluster.address, "start them with `dask worker --resources")


def test_without_dask_its_extra_is_named(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    ended = run("batch", shelf, "-o", tmp_path / "out", "--dask", "local")
    assert_refused(ended, "--dask", r'run `pip install "weightport\[dask\]"`')
