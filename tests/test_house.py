"""The rules of the folders: who may import whom, what stays out of the process, what the wheel
holds."""

import ast
import shutil
import subprocess
import sys
import zipfile
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "mappings": ROOT / "mappings",
    "converters": ROOT / "converters",
    "runtime": ROOT / "weightport" / "runtime",
}
MAY_IMPORT = {
    "mappings": {"mappings"},
    "converters": {"converters", "mappings"},
    "runtime": {"runtime", "upload", "download"},
}
HEAVY = {"torch", "tensorflow", "keras", "h5py"}


def imported_names(source: str, package: str) -> set[str]:
    """Absolute dotted names of everything that a module of `package` imports, inside functions
    too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def own_parts(names: set[str]) -> set[str]:
    """Which parts of weightport these names lie in; a name directly in the root package stands for
    itself."""
    return {
        name.split(".")[1] if "." in name else name
        for name in names
        if name.split(".")[0] == "weightport"
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_import_rules(folder: str) -> None:
    paths = sorted(FOLDERS[folder].rglob("*.py"))
    assert paths
    for path in paths:
        package = ".".join(["weightport", folder, *path.parent.relative_to(FOLDERS[folder]).parts])
        parts = own_parts(imported_names(path.read_text(), package))
        assert parts <= MAY_IMPORT[folder], (
            f"{path.relative_to(ROOT)} imports {parts - MAY_IMPORT[folder]}"
        )


def test_the_way_to_the_hub_stands_alone() -> None:
    """The runtime may use it because it imports nothing else of ours, and nothing heavy before it
    is called."""
    for name, parts in {"upload": set[str](), "download": {"upload"}}.items():
        assert (
            own_parts(
                imported_names((ROOT / "weightport" / f"{name}.py").read_text(), "weightport")
            )
            == parts
        )


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("import numpy, os.path", set()),
        ("from .ops import Op", {"converters"}),
        ("from ..mappings.ops import Op", {"mappings"}),
        ("from .. import mappings", {"mappings"}),
        ("def f():\n    from weightport.runtime.models.unet import UNet", {"runtime"}),
        ("import weightport", {"weightport"}),
        ("from weightport import convert", {"convert"}),
    ],
)
def test_the_rules_see_every_kind_of_import(source: str, parts: set[str]) -> None:
    assert own_parts(imported_names(source, "weightport.converters")) == parts


def test_core_modules_load_nothing_heavy() -> None:
    modules = ["weightport"]
    for folder in ("mappings", "converters"):
        modules += [f"weightport.{folder}.{path.stem}" for path in FOLDERS[folder].glob("*.py")]
    code = (
        f"import importlib, sys\nfor m in {modules!r}:"
        " importlib.import_module(m)\nprint(*sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert HEAVY.isdisjoint(ran.stdout.split())


def repository_files() -> list[Path]:
    """Tracked and new files of the checkout, as paths relative to it; what git ignores is left
    out."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [Path(name) for name in listed.stdout.split("\0") if name]
    return [path for path in paths if (ROOT / path).is_file() and not (ROOT / path).is_symlink()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The file names in a wheel that is built from a copy of the repository's files."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in repository_files():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, source / path)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        out,
        source,
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    (built,) = out.glob("weightport-*.whl")
    return zipfile.ZipFile(built).namelist()


def test_wheel_holds_the_repository(wheel: list[str]) -> None:
    moved = [
        Path("weightport", path) if path.parts[0] in FOLDERS else path
        for path in repository_files()
    ]
    expected = {str(path) for path in moved if path.parts[0] == "weightport"}
    assert {name for name in wheel if ".dist-info/" not in name} == expected


def test_wheel_holds_the_licences(wheel: list[str]) -> None:
    licences = {name.partition(".dist-info/licenses/")[2] for name in wheel}
    assert {"LICENSE", "mappings/tokenizer/LICENSE"} <= licences
