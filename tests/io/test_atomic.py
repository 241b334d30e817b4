import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from weightport.errors import ConversionError
from weightport.io import atomic
from weightport.io.atomic import check_apart, check_space


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(folder: Path, text: str = "new") -> None:
    (folder / "unet").mkdir()
    (folder / "unet" / "w.safetensors").write_text(text)
    (folder / "model_index.json").write_text("{}")


def stage(target: Path, *actions: Callable[[Path], None], overwrite: bool = False) -> None:
    """A run: stage a folder and do things in it."""
    with atomic.folder(target, overwrite) as folder:
        for action in actions:
            action(folder)


def stop(error: type[BaseException]) -> Callable[[Path], None]:
    def action(folder: Path) -> None:
        raise error

    return action


@pytest.fixture(params=["renameat2", "fallback"])
def rename(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to put a finished output in its place."""
    if request.param == "fallback":
        monkeypatch.setattr(atomic, "_renameat2", lambda old, new, flag: False)


# --- success --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rename")
def test_folder_appears_at_the_end_and_holds_only_the_output(tmp_path: Path) -> None:
    with atomic.folder(tmp_path / "out") as folder:
        assert folder.parent.parent == tmp_path
        write(folder)
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["model_index.json", "unet"]


@pytest.mark.usefixtures("rename")
def test_file(tmp_path: Path) -> None:
    with atomic.file(tmp_path / "out.weights.h5") as path:
        path.write_text("new")
        assert not (tmp_path / "out.weights.h5").exists()
    assert names(tmp_path) == ["out.weights.h5"]
    assert (tmp_path / "out.weights.h5").read_text() == "new"


@pytest.mark.parametrize(
    ("umask", "folder_mode", "file_mode"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)]
)
def test_modes_follow_the_umask(
    tmp_path: Path, umask: int, folder_mode: int, file_mode: int
) -> None:
    before = os.umask(umask)
    try:
        with atomic.folder(tmp_path / "out") as folder:
            write(folder)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder_mode
    assert (tmp_path / "out" / "model_index.json").stat().st_mode & 0o777 == file_mode


def test_relative_and_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for target in ("out", "../beside", "[a]*.1.partial", "ünï code", ".hidden", "lock"):
        with atomic.folder(Path(target)) as folder:
            write(folder)
        assert names(Path(target)) == ["model_index.json", "unet"]
    for target in (".", "..", "/", "../work"):
        with pytest.raises(ConversionError, match="exists"), atomic.folder(Path(target)):
            pass


def test_everything_is_synced_before_it_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []

    def fsync(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").resolve().name
        synced.append((name, (tmp_path / "out").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic.folder(tmp_path / "out") as folder:
        write(folder)
    before = [name for name, in_place in synced if not in_place]
    assert before == ["model_index.json", "w.safetensors", "unet", "out"]
    assert synced[-1] == (tmp_path.name, True)


# --- what is already there ------------------------------------------------------------------------


def test_existing_output_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("old")
    for context in (
        atomic.folder(tmp_path / "out"),
        atomic.folder(tmp_path / "file"),
        atomic.file(tmp_path / "file"),
    ):
        with pytest.raises(ConversionError, match=r"already exists; .*--overwrite"), context:
            pytest.fail("must not begin")
    assert names(tmp_path) == ["file", "out"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.usefixtures("rename")
def test_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def meanwhile(folder: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()

    with pytest.raises(ConversionError, match="exists"):
        stage(tmp_path / "out", write, meanwhile)
    with pytest.raises(ConversionError, match="exists"), atomic.file(tmp_path / "file") as path:
        (tmp_path / "file").write_text(str(path.write_text("theirs")))
    assert names(tmp_path) == ["file", "out"]
    assert names(tmp_path / "out") == ["theirs"]
    assert (tmp_path / "file").read_text() == "6"


@pytest.mark.usefixtures("rename")
def test_rename_itself_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    with pytest.raises(FileExistsError):
        atomic._rename(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old"
    (tmp_path / "folder").mkdir()
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError):
        atomic._rename(tmp_path / "folder", tmp_path / "there")


@pytest.mark.usefixtures("rename")
@pytest.mark.parametrize("marker", ["model_index.json", "conversion.json", None])
def test_overwrite_swaps_an_earlier_output(tmp_path: Path, marker: str | None) -> None:
    (tmp_path / "out").mkdir()
    if marker:
        (tmp_path / "out" / marker).write_text("{}")
        (tmp_path / "out" / "old").touch()
    with atomic.folder(tmp_path / "out", overwrite=True) as folder:
        write(folder)
        assert (tmp_path / "out" / "old").exists() == bool(marker)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["model_index.json", "unet"]


@pytest.mark.usefixtures("rename")
def test_overwrite_a_file_or_nothing(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with atomic.file(tmp_path / "out.h5", overwrite=True) as path:
            path.write_text(text)
        assert (tmp_path / "out.h5").read_text() == text
    assert names(tmp_path) == ["out.h5"]


@pytest.mark.usefixtures("rename")
def test_failed_overwrite_keeps_the_old_output(tmp_path: Path) -> None:
    with atomic.folder(tmp_path / "out") as folder:
        write(folder, "old")
    with pytest.raises(ZeroDivisionError):
        stage(tmp_path / "out", write, stop(ZeroDivisionError), overwrite=True)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "unet" / "w.safetensors").read_text() == "old"


def test_overwrite_never_replaces_anything_else(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    (tmp_path / "link").symlink_to("home")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    before = names(tmp_path)
    for context, reason in [
        (
            atomic.folder(tmp_path / "home", overwrite=True),
            "not an earlier output .no model_index.json.",
        ),
        (atomic.folder(tmp_path / "link", overwrite=True), "is a link"),
        (atomic.folder(tmp_path / "dangling", overwrite=True), "is a link"),
        (atomic.folder(tmp_path / "file", overwrite=True), "is not a folder"),
        (atomic.file(tmp_path / "home", overwrite=True), "is a folder"),
        (atomic.file(tmp_path / "link", overwrite=True), "is a link"),
        (atomic.file(tmp_path / "fifo", overwrite=True), "is not a regular file"),
    ]:
        with pytest.raises(ConversionError, match=f"{reason}, so it is not overwritten"), context:
            pytest.fail("must not begin")
    assert names(tmp_path) == before
    assert names(tmp_path / "home") == ["thesis.tex"]


# --- failure --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, ConversionError])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        stage(tmp_path / "out", write, stop(error))
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_disk_errors_become_one_line(tmp_path: Path, code: int) -> None:
    with (
        pytest.raises(ConversionError, match="out: cannot be written, ") as error,
        atomic.folder(tmp_path / "out"),
    ):
        raise OSError(code, os.strerror(code))
    assert str(error.value).isprintable()
    assert names(tmp_path) == []


def test_other_errors_of_the_block_are_not_relabelled(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic.folder(tmp_path / "out") as folder:
        (folder / "missing").read_text()


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_failing_sync_or_rename_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (atomic, "_renameat2")), fail)
    with (
        pytest.raises(ConversionError, match="input/output error; nothing was left"),
        atomic.folder(tmp_path / "out") as folder,
    ):
        write(folder)
    assert names(tmp_path) == []


def test_bad_places(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target, reason in [
        (tmp_path / "missing" / "out", "does not exist"),
        (tmp_path / "file" / "out", "is not a folder"),
        (tmp_path / ("x" * 250), "name is too long"),
        (tmp_path / ("x" * 300), "name is too long"),
    ]:
        with pytest.raises(ConversionError, match=reason), atomic.folder(target):
            pytest.fail("must not begin")
    assert names(tmp_path) == ["file"]


def as_nobody(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code as an unprivileged user; the modules are already imported, so it needs no
    access to them."""
    program = f"""
import os, sys
from pathlib import Path
from weightport import errors
from weightport.io import atomic
os.setuid(65534)
{code}"""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_folder_without_write_permission(tmp_path: Path) -> None:
    path = tmp_path
    while path.stat().st_uid == 0 and path != path.parent and not path.stat().st_mode & 0o001:
        path.chmod(path.stat().st_mode | 0o001)
        path = path.parent
    ran = as_nobody("with atomic.folder(Path(sys.argv[1])): pass", tmp_path / "out")
    assert "ConversionError" in ran.stderr
    assert "no permission to write in its folder" in ran.stderr
    assert names(tmp_path) == []


def test_read_only_file_system(tmp_path: Path) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], capture_output=True, check=False
    ).returncode:
        pytest.skip("cannot mount")
    try:
        with (
            pytest.raises(ConversionError, match="the file system is read-only"),
            atomic.folder(tmp_path / "out"),
        ):
            pytest.fail("must not begin")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    command: list[str | Path] = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_full_disk(small_disk: Path) -> None:
    with (
        pytest.raises(
            ConversionError,
            match="out: cannot be written, the disk is full; nothing was left behind",
        ),
        atomic.folder(small_disk / "out") as folder,
        (folder / "big").open("wb") as file,
    ):
        file.write(bytes(2 << 20))
    assert names(small_disk) == []
    check_space(small_disk, 1 << 19)
    with pytest.raises(
        ConversionError, match=r"needs 2\.00 GB of disk space, but only 0\.00 GB are free"
    ):
        check_space(small_disk, 2 * 10**9)


def test_file_size_limit(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with (
            pytest.raises(ConversionError, match="files this large"),
            atomic.file(tmp_path / "out") as path,
        ):
            path.write_bytes(bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


# --- killed and concurrent runs -------------------------------------------------------------------

CHILD = """
import sys, time
from pathlib import Path
from weightport.io import atomic
print("ready", flush=True)
for number in range(1000):
    with atomic.folder(Path(sys.argv[1]), overwrite=True) as folder:
        for name in ("a", "b", "conversion.json"):
            (folder / name).write_text(str(number) * 1000)
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def test_kill_at_any_time_leaves_a_whole_output_or_none(tmp_path: Path) -> None:
    target = tmp_path / "out"
    debris = 0
    for round_ in range(12):
        with start(CHILD, target) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(0.003 * round_)
            child.kill()
        debris += len(names(tmp_path)) > target.exists()
        if target.exists():
            texts = {(target / name).read_text() for name in names(target)}
            assert names(target) == ["a", "b", "conversion.json"]
            assert len(texts) == 1
        with atomic.folder(target, overwrite=True) as folder:
            for name in ("a", "b", "conversion.json"):
                (folder / name).touch()
        assert names(tmp_path) == ["out"]
        if round_ % 2:
            shutil.rmtree(target)
    assert debris, "no run was killed inside the block: the test shows nothing"


def test_only_partials_of_this_target_are_swept(tmp_path: Path) -> None:
    for name in (
        ".out.123.partial",
        ".other.123.partial",
        ".out.partial",
        "out.123.partial",
        ".out.x.partial",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.7.partial").touch()
    (tmp_path / ".out.8.partial").symlink_to(".other.123.partial")
    with atomic.folder(tmp_path / "out") as folder:
        write(folder)
    kept = [
        ".other.123.partial",
        ".out.7.partial",
        ".out.8.partial",
        ".out.partial",
        ".out.x.partial",
        "out",
        "out.123.partial",
    ]
    assert names(tmp_path) == kept
    assert names(tmp_path / ".other.123.partial") == []


def test_a_running_neighbour_is_left_alone(tmp_path: Path) -> None:
    code = CHILD.replace(
        "for name in",
        'print("inside", flush=True); sys.stdin.read(1); time.sleep(60)\n        for name in',
    )
    with start(code, tmp_path / "out") as child:
        assert child.stdout is not None
        assert [child.stdout.readline() for _ in range(2)] == ["ready\n", "inside\n"]
        with (
            pytest.raises(
                ConversionError, match=f"another run .process {child.pid}. is writing it"
            ),
            atomic.folder(tmp_path / "out"),
        ):
            pytest.fail("must not begin")
        assert names(tmp_path) == [f".out.{child.pid}.partial"]
        child.send_signal(signal.SIGKILL)
    with atomic.folder(tmp_path / "out") as folder:
        write(folder)
    assert names(tmp_path) == ["out"]


def test_the_same_process_twice(tmp_path: Path) -> None:
    with atomic.folder(tmp_path / "out") as folder:
        with pytest.raises(ConversionError, match="another run"), atomic.folder(tmp_path / "out"):
            pytest.fail("must not begin")
        write(folder)
    assert names(tmp_path) == ["out"]


# --- files that join a folder, small files --------------------------------------------------------


def test_merged_files_join_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "out" / "unet").mkdir(parents=True)
    for name in ("unet/old", "unet/stale", "stale too", "kept"):
        (tmp_path / "out" / name).write_text("old")
    stale = ["unet/stale", "stale too", "unet/w.safetensors"]
    with atomic.merged(tmp_path / "out", stale) as folder:
        write(folder)
        assert names(tmp_path / "out") == ["kept", "stale too", "unet"]
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["kept", "model_index.json", "unet"]
    assert names(tmp_path / "out" / "unet") == ["old", "w.safetensors"]


def test_the_file_that_names_the_others_moves_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    replace = Path.replace

    def noted(path: Path, target: Path) -> Path:
        moved.append(path.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", noted)
    (tmp_path / "out").mkdir()
    for last in ("a", "m", "z"):
        with atomic.merged(tmp_path / "out", last=last) as folder:
            for name in ("a", "m", "z"):
                (folder / name).touch()
    assert [moved[2], moved[5], moved[8]] == ["a", "m", "z"]


def test_merging_that_fails_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError), atomic.merged(tmp_path / "out") as folder:
        shutil.copytree(folder, folder, dirs_exist_ok=False)
    with pytest.raises(OSError, match="not a folder"), atomic.merged(tmp_path / "file"):
        pytest.fail("must not begin")
    assert names(tmp_path) == ["file", "out"]
    assert names(tmp_path / "out") == []


def test_text_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    for content in ("first", "ünï"):
        atomic.text(path, content)
        assert path.read_text(encoding="utf-8") == content

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        atomic.text(path, "third")
    assert path.read_text(encoding="utf-8") == "ünï"
    assert names(tmp_path) == ["results.json"]


# --- inputs ---------------------------------------------------------------------------------------


def test_check_apart(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.ckpt").touch()
    (tmp_path / "link").symlink_to("model")
    os.link(tmp_path / "model" / "a.ckpt", tmp_path / "hard")
    model, file = tmp_path / "model", tmp_path / "model" / "a.ckpt"
    for output, source, relation in [
        (file, file, "is"),
        (tmp_path / "model" / ".." / "model" / "a.ckpt", file, "is"),
        (tmp_path / "link" / "a.ckpt", file, "is"),
        (tmp_path / "hard", file, "is"),
        (model, file, "contains"),
        (tmp_path / "link", file, "contains"),
        (model / "out", model, "lies inside"),
        (tmp_path / "link" / "deep" / "out", model, "lies inside"),
    ]:
        with pytest.raises(ConversionError, match=f"the output {relation} the input"):
            check_apart(output, [tmp_path / "other", source])
    for output in (model / "out", tmp_path / "out", tmp_path / "model2", model / "a.ckpt.out"):
        check_apart(output, [file])
