"""`weightport batch` in processes here: every job once, whatever happens to some."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

import pytest

import weightport

from ..support.command import COMMAND, Run, heed_interrupts, listing, run
from .results import (
    at_work,
    content_of,
    finished,
    killed_by_3,
    left_in_part,
    statuses,
    wait_for,
)

PARTS = ("decoder", "image_encoder")  # the smallest
OPTIONS = ("--workers", "2", "--no-sync")


def batch(*arguments: str | Path) -> Run:
    return run("batch", *arguments, *OPTIONS)


def lay(shelf: Path, keras: dict[str, Path]) -> Path:
    """Three jobs that can be done, and two that cannot."""
    (shelf / "pair").mkdir(parents=True)
    for part in PARTS:
        shutil.copyfile(keras[part], shelf / "pair" / f"{part}.h5")
        shutil.copyfile(keras[part], shelf / f"{part}-of-{part}.h5")
    (shelf / "empty.ckpt").write_bytes(b"")
    (shelf / "page.safetensors").write_text("<html>")
    return shelf


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, sd1_keras: dict[str, Path]) -> Path:
    """Sources, not to be written to."""
    return lay(tmp_path_factory.mktemp("shelf") / "shelf", sd1_keras)


@pytest.fixture(scope="module")
def ended(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A batch and its folder, not to be written to."""
    folder = tmp_path_factory.mktemp("results") / "out"
    return batch(shelf, "-o", folder), folder


@pytest.fixture
def done(ended: tuple[Run, Path], tmp_path: Path) -> Path:
    """A copy of the folder of a batch, at the same path for every test that changes it."""
    return shutil.copytree(ended[1], tmp_path / "out")


def test_what_can_be_done_is_done_and_the_rest_is_named(
    ended: tuple[Run, Path], shelf: Path
) -> None:
    out, folder = ended
    assert out.status == 1
    assert out.err == ""
    assert statuses(folder) == {
        "decoder-of-decoder": "converted",
        "image_encoder-of-image_encoder": "converted",
        "pair": "converted",
        "empty": "failed",
        "page": "failed",
    }
    assert f"{shelf}/empty.ckpt: the file is empty" in out.out
    assert "an HTML page, probably a failed download" in out.out
    assert out.out.endswith(f"5 jobs: 3 converted, 2 failed\nwrote {folder}/batch.json\n")


def test_the_same_bytes_as_alone(ended: tuple[Run, Path], shelf: Path, tmp_path: Path) -> None:
    sources = sorted((shelf / "pair").iterdir())
    weightport.convert(sources, tmp_path / "alone", sync=False)
    assert content_of(ended[1] / "pair") == content_of(tmp_path / "alone")


def test_the_reports_say_the_same(ended: tuple[Run, Path]) -> None:
    folder = ended[1]
    jobs = json.loads((folder / "batch.json").read_text())["jobs"]
    with (folder / "batch.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    page = (folder / "batch.html").read_text()
    assert [row["name"] for row in rows] == [job["name"] for job in jobs]
    for job, row in zip(jobs, rows, strict=True):
        assert row["status"] == job["status"]
        assert row["written"] == str(job["written"] or "")
        assert f"<code>{job['name']}</code>" in page
    pair = next(job for job in jobs if job["name"] == "pair")
    assert pair["family"] == "Stable Diffusion 1.x"
    assert pair["reports"] == {"conversion": "pair/conversion.json"}
    assert 'href="pair/conversion.json"' in page
    assert pair["written"] == sum(map(len, content_of(folder / "pair").values()))


def test_done_jobs_are_skipped(done: Path, shelf: Path) -> None:
    before = listing(done / "pair")
    assert batch(shelf, "-o", done).status == 1
    assert sorted(statuses(done).values()) == ["done before"] * 3 + ["failed"] * 2
    assert listing(done / "pair") == before


def test_results_of_convert_are_done(shelf: Path, tmp_path: Path) -> None:
    """What counts is `conversion.json`, whoever wrote it."""
    (tmp_path / "out").mkdir()
    weightport.convert(shelf / "pair" / "decoder.h5", tmp_path / "out" / "decoder", sync=False)
    assert batch(shelf / "pair" / "decoder.h5", "-o", tmp_path / "out").status == 0
    assert statuses(tmp_path / "out") == {"decoder": "done before"}


def rewritten(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


CHANGES: dict[str, Callable[[Path], object]] = {
    "source": lambda report: rewritten(
        report, lambda content: content["sources"][0]["files"].update({"decoder.h5": "0" * 64})
    ),
    "table": lambda report: rewritten(
        report, lambda content: content["tables"].update(kerascv_decoder="0" * 64)
    ),
    "option": lambda report: rewritten(
        report, lambda content: content["options"].update(dtype="float16")
    ),
    "lost": lambda report: (report.parent / "vae" / "config.json").unlink(),
    "cut": lambda report: os.truncate(
        report.parent / "vae" / "diffusion_pytorch_model.safetensors", 1000
    ),
    "damaged": lambda report: report.write_text("{"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_the_same_is_not_done(change: str, done: Path, shelf: Path) -> None:
    """It is said, and replaced if the user says so."""
    good = content_of(done / "pair")
    CHANGES[change](done / "pair" / "conversion.json")
    ended = batch(shelf / "pair/*", "-o", done)
    assert ended.status == 1
    assert "already exists, of other sources, tables or options; --overwrite" in ended.out
    assert batch(shelf / "pair/*", "-o", done, "--overwrite").status == 0
    assert content_of(done / "pair") == good


# --- whatever happens -----------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path, sd1_keras: dict[str, Path]) -> Path:
    """Jobs that take a while."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(8):
        shutil.copyfile(sd1_keras["image_encoder"], folder / f"{number}.h5")
    return folder


def started(shelf: Path, out: Path) -> Popen[bytes]:
    """A batch in a process of its own, which has a job by now or has ended."""
    process = Popen(
        [*COMMAND, "batch", shelf, "-o", out, *OPTIONS], stdout=DEVNULL, preexec_fn=heed_interrupts
    )
    wait_for(lambda: at_work(out) or process.poll() is not None)
    return process


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split()[2]
    except OSError:
        return False


def test_it_goes_on_whatever_happens(many: Path, tmp_path: Path) -> None:
    """A worker is killed, the batch is interrupted, then killed; two at once do the rest."""
    out = tmp_path / "out"
    first = started(many, out)
    os.kill(at_work(out)[0], signal.SIGKILL)
    wait_for(lambda: finished(out))
    assert first.poll() is None, "one killed worker ends no batch"
    first.send_signal(signal.SIGINT)
    assert first.wait() == 130
    assert left_in_part(out) == []

    second = started(many, out)
    workers = at_work(out)
    second.kill()
    second.wait()
    wait_for(lambda: not any(map(is_running, workers)))
    assert left_in_part(out) == []
    before = finished(out)
    assert len(before) < 8, "it was killed too late to tell"

    pair = [started(many, out) for _ in range(2)]
    assert [one.wait() for one in pair] == [0, 0]
    assert left_in_part(out) == []
    after = finished(out)
    assert after.keys() == {str(number) for number in range(8)}
    assert {name: after[name] for name in before} == before, "nothing is done twice"


def test_a_job_that_kills_its_process_is_named(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are done."""
    monkeypatch.setattr("weightport.batch.work._run", killed_by_3)
    ended = batch(many, "-o", tmp_path / "out")
    assert ended.status == 1
    found = statuses(tmp_path / "out")
    assert found.pop("3") == "failed"
    assert set(found.values()) == {"converted"}
    assert "3: its process was killed, twice; is there enough memory?" in ended.out
    assert left_in_part(tmp_path / "out") == []
