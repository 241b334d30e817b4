"""Facts about layouts, families and components are data: code compares none of their names.

A name may stand where it is given (an argument, a value of a dict); it may not decide anything, but in
`mappings/`, in the modules of that layout, and in programs that run one source framework.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightport.mappings import families, layouts

ROOT = Path(__file__).resolve().parents[2]
NAMES = {*families.NAMES, *layouts.NAMES, *families.component_names(), *families.halves()}
HOMES = (  # what may know a name
    *(f"converters/layouts/{layout}*.py" for layout in layouts.NAMES),
    *(f"converters/outputs/{layout}*.py" for layout in layouts.NAMES),
    "converters/layouts/sources.py",  # the two tables of modules, one a layout
    "converters/outputs/__init__.py",
    "weightport/runtime/semantics.py",  # the maths of KerasCV
    "weightport/parity/runners/*.py",  # each runs one framework
    "weightport/runtime/pipelines/*.py",  # a pipeline is one architecture: its parts are its own
    "weightport/runtime/sampling/*.py",
)
MODULES = [
    path
    for folder in ("converters", "weightport")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.relative_to(ROOT).parts[:2]
    not in {("weightport", "converters"), ("weightport", "mappings")}
    and not any(path.relative_to(ROOT).match(home) for home in HOMES)
]


def _names(node: ast.expr | ast.pattern | None) -> Iterator[str]:
    """The names that a literal, or a collection or pattern of them, holds."""
    match node:
        case ast.Constant(value=str() as text) if text in NAMES:
            yield text
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
            for part in parts:
                yield from _names(part)
        case ast.MatchValue(value=value):
            yield from _names(value)
        case ast.MatchOr(patterns=patterns):
            for pattern in patterns:
                yield from _names(pattern)


def _asks_library(node: ast.Compare) -> bool:
    """Whether the name of a library is compared, of which one is called like a layout."""
    return any(
        getattr(side, "attr", getattr(side, "id", "")) == "library"
        for side in (node.left, *node.comparators)
    )


def _are_libraries(keys: list[ast.expr | None]) -> bool:
    """Whether a table is one of libraries, of which one is called like a layout."""
    return any(isinstance(key, ast.Constant) and key.value == "transformers" for key in keys)


def decided(source: str) -> list[tuple[int, str]]:
    """(line, name) wherever a name of a layout, family or component decides something."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        asked: list[ast.expr | ast.pattern | None] = []
        match node:
            case ast.Compare() if not _asks_library(node):
                asked = [node.left, *node.comparators]
            case ast.match_case(pattern=pattern):
                asked = [pattern]
            case ast.Subscript(value=ast.Name(id="Literal")):
                pass  # a type
            case ast.Subscript(value=ast.Dict(keys=keys)):
                asked = [*keys]
            case ast.Subscript(slice=key, ctx=ast.Load()):
                asked = [key]
            case ast.Call(func=ast.Attribute(attr="get" | "startswith" | "endswith" | "pop")):
                asked = [*node.args[:1]]
            case ast.Assign(value=ast.Dict(keys=keys)) | ast.AnnAssign(value=ast.Dict(keys=keys)):
                asked = [] if _are_libraries(keys) else [*keys]  # a table by name
        for part in asked:
            found += [
                (node.lineno if hasattr(node, "lineno") else 0, name) for name in _names(part)
            ]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_name_decides(path: Path) -> None:
    assert decided(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "if name == 'unet': pass",
        "if 'ldm' != layout: pass",
        "if family in ('sd1', 'x'): pass",
        "if 'vae' not in components: pass",
        "match part:\n    case 'decoder' | 'x': pass",
        "component = components['text_encoder']",
        "component = components.get('unet')",
        "if table.startswith('kerascv'): pass",
        "title = {'kerascv': 'KerasCV'}[layout]",
        "TITLES = {'kerascv': 'KerasCV'}",
        "TITLES: dict[str, str] = {'sdxl': 'SDXL'}",
    ],
)
def test_a_name_that_decides_is_found(source: str) -> None:
    assert len(decided(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "write(layout='diffusers')",
        "if self.library == 'diffusers': pass",
        "if family == family.name: pass",
        "index = read({'unet': 1})",
        "default = 'diffusers'",
        "if kind == 'zip': pass",
        "to: Literal['diffusers', 'ldm'] = 'diffusers'",
        "STEMS = {'diffusers': 'x', 'transformers': 'y'}",
    ],
)
def test_a_name_that_is_given_is_not(source: str) -> None:
    assert decided(source) == []
