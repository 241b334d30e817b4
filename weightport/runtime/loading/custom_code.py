"""Code that a repository brings along: pipelines and components of its own, behind
`trust_remote_code`.

This is the only place where code from a repository runs. A module and what it imports relatively
are known by the hash of their text: the same text is loaded once, edited text is loaded anew.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .source import Source

_PACKAGE = "weightport_custom_"

_TEXTS: dict[str, dict[str, bytes]] = {}  # package -> path in the folder -> text


def load_class(source: Source, module: str, name: str | None, trust: bool) -> Any:
    """A class from `<module>.py` in a folder; without a name, the one pipeline in it.

    Args:
        source: the folder.
        module: the name of the file, without `.py`.
        name: the name of the class.
        trust: whether the user agreed to run this code.

    Raises:
        OSError: there is no such file.
        ImportError: the code imports something that is not installed.
        ValueError: the user did not agree, or there is no such class, or there is no single
            pipeline.
    """
    where = f"{source.name}/{module}.py"
    if os.environ.get("DIFFUSERS_DISABLE_REMOTE_CODE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise ValueError(
            f"{where}: code of repositories is disabled by DIFFUSERS_DISABLE_REMOTE_CODE"
        )
    if not trust:
        raise ValueError(
            f"{where}: code that would run here; read it, then pass trust_remote_code=True"
        )
    code = _import(source, module)
    if name is not None:
        if not isinstance(getattr(code, name, None), type):
            raise ValueError(f"{where}: there is no class {name} in it")
        return getattr(code, name)
    own = [
        value
        for value in vars(code).values()
        if isinstance(value, type) and value.__module__ == code.__name__
    ]
    # ours, or one that extends diffusers' class of that name
    found = [
        kind for kind in own if "DiffusionPipeline" in {base.__name__ for base in kind.__mro__[1:]}
    ]
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found)
        raise ValueError(
            f"{where}: must hold one pipeline class, not {len(found)} ({names})".replace(" ()", "")
        )
    return found[0]


def custom_file(kind: type) -> str | None:
    """The name of the module of a class that was loaded from a repository; None for any other
    class."""
    return kind.__module__.split(".", 1)[1] if kind.__module__.startswith(_PACKAGE) else None


def copy_code(kind: type, folder: Path) -> None:
    """Write the module of a class, with what it imports relatively, into a folder."""
    for name, text in _TEXTS[kind.__module__.split(".")[0]].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)


def _import(source: Source, module: str) -> ModuleType:
    try:
        files = _needed(source, f"{module}.py")
    except SyntaxError as error:
        raise ValueError(
            f"{source.name}/{error.filename}: line {error.lineno} is not Python: {error.msg}"
        ) from None
    text = b"".join(name.encode() + files[name] for name in sorted(files))
    package = _PACKAGE + hashlib.sha256(text).hexdigest()[:16]
    if package not in sys.modules:
        sys.modules[package], _TEXTS[package] = ModuleType(package), files
        sys.modules[package].__path__ = [str(source.fetch(files))]
    importlib.invalidate_caches()  # for files that were written a moment ago
    quiet, sys.dont_write_bytecode = (
        sys.dont_write_bytecode,
        True,
    )  # the folder is the user's, or the Hub's cache
    try:
        return importlib.import_module(f"{package}.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(package):
            raise
        advice = f"which is not installed; try `pip install {error.name.split('.')[0]}`"
        raise ImportError(f"{source.name}/{module}.py: imports {error.name}, {advice}") from None
    finally:
        sys.dont_write_bytecode = quiet


def _needed(source: Source, name: str) -> dict[str, bytes]:
    """The texts of a file and of all that it imports relatively, by paths in the folder."""
    found: dict[str, bytes] = {}
    queue = [name]
    source.path(name)
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found[path] = source.fetch([path]).joinpath(path).read_bytes()
        for node in ast.walk(ast.parse(found[path], path)):
            if isinstance(node, ast.ImportFrom) and node.level:
                package = path.split("/")[: -node.level] + (
                    node.module.split(".") if node.module else []
                )
                for parts in (package, *([*package, alias.name] for alias in node.names)):
                    candidates = ("/".join(parts) + ".py", "/".join([*parts, "__init__.py"]))
                    queue += [file for file in candidates if _exists(source, file)]
    return found


def _exists(source: Source, path: str) -> bool:
    *folders, name = path.split("/")
    return (
        name in functools.reduce(lambda place, folder: place.folder(folder), folders, source).names
    )
