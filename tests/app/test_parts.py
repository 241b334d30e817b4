"""The parts of the page that need no browser: questions, archives, the queue, jobs and tasks."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import weightport
from weightport.app.desk import Desk, Step, output_name
from weightport.app.jobs import Job, Queue
from weightport.app.limits import AT_HOME, FOR_STRANGERS
from weightport.app.report import Report
from weightport.app.sessions import Session, Sessions
from weightport.app.tasks.archives import opened
from weightport.app.tasks.conversion import questions
from weightport.app.tasks.images import generate, settings
from weightport.app.tasks.inspection import tree
from weightport.app.tasks.schedulers import schedulers
from weightport.errors import ConversionError
from weightport.recipe import read_recipe

from ..support.command import run
from ..support.page_server import SPACE


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files lie where those of a visit do: in a folder that is deleted."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


@pytest.fixture
def report() -> Report:
    return Report(io.StringIO())


@pytest.fixture
def sessions() -> Iterator[Sessions]:
    sessions = Sessions(FOR_STRANGERS)
    yield sessions
    sessions.close_all()
    assert not sessions.root.exists()


@pytest.fixture
def strangers(sessions: Sessions) -> Desk:
    return Desk(sessions, FOR_STRANGERS, public=True)


def test_options_are_asked_for_with_what_names_them() -> None:
    first = "the same in A and B: --family chooses"
    second = "give --lora-alpha to merge them, or with --to kohya to take them out"
    found = questions([first, second, first, "--no-such-option"])
    assert found == {"family": [first], "lora_alpha": [second], "to": [second]}


def test_a_tree_has_every_tensor() -> None:
    tensors = [("a.b.weight", 2, "F32", 8), ("a.c", 1, "F32", 4), ("d", 1, "F16", 2)]
    first, second = tree(tensors)
    assert (first["name"], first["count"], first["size"]) == ("a", 3, "12 B")
    assert [below["name"] for below in first["below"]] == ["b.weight", "c"]
    assert second["name"] == "d"
    tree([("." * 100_000, 1, "F32", 4)] * 2)  # no deeper than a page is


def test_an_archive_is_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "made.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("repo/unet/config.json", "{}")
    folder = Path(opened(str(path)))
    assert folder.name == "repo"
    assert (folder / "unet" / "config.json").read_text() == "{}"
    assert opened("hub:org/name") == "hub:org/name"


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "a/../../escaped", "a\nb"])
def test_an_archive_names_nothing_outside_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "hostile.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(ConversionError, match="names a file outside it"):
        opened(str(path))
    assert list(tmp_path.iterdir()) == [path]


def test_an_archive_does_not_grow(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(50 << 20))
    with pytest.raises(ConversionError, match="too many for its own size"):
        opened(str(path))


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc/passwd", "-o", "x" * 200, "a\0b"])
def test_a_result_has_a_plain_name(name: str) -> None:
    with pytest.raises(ConversionError, match="not a name for a result"):
        output_name(name)


@pytest.mark.parametrize("place", ["/etc/passwd", "..", "../x/y", "~", "hub:a/b/../../c", "tests"])
def test_strangers_name_no_path(strangers: Desk, place: str) -> None:
    with pytest.raises(ConversionError, match="files of this server are not read"):
        strangers.place(place)


def test_what_strangers_name_is_on_the_hub_whatever_lies_here(
    strangers: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert strangers.place("org/name") == "hub:org/name"
    at_home = Desk(strangers.sessions, AT_HOME, public=False)
    assert at_home.place("org/name") == str(tmp_path / "org" / "name")


def test_a_visit_has_only_its_own(sessions: Sessions, tmp_path: Path) -> None:
    (tmp_path / "model.h5").write_text("x")
    arrived = sessions.arrived(tmp_path / "model.h5")
    mine, other = sessions.of("mine"), sessions.of("other")
    sessions.take(mine, str(arrived))
    assert mine.file("model.h5").read_text() == "x"
    for name in ("model.h5", "../../x", str(mine.file("model.h5"))):
        with pytest.raises(ConversionError, match="you uploaded no such file"):
            other.file(name)
    for path in (arrived, "/etc/passwd", mine.file("model.h5")):
        with pytest.raises(ConversionError, match="did not arrive"):
            sessions.take(other, str(path))
    sessions.close("mine")
    assert [path for path in sessions.root.rglob("*") if path.is_file()] == []


def test_a_silent_visit_ends(sessions: Sessions) -> None:
    session = sessions.of("silent")
    session.seen -= FOR_STRANGERS.idle_seconds + 1
    sessions.expire()
    assert not session.folder.exists()


def test_what_a_killed_server_left_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / "weightport-app-999999999-x"
    left.mkdir()
    running = tmp_path / f"weightport-app-{os.getpid()}-x"
    running.mkdir()
    Sessions(AT_HOME).close_all()
    assert list(tmp_path.iterdir()) == [running]


def test_one_heavy_job_at_a_time_in_order(sessions: Sessions) -> None:
    queue = Queue(waiting=2)
    jobs = [Job(sessions.of(name), "inspect", {}) for name in "abcd"]
    for job in jobs[:3]:
        queue.join(job)
    assert [queue.ahead(job) for job in jobs[:3]] == [0, 1, 2]
    with pytest.raises(ConversionError, match="2 jobs wait already"):
        queue.join(jobs[3])
    queue.leave(jobs[1])  # who cancels lets those behind move up
    queue.leave(jobs[0])
    assert queue.ahead(jobs[2]) == 0


def steps(desk: Desk, arguments: Callable[[Session], dict[str, Any]]) -> list[Step]:
    """What a page is told of an inspection."""

    async def all_steps() -> list[Step]:
        return [step async for step in desk.work("page", "inspect", arguments)]

    return asyncio.run(all_steps())


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"seconds": -1}, "took more than -1 seconds, which is the limit here"),
        ({"session_bytes": -1}, "takes more than -1 bytes, which is the limit here"),
    ],
)
def test_a_job_that_takes_too_much_is_ended(
    sessions: Sessions, limits: dict[str, int], reason: str
) -> None:
    desk = Desk(sessions, dataclasses.replace(FOR_STRANGERS, **limits), public=True)
    last = steps(desk, lambda session: {"sources": []})[-1]
    assert reason in last.status
    assert last.result is None
    assert sessions.of("page").job is None


def test_a_job_runs_nothing_of_an_upload_and_knows_no_secret(
    strangers: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Modules of its own name lie in the folder that it works in."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", *sys.path]))
    ran = tmp_path / "ran"

    def arguments(session: Session) -> dict[str, Any]:
        for name in ("json.py", "numpy.py", "sitecustomize.py", "weightport.py", "signal.py"):
            (session.uploads / name).write_text(f"open({str(ran)!r}, 'w')")
        return {"sources": ["json.py"]}

    last = steps(strangers, arguments)[-1]
    assert not ran.exists()
    assert last.result["files"][0]["error"] == "json.py: a text file, not a checkpoint"
    environment = strangers._environment(strangers.sessions.of("page"))
    assert not [name for name in environment if "TOKEN" in name]
    assert environment["HF_HOME"].startswith(str(strangers.sessions.root))


def test_what_goes_wrong_is_escaped(strangers: Desk) -> None:
    def arguments(session: Session) -> dict[str, Any]:
        raise ConversionError("<script>alert(1)</script>")

    (last,) = steps(strangers, arguments)
    assert "<script>" not in last.status
    assert "&lt;script&gt;" in last.status


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "weightport.app.framework", raising=False)
    ended = run("app", "--no-browser")
    assert ended.err == 'error: the page needs Gradio; run `pip install "weightport[app]"`\n'
    assert ended.status == 1


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory, sd1_keras: dict[str, Path]) -> Path:
    """A whole narrow repository."""
    folder = tmp_path_factory.mktemp("whole") / "repo"
    weightport.convert(list(sd1_keras.values()), folder, image_size=64)
    return folder


def test_an_image_tells_no_path_of_the_server(
    repo: Path, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.make_archive(str(tmp_path / "packed"), "zip", repo.parent)
    monkeypatch.chdir(tmp_path)
    told = {"prompt": "a fox", "steps": 1, "seed": 5}
    asked = {"repo": "packed.zip", "name": "packed", "recipe": told, "folder": str(tmp_path)}
    made = generate(asked, report)
    assert read_recipe(Path(made["image"])).repo == "packed"
    assert tempfile.gettempdir().encode() not in Path(made["image"]).read_bytes()
    found = settings({"source": made["image"]}, report)["settings"]
    assert (found["prompt"], found["steps"], found["seed"]) == ("a fox", 1, 5)


def test_schedulers_give_a_report(repo: Path, report: Report, tmp_path: Path) -> None:
    options = {"schedulers": ["ddim"], "steps": [1], "reference_steps": 2, "size": (64, 64)}
    asked = {"repo": str(repo), "prompts": ["a fox"], "folder": str(tmp_path), "options": options}
    found = schedulers(asked, report)
    assert "<svg" in Path(found["page"]).read_text(encoding="utf-8")
    assert all(Path(file).is_file() for file in found["files"])


def test_the_space_is_whole() -> None:
    """Its header is what the Hub asks for, and it needs what the page needs."""
    _, header, _ = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    said = yaml.safe_load(header)
    assert said["sdk"] == "gradio"
    assert (SPACE / said["app_file"]).is_file()
    assert said["hf_oauth"] is True
    assert len(said["short_description"]) <= 60
    pinned = (SPACE.parent / "scripts" / "constraints" / "test.txt").read_text(encoding="utf-8")
    assert f"gradio=={said['sdk_version']}\n" in pinned
    assert "weightport[app" in (SPACE / "requirements.txt").read_text(encoding="utf-8")
