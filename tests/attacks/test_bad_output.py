"""Outputs that cannot or must not be written: one line that names them; what was there stays,
nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..support.command import Run, assert_refused, listing, run


@pytest.fixture
def source(sd1_keras: dict[str, Path]) -> Path:
    return sd1_keras["image_encoder"]


def not_written(place: Path, output: Path, reason: str, *arguments: str | Path) -> None:
    before = listing(place)
    assert_refused(run("convert", *arguments, "-o", output), output, reason)
    assert listing(place) == before


# ---- something is there already


def folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("three years of work")


def empty_folder(path: Path) -> None:
    path.mkdir()


def file(path: Path) -> None:
    path.write_text("three years of work", encoding="utf-8")


def link_to_file(path: Path) -> None:
    file(path.with_name("target"))
    path.symlink_to("target")


def link_to_folder(path: Path) -> None:
    folder(path.with_name("target"))
    path.symlink_to("target")


def dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def fifo(path: Path) -> None:
    os.mkfifo(path)


EXISTING = (folder, empty_folder, file, link_to_file, link_to_folder, dangling_link, fifo)
LAYOUTS = {"diffusers": "out", "kerascv": "out.h5"}


@pytest.mark.parametrize("make", EXISTING)
@pytest.mark.parametrize("to", LAYOUTS)
def test_the_output_exists(place: Path, source: Path, make: Any, to: str) -> None:
    make(place / LAYOUTS[to])
    not_written(place, place / LAYOUTS[to], "already exists.*--overwrite", source, "--to", to)


@pytest.mark.parametrize("make", [made for made in EXISTING if made is not empty_folder])
def test_overwrite_replaces_only_what_we_wrote(place: Path, source: Path, make: Any) -> None:
    make(place / "out")
    not_written(place, place / "out", "not overwritten", source, "--overwrite")


@pytest.mark.parametrize("make", [made for made in EXISTING if made is not file])
def test_overwrite_of_a_keras_file_replaces_only_files(
    place: Path, source: Path, make: Any
) -> None:
    make(place / "out.h5")
    not_written(
        place, place / "out.h5", "not overwritten", source, "--overwrite", "--to", "kerascv"
    )


def test_overwrite_replaces_an_earlier_output(place: Path, source: Path) -> None:
    output = place / "out"
    assert run("convert", source, "-o", output).status == 0
    (output / "unet").mkdir()
    assert run("convert", source, "-o", output).status == 1
    assert run("convert", source, "-o", output, "--overwrite").status == 0
    assert not (output / "unet").exists()
    assert sorted(path.name for path in place.iterdir()) == ["cwd", "out"]


def test_a_failed_overwrite_keeps_the_earlier_output(place: Path, source: Path) -> None:
    assert run("convert", source, "-o", place / "out").status == 0
    damaged = place / "damaged.h5"
    damaged.write_bytes(source.read_bytes()[:-1])
    before = listing(place)
    assert_refused(
        run("convert", damaged, "-o", place / "out", "--overwrite"), damaged, "truncated"
    )
    assert listing(place) == before


# ---- the output and the input are in each other's way


def test_the_output_is_the_input(place: Path, source: Path) -> None:
    copy = place / "model.h5"
    shutil.copyfile(source, copy)
    for more in ([], ["--overwrite"], ["--overwrite", "--to", "kerascv"], ["--dry-run"]):
        not_written(place, copy, "the output is the input", copy, *more)


def test_the_output_is_the_input_by_another_name(place: Path, source: Path) -> None:
    copy, link, hard = place / "model.h5", place / "link.h5", place / "hard.h5"
    shutil.copyfile(source, copy)
    link.symlink_to(copy)
    hard.hardlink_to(copy)
    for name in (link, hard, place / "cwd" / ".." / "model.h5"):
        not_written(place, name, "the output is the input", copy, "--overwrite", "--to", "kerascv")


def test_the_output_lies_inside_the_input(place: Path, sd1_repo: Path) -> None:
    repo = place / "repo"
    shutil.copytree(sd1_repo, repo, ignore=shutil.ignore_patterns("unet", "text_encoder"))
    not_written(place, repo / "out", "the output lies inside the input", repo)
    not_written(place, repo / "vae" / "out", "the output lies inside the input", repo)
    not_written(place, repo, "the output is the input", repo, "--overwrite")


def test_the_output_lies_inside_the_base(place: Path, source: Path, sd1_repo: Path) -> None:
    repo = place / "repo"
    shutil.copytree(sd1_repo, repo)
    not_written(place, repo / "out", "the output lies inside the input", source, "--base", repo)
    not_written(place, repo, "the output is the input", source, "--base", repo, "--overwrite")


def test_the_output_contains_the_input(place: Path, source: Path) -> None:
    shutil.copyfile(source, place / "model.h5")
    not_written(place, place, "the output contains the input", place / "model.h5", "--overwrite")


# ---- the place does not take it


@pytest.mark.parametrize("to", LAYOUTS)
def test_the_parent_is_missing(place: Path, source: Path, to: str) -> None:
    not_written(
        place,
        place / "a" / "b" / LAYOUTS[to],
        "folder it should go into does not exist",
        source,
        "--to",
        to,
    )


@pytest.mark.parametrize("to", LAYOUTS)
def test_the_parent_is_a_file(place: Path, source: Path, to: str) -> None:
    (place / "file").write_text("")
    not_written(place, place / "file" / LAYOUTS[to], "is not a folder", source, "--to", to)


def test_the_name_is_too_long(place: Path, source: Path) -> None:
    not_written(place, place / ("x" * 255), "the name is too long", source)


@pytest.mark.parametrize("name", ["out.keras", "out", "out.safetensors"])
def test_a_keras_file_has_a_known_suffix(place: Path, source: Path, name: str) -> None:
    not_written(place, place / name, "name the Keras file", source, "--to", "kerascv")


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred"])
def test_a_name_cannot_write_to_the_terminal(place: Path, source: Path, name: str) -> None:
    (place / name).mkdir()
    assert_refused(run("convert", source, "-o", place / name), "", "already exists")
    ended = run("convert", source, "-o", place / f"{name} too")
    assert ended.status == 0
    assert all(line.isprintable() for line in ended.out.split("\n"))
    assert all(
        line.startswith(("vae ", "note: ", "lacks: ", "wrote ")) for line in ended.out.splitlines()
    )


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Root may write anywhere, so it becomes somebody else."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder where others may look in, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("to", LAYOUTS)
def test_the_parent_is_read_only(open_place: Path, source: Path, to: str) -> None:
    copy, output = open_place / "model.weights.h5", open_place / "closed" / LAYOUTS[to]
    shutil.copyfile(source, copy)
    copy.chmod(0o644)
    output.parent.mkdir()
    output.parent.chmod(0o555)
    arguments: list[str | Path] = ["convert", copy, "-o", output, "--to", to]
    assert run(*arguments, "--dry-run").status == 0  # imports what it needs
    before = listing(open_place)
    with nobody():
        ended = run(*arguments)
    assert_refused(ended, output, "cannot be written, no permission to write in its folder")
    assert listing(open_place) == before


def test_the_input_may_not_be_read(open_place: Path, source: Path) -> None:
    copy = open_place / "model.weights.h5"
    shutil.copyfile(source, copy)
    copy.chmod(0)
    assert run("convert", source, "-o", open_place / "out", "--dry-run").status == 0
    with nobody():
        ended = run("convert", copy, "-o", open_place / "out")
    assert_refused(ended, copy, "cannot be opened .Permission denied")


# ---- the disk is full


@contextlib.contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("nbytes", [0, 100, 4096, 1 << 20, 5_000_000])
@pytest.mark.parametrize("to", LAYOUTS)
def test_files_may_not_grow(place: Path, source: Path, nbytes: int, to: str) -> None:
    before, output = listing(place), place / LAYOUTS[to]
    with files_of_at_most(nbytes):
        ended = run("convert", source, "-o", output, "--to", to)
    assert_refused(ended, output, "cannot be written, files this large are not allowed")
    assert listing(place) == before


@pytest.mark.parametrize("suffix", [".weights.h5", ".h5"])
def test_the_last_byte_does_not_fit(place: Path, source: Path, suffix: str) -> None:
    """libhdf5 keeps its own structures to the end, and crashes when they cannot be written."""
    assert run("convert", source, "-o", place / f"whole{suffix}", "--to", "kerascv").status == 0
    before, output = listing(place), place / f"out{suffix}"
    with files_of_at_most((place / f"whole{suffix}").stat().st_size - 1):
        ended = run("convert", source, "-o", output, "--to", "kerascv")
    assert_refused(ended, output, "cannot be written, files this large are not allowed")
    assert listing(place) == before


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    disk = place / "disk"
    disk.mkdir()
    mount: list[str | Path] = ["mount", "-t", "tmpfs", "-o", "size=8m", "weightport-test", disk]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


DISKS = {
    "diffusers": (0, 100_000, 5_000_000, 5_500_000, 6_000_000),
    "kerascv": (0, 4096, 100_000, 1_000_000, 5_000_000),
}


@pytest.mark.parametrize(
    ("to", "free"), [(to, free) for to, disks in DISKS.items() for free in disks]
)
def test_the_disk_is_full(place: Path, source: Path, small_disk: Path, to: str, free: int) -> None:
    """The weights take 5.3 MB: smaller disks are refused or full during the weights, larger ones
    after them."""
    (small_disk / "ballast").write_bytes(bytes((8 << 20) - free))
    before, output = listing(place), small_disk / LAYOUTS[to]
    reason = "the disk is full|of disk space, but only"
    assert_refused(run("convert", source, "-o", output, "--to", to), small_disk, reason)
    assert listing(place) == before


# ---- any step can fail, or be the last


def disturbed(mode: str, output: Path, *sources: Path) -> list[dict[str, Any]]:
    """What the runs of `tests/support/interrupt.py` came to; the last one was left alone, and must have
    succeeded."""
    script = Path(__file__).parents[1] / "support" / "interrupt.py"
    ended = subprocess.run(
        [sys.executable, script, mode, output, *sources],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    *runs, last = [json.loads(line) for line in ended.stdout.splitlines()]
    assert (last["status"], last["err"], last["state"]) == (0, "", "new")
    assert set(last["left"]) <= {output.name}, "debris that the next run did not sweep"
    return runs


@pytest.mark.parametrize(("to", "steps"), [("diffusers", 25), ("kerascv", 4)])
def test_nothing_is_left_by_any_failing_step(
    place: Path, source: Path, to: str, steps: int
) -> None:
    """Every file, folder, sync and move in turn meets a full disk."""
    output = place / LAYOUTS[to]
    runs = disturbed("fail", output, source)
    assert len(runs) >= steps
    for ended in runs:
        assert_refused(
            Run(ended["status"], "", ended["err"]), output, "cannot be written, the disk is full"
        )
        assert (ended["left"], ended["state"]) == ([], "none")


def test_killed_before_any_step(place: Path, source: Path) -> None:
    """What stands under the output's name is whole, or nothing does; the next run sweeps what the
    killed one left."""
    runs = disturbed("kill", place / "out", source)
    assert len(runs) >= 10
    for ended in runs:
        assert (ended["status"], ended["state"] in ("none", "new")) == (-signal.SIGKILL, True), (
            ended
        )
        assert len(set(ended["left"]) - {"out"}) <= 1, "debris of earlier runs"


def test_killed_at_any_time(place: Path, sd1_keras: dict[str, Path]) -> None:
    """A kill may also come late, when the output already stands, whole, and only the temp folder
    has yet to go."""
    runs = disturbed(
        "kill-by-time", place / "out", sd1_keras["decoder"], sd1_keras["image_encoder"]
    )
    killed = [ended["state"] for ended in runs if ended["status"]]
    assert "none" in killed, "no run was killed at work: the test shows nothing"
    assert set(killed) <= {"none", "new"}
    assert all(ended["state"] == "new" for ended in runs if ended["status"] == 0), runs


def test_killed_while_it_overwrites(place: Path, source: Path) -> None:
    """The old output stands until the new one does."""
    assert run("convert", source, "-o", place / "out", "--dtype", "float16").status == 0
    runs = disturbed("kill", place / "out", source)
    assert len(runs) >= 10
    assert {ended["state"] for ended in runs} <= {"old", "new"}
