"""The `weightport` command: help and errors of usage, what goes to which stream, interruption,
determinism, imports."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import math
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import weightport
from weightport.cli import main
from weightport.commands import inspect as inspect_command
from weightport.mappings.families import families

from ..support.command import COMMAND, assert_refused, heed_interrupts, listing, run, spawn

PARTS = ("text_encoder", "unet", "decoder", "image_encoder")

# ---- usage


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["inspect", "--help"]])
def test_help(arguments: list[str]) -> None:
    ended = run(*arguments)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith("usage: weightport")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convrt", "a.h5", "-o", "b"], "did you mean `convert`?"),
        (["convert", "a.h5", "-o", "b", "--dtyp", "float16"], "did you mean `--dtype`?"),
        (["convert", "a.h5", "-o", "b", "--overwrit", "--dry"], "did you mean `--overwrite`?"),
        (["convert", "a.h5", "-o", "b", "--dtype", "float61"], "did you mean `float16`?"),
        (["convert", "a.h5", "-o", "b", "--to", "kerascvs"], "did you mean `kerascv`?"),
        (["convert", "a.h5"], "-o/--output"),
        (["convert", "-o", "b"], "SOURCE"),
        (["convert", "a.h5", "-o", "b", "--lora-alpha", "much"], "--lora-alpha"),
        (["inspect"], "FILE"),
        (["inspect", "a.h5", "b.h5"], "b.h5"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    ended = run(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert message in ended.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert"],
        ["convert", "x", "-o", "y", "--image-size", "big"],
        ["convert", "are", "-o", "value", "--image-size", "value"],
        ["convert", "x", "-o", "y", "--lora-alpha", "uneat"],
        ["inspect", "vea", "decodr"],
        ["generate", "repo", "--size", "sixe"],
        ["generate", "repo", "prompt", "--negative", "--", "--seeed"],
        ["zzz"],
        ["push", "my-model", "ORG/NAME", "--zzz"],
        ["--jsno", "convert"],
    ],
)
def test_no_hint_for_words_that_nobody_misspelt(arguments: list[str]) -> None:
    ended = run(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert "did you mean" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "typed", "meant"),
    [
        (["convret"], "convret", "convert"),
        (["convert", "--famly", "sd1"], "--famly", "--family"),
        (
            ["convert", "a", "-o", "b", "--image-size", "big", "--overwritte"],
            "writte",
            "--overwrite",
        ),
        (["convert", "a", "-o", "b", "--famly=sd1"], "--famly=sd1", "--family"),
        (["convert", "a", "-o", "b", "--component", "vea"], "vea", "vae"),
        (["generate", "repo", "cat", "--sead", "1"], "--sead", "--seed"),
        (["inspect", "a", "--jsno"], "--jsno", "--json"),
        (["--versoin"], "--versoin", "--version"),
    ],
)
def test_a_hint_for_the_word_that_was_typed(arguments: list[str], typed: str, meant: str) -> None:
    ended = run(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert typed in ended.err
    assert ended.err.endswith(f"; did you mean `{meant}`?\n")


def test_without_a_command_the_help() -> None:
    assert run() == run("--help")
    assert run().status == 0


def test_version() -> None:
    ended = run("--version")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out == f"weightport {weightport.__version__}\n"
    assert weightport.__version__ == importlib.metadata.version("weightport")


@pytest.mark.parametrize(
    ("arguments", "names", "reason"),
    [
        (["--variant", "../x"], "--variant ../x", "letters, digits"),
        (["--variant", ""], "--variant", "letters, digits"),
        (["--max-shard-size", "many"], "--max-shard-size many", "not a size"),
        (["--max-shard-size", "0"], "--max-shard-size 0", "not a size"),
        (["--max-shard-size", "-5GB"], "--max-shard-size", "not a size"),
        (["--component", "unet"], "--component unet", "the sources hold"),
        (["--base", "nowhere"], "nowhere", "no such folder"),
        (["--base", "../nowhere"], "../nowhere", "no such folder"),
    ],
)
def test_wrong_values(
    place: Path, sd1_keras: dict[str, Path], arguments: list[str], names: str, reason: str
) -> None:
    before = listing(place)
    option, value = arguments
    ended = run("convert", sd1_keras["decoder"], "-o", place / "out", f"{option}={value}")
    assert_refused(ended, names, reason)
    assert listing(place) == before


# ---- what is printed


def test_what_a_conversion_prints(place: Path, sd1_keras: dict[str, Path]) -> None:
    ended = run("convert", sd1_keras["unet"], "-o", place / "out")
    assert (ended.status, ended.err) == (0, "")
    first, *notes, last = ended.out.splitlines()
    assert first.split()[:3] == ["unet", "686", "tensors"]
    assert str(sd1_keras["unet"]) in first
    assert all(line.startswith(("note: ", "lacks: ")) for line in notes)
    assert sum(line.startswith("lacks: ") for line in notes) == 2
    assert last == f"wrote {place / 'out'}"


def test_json(place: Path, sd1_keras: dict[str, Path]) -> None:
    ended = run("convert", *sd1_keras.values(), "-o", place / "out", "--json")
    assert (ended.status, ended.err) == (0, "")
    summary = json.loads(ended.out)
    assert summary["family"] == "sd1"
    assert summary["components"] == {"unet": 686, "vae": 248, "text_encoder": 196}
    assert summary["output"] == str(place / "out")
    assert summary["lacks"] == []
    for name, file in summary["files"].items():
        assert (place / "out" / name).stat().st_size == file["nbytes"]


def test_json_of_inspect(sd1_keras: dict[str, Path]) -> None:
    for part in PARTS:
        ended = run("inspect", sd1_keras[part], "--json")
        assert (ended.status, ended.err) == (0, "")
        (found,) = json.loads(ended.out)["parts"]
        assert (found["part"], found["missing"], found["unexpected"]) == (part, [], [])
        assert found["count"] == sum(count for _, count, _, _ in found["tensors"])


def test_inspect(sd1_keras: dict[str, Path]) -> None:
    ended = run("inspect", sd1_keras["unet"])
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith(f"{sd1_keras['unet']}\n\nunet: 686 tensors")
    assert len(ended.out.splitlines()) < 150, "686 tensors are summed up"


def test_json_error(place: Path) -> None:
    """An error stays one line on stderr, also where JSON was asked for."""
    assert_refused(
        run("convert", place / "missing", "-o", place / "out", "--json"),
        place / "missing",
        "no such file",
    )
    assert_refused(run("inspect", place / "missing", "--json"), place / "missing", "no such file")


def test_dry_run_writes_nothing(place: Path, sd1_keras: dict[str, Path], sd1_repo: Path) -> None:
    before = listing(place)
    ended = run("convert", *sd1_keras.values(), "-o", place / "out", "--dry-run")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.splitlines()[-1] == "dry run: everything fits, nothing was written"
    ended = run(
        "convert", sd1_repo, "-o", place / "out.h5", "--to", "kerascv", "--dry-run", "--json"
    )
    assert json.loads(ended.out)["output"] is None
    assert listing(place) == before


def test_quiet(place: Path, sd1_keras: dict[str, Path]) -> None:
    ended = run("convert", sd1_keras["unet"], "-o", place / "out", "-q")
    assert (ended.status, ended.out, ended.err) == (0, "", "")
    assert_refused(
        run("convert", sd1_keras["unet"], "-o", place / "out", "-q"),
        place / "out",
        "already exists",
    )


def test_debug_shows_where(place: Path) -> None:
    with pytest.raises(Exception, match="no such file"):
        run("convert", place / "missing", "-o", place / "out", "--debug")


def on_terminal(*arguments: str | Path) -> tuple[int, bytes]:
    """Run the command with a terminal for stderr and no delay of the bar; its status, and what the
    terminal got."""
    script = (
        "import sys, tqdm\n"
        "bar = tqdm.tqdm\n"
        "tqdm.tqdm = lambda **options: bar(**options | {'delay': 0})\n"
        "from weightport.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-c", script, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # the other side was closed
        while chunk := os.read(ours, 1 << 16):
            written += chunk
    os.close(ours)
    return process.wait(), written


def test_progress_needs_a_terminal(place: Path, sd1_keras: dict[str, Path]) -> None:
    """A bar is drawn on a terminal, but not when quiet; two runs below have a pipe."""
    arguments: list[str | Path] = [
        "convert",
        *sd1_keras.values(),
        "--overwrite",
        "-o",
        place / "out",
    ]
    status, written = on_terminal(*arguments)
    assert status == 0
    assert b"%|" in written
    assert b"B/s" in written
    assert on_terminal(*arguments, "-q") == (0, b"")


# ---- interruption


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(
    place: Path, sd1_keras: dict[str, Path], number: signal.Signals, status: int
) -> None:
    """Stopped as soon as there is a folder for weights."""
    code = (
        "import os, sys\n"
        "from weightport.cli import main\n"
        "def stop(event, arguments):\n"
        "    if event == 'os.mkdir' and str(arguments[0]).endswith('.partial/out/unet'):\n"
        f"        os.kill(os.getpid(), {number:d})\n"
        "sys.addaudithook(stop)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "convert",
        *map(str, sd1_keras.values()),
        "-o",
        str(place / "out"),
    ]

    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, preexec_fn=heed_interrupts
    )
    assert (ended.returncode, ended.stdout) == (status, "")
    assert ended.stderr.count("\n") <= 1
    assert "Traceback" not in ended.stderr
    assert sorted(path.name for path in place.iterdir()) == ["cwd"]


@pytest.mark.parametrize("part", ["unet", "decoder"])
def test_reader_of_the_pipe_is_gone(sd1_keras: dict[str, Path], part: str) -> None:
    """`weightport inspect FILE | true` ends without a word, whether the output fits a buffer or
    not."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [*COMMAND, "inspect", str(sd1_keras[part])]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_two_runs_for_one_output(place: Path, sd1_keras: dict[str, Path]) -> None:
    """One wins, the other says so; the output is whole."""
    command = [*COMMAND, "convert", str(sd1_keras["decoder"]), "-o", str(place / "out")]
    both = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    (error,) = filter(None, errors)
    assert error.startswith(f"error: {place / 'out'}: ")
    assert "another run" in error or "already exists" in error or "appeared there" in error
    assert sorted(path.name for path in place.iterdir()) == ["cwd", "out"]
    assert (place / "out" / "conversion.json").exists()


# ---- determinism


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(("to", "suffix"), [("diffusers", ""), ("kerascv", ".weights.h5")])
def test_two_runs_write_the_same_bytes(
    place: Path, sd1_keras: dict[str, Path], to: str, suffix: str
) -> None:
    """In another process, hash order, time zone, locale, folder and order of the sources."""
    (place / "a").mkdir()
    (place / "b").mkdir()
    sources = [sd1_keras[part] for part in PARTS]
    options = ["--to", to, "--dtype", "float16"]
    assert run("convert", *sources, "-o", place / "a" / f"model{suffix}", *options).status == 0
    environment = {
        "PYTHONHASHSEED": "1",
        "TZ": "Asia/Tokyo",
        "LC_ALL": "C",
        "SOURCE_DATE_EPOCH": "1",
    }
    other_way: list[str | Path] = [*sources[::-1], "-o", place / "b" / f"model{suffix}", *options]
    ended = spawn("convert", *other_way, environment=environment)
    assert (ended.status, ended.err) == (0, ""), "no progress is shown in a pipe"
    one, other = contents(place / "a"), contents(place / "b")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def test_names_beyond_ascii_in_a_locale_without_them(
    place: Path, sd1_keras: dict[str, Path]
) -> None:
    """The C locale in earnest: Python takes it for UTF-8 unless it is told not to."""
    output = place / "mödel 模型"
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    ended = spawn("convert", sd1_keras["decoder"], "-o", output, environment=environment)
    assert (ended.status, ended.err) == (0, ""), ended
    assert json.loads((output / "conversion.json").read_text(encoding="utf-8"))
    missing = place / "fehlt é.h5"
    ended = spawn("inspect", missing, environment=environment)
    assert (ended.status, ended.err.count("\n")) == (1, 1), ended


def test_modes_follow_the_umask(place: Path, sd1_keras: dict[str, Path]) -> None:
    before = os.umask(0o022)
    try:
        assert run("convert", sd1_keras["decoder"], "-o", place / "out").status == 0
        assert (
            run("convert", sd1_keras["decoder"], "-o", place / "out.h5", "--to", "kerascv").status
            == 0
        )
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (place / "out").rglob("*") if path.is_file()}
    assert modes == {0o644}
    assert (place / "out.h5").stat().st_mode & 0o777 == 0o644
    folders = {
        path.stat().st_mode & 0o777
        for path in [place / "out", *(place / "out").iterdir()]
        if path.is_dir()
    }
    assert folders == {0o755}


def test_the_report_tells_no_secrets(
    place: Path, sd1_keras: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No absolute path gets into the repo, which may be published."""
    monkeypatch.chdir(place)
    assert run("convert", sd1_keras["decoder"], "-o", "out").status == 0
    for name, content in contents(place / "out").items():
        assert str(place).encode() not in content, name
        assert str(sd1_keras["decoder"].parent).encode() not in content, name


# ---- imports and what is made meanwhile


def test_the_collector_is_patient_within_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gc.get_threshold()
    during = []

    def looked(arguments: object) -> int:
        during.append(gc.get_threshold())
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_command, "run", looked)
    assert main(["inspect", "x"]) == 130
    assert [threshold > before for threshold in during] == [True]
    assert gc.get_threshold() == before


HEAVY = (
    "torch",
    "tensorflow",
    "keras",
    "h5py",
    "safetensors",
    "diffusers",
    "transformers",
    "huggingface_hub",
)


def imported(names: tuple[str, ...], *arguments: str | Path) -> list[str]:
    """Which of the modules a process imports that runs the command."""
    script = (
        "import sys\n"
        "from weightport.cli import main\n"
        "try: assert not main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        f"print([name for name in {names} if name in sys.modules], file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found: list[str] = json.loads(ended.stderr.replace("'", '"'))
    return found


def test_help_imports_nothing_heavy() -> None:
    assert imported((*HEAVY, "numpy", "ml_dtypes", "tqdm", "json.tool"), "--help") == []


def test_inspect_imports_nothing_heavy(sd1_keras: dict[str, Path], sd1_repo: Path) -> None:
    assert imported((*HEAVY, "tqdm"), "inspect", sd1_keras["unet"]) == []
    assert imported((*HEAVY, "tqdm"), "inspect", sd1_repo) == []


def test_inspect_imports_what_the_file_needs(place: Path) -> None:
    """Of a list of tensors neither NumPy nor what reads other files, also with a noise schedule."""
    weights = {"betas": np.linspace(0.1, 0.2, 1000, dtype="f4")}
    weights["first_stage_model.quant_conv.weight"] = np.zeros((8, 8, 1, 1), "f4")
    save_file(weights, place / "model.safetensors")
    readers = [f"weightport.converters.readers.{name}" for name in ("hdf5", "tensorflow", "png")]
    others = [f"weightport.converters.layouts.{name}" for name in ("kerascv", "adapters")]
    names = ("numpy", "ml_dtypes", "zipfile", *readers, *others)
    assert imported(names, "inspect", place / "model.safetensors") == []


def test_convert_imports_dtypes_that_numpy_lacks_where_they_are(
    sd1_keras: dict[str, Path], place: Path
) -> None:
    arguments = ("convert", "-q", sd1_keras["decoder"], "-o")
    assert imported(("ml_dtypes",), *arguments, place / "as-it-is") == []
    cast = ("--dtype", "bfloat16")
    assert imported(("ml_dtypes",), *arguments, place / "cast", *cast) == ["ml_dtypes"]


def test_a_stock_model_needs_no_torch(place: Path) -> None:
    """Only models of other widths do. The weights are a hole in the file."""
    component = families()["sd1"].components["vae"]
    entries: dict[str, Any] = {}
    end = 0
    for key, shape in component.manifest().items():
        begin, end = end, end + 4 * math.prod(shape)
        entries[key] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    (place / "repo" / "vae").mkdir(parents=True)
    (place / "repo" / "model_index.json").write_text("{}")
    with (place / "repo" / "vae" / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    assert imported(HEAVY, "convert", place / "repo", "-o", place / "out", "--dry-run") == []
