"""What batches do beside converting to a repository: parity, inspecting, comparing with an earlier
output, the other layouts, and the page."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import weightport
from weightport.batch import outcome as said
from weightport.batch.gather import gather
from weightport.batch.jobs import Job, placed
from weightport.batch.outcome import Outcome
from weightport.batch.report import table, write_reports
from weightport.batch.run import run as run_job

from ..support.command import Run, run
from ..support.forks import run_command
from ..support.hub_server import HubServer
from ..support.page_server import chromium
from ..support.runners import warm_runners
from ..support.tiny_autoencoder import write_tiny_autoencoder
from .results import content_of, statuses

WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


def batch(*arguments: str | Path) -> Run:
    return run("batch", *arguments, "--workers", "2", "--no-sync")


def job_of(source: Path, folder: Path, **options: Any) -> Job:
    """The one job of a source, as the command makes it."""
    entries, _ = gather([str(source)], folder)
    (job,) = placed(entries, folder, {"sync": False, **options}, weightport.__version__)
    return job


def values_of(folder: Path) -> list[dict[str, Any]]:
    """The jobs of a folder, as `batch.json` has them."""
    jobs: list[dict[str, Any]] = json.loads((folder / "batch.json").read_text())["jobs"]
    return jobs


# --- parity ---------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A model that is quick to run."""
    return write_tiny_autoencoder(tmp_path / "tiny")


def test_parity_is_run_once_and_its_result_is_everywhere(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    job = job_of(tiny, out, parity=True)
    with pytest.MonkeyPatch.context() as patch:
        warm_runners(patch)
        first = run_job(job)
    assert (first.status, first.parity, first.error) == (said.CONVERTED, True, None)
    assert first.reports["parity"] == "tiny/parity.html"
    monkeypatch.setattr("weightport.batch.run.parity", lambda *_: pytest.fail("it ran again"))
    again = run_job(job)
    assert (again.status, again.parity) == (said.DONE, True)
    write_reports(out, [again])
    assert values_of(out)[0]["parity"] is True
    with (out / "batch.csv").open(newline="") as file:
        assert [row["parity"] for row in csv.DictReader(file)] == ["True"]
    page = (out / "batch.html").read_text()
    assert 'href="tiny/parity.html"' in page
    assert '<span class="badge good">passed</span>' in page
    assert "parity passed" in next(table([again]))


def test_parity_that_fails_fails_the_job(tiny: Path, tmp_path: Path) -> None:
    """Here since somebody changed a weight of the result, whose size is what it was."""
    job = job_of(tiny, tmp_path / "out")
    assert run_job(job).status == said.CONVERTED
    state = load_file(job.target / WEIGHTS)
    key = min(state)
    save_file({**state, key: state[key] + np.float32(1)}, job.target / WEIGHTS, {"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        warm_runners(patch)
        ended = run_job(replace(job, steps=replace(job.steps, parity=True)))
    assert (ended.status, ended.parity) == (said.FAILED, False)
    assert ended.is_bad
    assert "parity failed (" in ended.error
    assert "wrong weights" in ended.error
    assert (job.target / "parity.html").is_file()


def test_without_the_source_framework_the_job_fails_and_its_result_stays(
    sd1_keras: dict[str, Path], tmp_path: Path
) -> None:
    job = job_of(sd1_keras["text_encoder"], tmp_path / "out", parity=True)
    ended = run_job(job)
    assert (ended.status, ended.parity) == (said.FAILED, None)
    assert "keras-cv is not installed" in ended.error
    assert "name another interpreter with --source-python" in ended.error
    assert (ended.output, ended.family) == (job.output, "Stable Diffusion 1.x")
    assert ended.written == sum(map(len, content_of(job.target).values()))
    assert run_job(job_of(sd1_keras["text_encoder"], tmp_path / "out")).status == said.DONE


@pytest.mark.full
def test_parity_by_the_command(tiny: Path, sd1_keras: dict[str, Path], tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "tiny").symlink_to(tiny)
    (shelf / "text.h5").symlink_to(sd1_keras["text_encoder"])
    ended = batch(shelf, "-o", tmp_path / "out", "--parity", "--memory", "1GB")
    assert ended.status == 1
    assert statuses(tmp_path / "out") == {"tiny": "converted", "text": "failed"}
    assert "parity passed" in ended.out


# --- looking --------------------------------------------------------------------------------------


def test_inspecting_says_what_each_is_and_makes_nothing(
    sd1_keras: dict[str, Path], tmp_path: Path
) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "page.ckpt").write_text("<html>")
    (shelf / "unet.h5").symlink_to(sd1_keras["unet"])
    out = tmp_path / "out"
    ended = batch(shelf, "-o", out, "--do", "inspect")
    assert ended.status == 1
    assert statuses(out) == {"unet": "inspected", "page": "failed"}
    assert "an HTML page" in ended.out
    (found,) = (job for job in values_of(out) if job["name"] == "unet")
    assert found["family"] == "Stable Diffusion 1.x"
    assert found["parts"] == ["unet: Keras weights (.weights.h5)"]
    expected = weightport.inspect(shelf / "unet.h5").to_dict()
    assert found["found"]["inspected"] == json.loads(json.dumps([expected]))
    assert {path.name for path in out.iterdir()} == {"batch.json", "batch.csv", "batch.html"}


def test_inspecting_what_a_name_on_the_hub_stands_for(
    hub: HubServer, sd1_keras: dict[str, Path], tmp_path: Path
) -> None:
    """The weights of a repo that is no diffusers repo."""
    hub.add("org/keras", {"decoder.h5": sd1_keras["decoder"].read_bytes(), "README.md": b"x"})
    arguments = ("hub:org/keras", "-o", tmp_path / "out", "--do", "inspect", "--workers", "1")
    ended = run_command("batch", *arguments, environment=hub.environment(tmp_path / "home"))
    assert ended.status == 0, ended.out
    assert values_of(tmp_path / "out")[0]["parts"] == ["decoder: Keras weights (.weights.h5)"]


# --- and back -------------------------------------------------------------------------------------

TARGETS = {"diffusers": "model", "ldm": "model.safetensors", "kerascv": "model.weights.h5"}


@pytest.mark.parametrize("to", TARGETS)
def test_every_layout_is_written_as_alone_and_compared_later(
    to: str, sd1_repo: Path, sd1_keras: dict[str, Path], tmp_path: Path
) -> None:
    """Done jobs are skipped, whatever the result is; a diff finds it, and what has changed in it."""
    shelf = tmp_path / "model"
    if to == "kerascv":
        shelf.symlink_to(sd1_repo / "vae")
    else:
        shelf.mkdir()
        for part in ("decoder", "image_encoder"):
            (shelf / f"{part}.h5").symlink_to(sd1_keras[part])
    job = job_of(shelf, tmp_path / "out", to=to)
    made = run_job(job)
    assert (made.status, made.output, made.becomes) == (said.CONVERTED, TARGETS[to], to)
    (tmp_path / "alone").mkdir()
    weightport.convert(job.sources, tmp_path / "alone" / TARGETS[to], **job.options)
    assert results(tmp_path / "out") == content_of(tmp_path / "alone")
    assert run_job(job).status == said.DONE

    for other in ({"to": to}, {}):  # its record says where the result is
        compared = run_job(job_of(shelf, tmp_path / "out", do="diff", **other))
        assert (compared.status, compared.is_bad) == (said.SAME, False), compared
        assert compared.found["compared"]["equal"] == 248
    change_a_number(tmp_path / "out")
    compared = run_job(job_of(shelf, tmp_path / "out", do="diff", to=to))
    assert (compared.status, compared.is_bad) == (said.DIFFERENT, True)
    (difference,) = compared.found["compared"]["differences"]
    assert (difference["kind"], difference["component"]) == ("value", "vae")
    assert f"max abs {difference['max_abs']:.2e}" in " ".join(compared.notes)


def results(folder: Path) -> dict[str, bytes]:
    """What a batch made in a folder, its own files aside."""
    found = content_of(folder).items()
    return {name: content for name, content in found if not name.startswith((".batch/", "batch."))}


def change_a_number(folder: Path) -> None:
    """In the largest result."""
    files = [path for path in folder.rglob("model*") if path.suffix in (".h5", ".safetensors")]
    files += folder.rglob("diffusion_pytorch_model.safetensors")
    file = max(files, key=lambda path: path.stat().st_size)
    if file.suffix == ".h5":
        with h5py.File(file, "r+") as opened:
            found: list[h5py.Dataset] = []
            opened.visititems(lambda _, one: found.append(one) if hasattr(one, "dtype") else None)
            found[0][...] += 1
        return
    state = load_file(file)
    key = next(key for key in state if key.endswith("conv_out.bias"))
    save_file({**state, key: state[key] + np.float32(1)}, file, {"format": "pt"})


def test_a_diff_needs_an_earlier_output(sd1_keras: dict[str, Path], tmp_path: Path) -> None:
    ended = run_job(job_of(sd1_keras["decoder"], tmp_path / "out", do="diff"))
    assert ended.status == said.FAILED
    assert f"{tmp_path}/out/model.decoder: no such file" in ended.error


# --- the page -------------------------------------------------------------------------------------


@pytest.mark.browser
def test_the_page_is_sorted_by_a_click(tmp_path: Path) -> None:
    """Numbers as numbers, names as people count, and back at the second click."""
    sizes = {"a10": 2_000, "a9": 900_000, "b<i>1</i>": 30_000_000}
    outcomes = [
        Outcome(name, said.CONVERTED, read=size, seconds=size / 1000)
        for name, size in sizes.items()
    ]
    write_reports(tmp_path, [*outcomes, Outcome("c", said.FAILED, error="<script>x</script>")])
    with chromium() as browser:
        page = browser.new_page()
        page.goto((tmp_path / "batch.html").as_uri())

        def order() -> list[str]:
            return [str(text) for text in page.locator("tbody td:first-child").all_inner_texts()]

        def press(head: str) -> list[str]:
            page.get_by_role("button", name=head, exact=True).press("Enter")
            return order()

        assert press("job") == ["a9", "a10", "b<i>1</i>", "c"]
        assert press("read") == ["c", "a10", "a9", "b<i>1</i>"]
        head = page.locator("th", has=page.get_by_role("button", name="read", exact=True))
        assert head.get_attribute("aria-sort") == "ascending"
        assert press("read") == ["b<i>1</i>", "a9", "a10", "c"]
        assert head.get_attribute("aria-sort") == "descending"
        assert page.locator("th[aria-sort]").count() == 1
        page.get_by_role("button", name="status", exact=True).click()
        assert order()[-1] == "c"
        assert page.locator("tbody i, tbody script").count() == 0
