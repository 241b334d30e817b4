"""The rules of the house: who may import whom, no circles, what stays out of the process, what the
wheel holds."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .support import public_api
from .support.imports import (
    circles,
    import_graph,
    imported_names,
    module_files,
    own_modules,
    room,
    within,
)  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
LINKED = {"converters", "mappings"}  # at the root, part of the package all the same
HEAVY = {"torch", "tensorflow", "keras", "h5py", "gradio"}

# The ground: nothing of ours below it.
GROUND = {
    "errors": set[str](),
    "noise_schedule": set[str](),
    "differences": set[str](),
    "mappings": set[str](),
    "io": {"errors"},
    "reports": {"errors", "io"},
    "hub": {"errors", "io"},
    "adapters": {"errors", "mappings"},
}
_CONVERTER_BASE = {"errors", "io", "converters.checkpoint"}
_PLANNING = _CONVERTER_BASE | {"mappings"}
_LAYOUTS = _PLANNING | {
    "converters.readers", "converters.planning", "converters.settings", "noise_schedule",
    "adapters",
}  # fmt: skip
_REPO = _LAYOUTS | {"converters.layouts", "converters.writers", "converters.conversion"}
_LOADING = {"errors", "io", "hub", "converters.checkpoint", "converters.readers"}
_MODELS = _LOADING | {"runtime.loading", "runtime.outputs"}
_SAMPLING = _MODELS | {"runtime.models", "runtime.images", "runtime.speed"}
_PIPELINES = _SAMPLING | {"runtime", "adapters", "mappings"}
_ALL_BUT_THE_TOP = {*GROUND, "converters", "runtime"}
_TOP = _ALL_BUT_THE_TOP | {"parity", "comparison", "push", "pull", "recipe"}
# Room -> what its modules may import beside one another. The innermost room of a module counts.
MAY_IMPORT = GROUND | {
    "converters.checkpoint": {"errors", "io"},
    "converters.readers": _CONVERTER_BASE,
    "converters.writers": _CONVERTER_BASE | {"mappings.ops"},
    "converters.planning": _PLANNING,
    "converters.settings": {"errors", "io", "mappings"},
    "converters.conversion": _PLANNING | {"converters.planning", "converters.settings"},
    "converters.layouts": _LAYOUTS,
    "converters.repo": _REPO,
    "converters.outputs": _REPO | {"converters.repo"},
    "converters": _REPO | {"converters.repo", "converters.outputs", "differences"},
    "runtime.notices": set(),
    "runtime.outputs": set(),
    "runtime.single_file": {"converters", "io", "mappings", "pull", "runtime.registry"},
    "runtime.loading": _LOADING | {"runtime.notices", "runtime.registry", "runtime.single_file"},
    "runtime.text": _MODELS | {"adapters"},
    "runtime.schedulers": _MODELS | {"noise_schedule"},
    "runtime.models": _MODELS | {"runtime.text"},
    "runtime.sampling": _SAMPLING,
    "runtime.pipelines": _PIPELINES,
    "runtime": _PIPELINES,
    "utils": {"runtime"},
    "schedulers": {"runtime"},
    "models": {"runtime"},
    "pipelines": {"runtime"},
    "image_processor": {"runtime"},
    "callbacks": {"runtime"},
    "parity": _ALL_BUT_THE_TOP,
    "comparison": _ALL_BUT_THE_TOP,
    "push": _ALL_BUT_THE_TOP | {"pull"},
    "pull": _ALL_BUT_THE_TOP,
    "recipe": _ALL_BUT_THE_TOP,
    "api": _TOP,
    "app": _TOP | {"api"},
    "batch": _TOP | {"api", ""},
    "commands": _TOP | {"api", "app", "batch", ""},
    "cli": _TOP | {"api", "commands", ""},
    "__main__": {"cli"},
    "": _TOP | {"api"},
}


def test_import_rules() -> None:
    """Every room imports only what the table allows; lazy imports and those for types count."""
    graph = import_graph(ROOT)
    wrong = []
    for module, others in sorted(graph.items()):
        home = room(module, MAY_IMPORT) if module else ""
        assert home is not None, f"{module}: lies in no room of the table"
        allowed = MAY_IMPORT[home] | ({home} if home else set())
        wrong += [
            f"{module} imports {other or 'weightport'}"
            for other in sorted(others)
            if not (other in allowed if not other else within(other, allowed))
        ]
    assert not wrong, "\n".join(wrong)


def test_no_circle() -> None:
    assert circles(import_graph(ROOT)) == []


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("import numpy, os.path", set()),
        ("from .ops import Op", {"converters"}),
        ("from ..mappings.ops import Op", {"mappings.ops"}),
        ("from .. import mappings", {"mappings"}),
        ("def f():\n    from weightport.runtime.models.unet import UNet", {"runtime.models.unet"}),
        ("if TYPE_CHECKING:\n    from ..api import convert", {"api"}),
        ("import weightport", {""}),
        ("from weightport import convert", {""}),
        ("import weightport.cli as command", {"cli"}),
    ],
)
def test_the_rules_see_every_kind_of_import(source: str, modules: set[str]) -> None:
    names = imported_names(source, "weightport.converters")
    assert own_modules(names, module_files(ROOT)) == modules


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert circles(graph) == [["b", "c"]]


def test_core_modules_load_nothing_heavy() -> None:
    core = [name for name in module_files(ROOT) if within(name, ["mappings", "converters"])]
    modules = ["weightport", *(f"weightport.{name}" for name in core)]
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
    code += "print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert HEAVY.isdisjoint(ran.stdout.split())


def test_loading_a_model_imports_nothing_that_is_for_images_texts_or_adapters() -> None:
    """They take time and memory; the first image, text or adapter brings them."""
    late = ["PIL", "scipy", "tokenizers", "torchsde", "ml_dtypes"]
    code = "import sys, weightport.runtime.public, weightport.runtime.single_file\n"
    code += f"print([name for name in {late!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout == "[]\n", ran.stdout + ran.stderr


@pytest.mark.parametrize("first", ["weightport.parity.result", "weightport.push"])
def test_a_module_never_hides_a_public_function(first: str) -> None:
    code = (
        f"import weightport, {first}\nprint(callable(weightport.parity), callable(weightport.push))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["True", "True"], ran.stderr


def test_public_api_is_as_written() -> None:
    """A name or parameter appears or vanishes only together with its line; see the module."""
    golden = ROOT / "tests" / "golden" / "public_api.txt"
    assert list(public_api.lines()) == golden.read_text().splitlines()


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
    command: list[str | Path] = [
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
        Path("weightport", path) if path.parts[0] in LINKED else path for path in repository_files()
    ]
    expected = {str(path) for path in moved if path.parts[0] == "weightport"}
    assert {name for name in wheel if ".dist-info/" not in name} == expected


def test_wheel_holds_the_licences(wheel: list[str]) -> None:
    licences = {name.partition(".dist-info/licenses/")[2] for name in wheel}
    assert {"LICENSE", "mappings/tokenizer/LICENSE"} <= licences
