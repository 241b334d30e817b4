"""Who imports whom, read from the source: imports inside functions and for type checkers count as well."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import resolve_name
from pathlib import Path

PACKAGE = "weightport"
Graph = dict[str, set[str]]


def module_files(root: Path) -> dict[str, Path]:
    """Name of every module of the package, without `weightport.`, -> its file in the checkout.

    The package itself is the name `""`; the runners of parity are scripts, no modules.
    """
    found = {}
    for top in ("converters", "mappings", PACKAGE):
        for path in sorted((root / top).rglob("*.py")):
            if "runners" in path.parts:
                continue
            parts = list(path.relative_to(root).with_suffix("").parts)
            if parts[0] == PACKAGE:
                parts.pop(0)
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts)] = path
    return found


def imported_names(source: str, package: str) -> set[str]:
    """Absolute dotted names of everything that a module of `package` imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def own_modules(names: Iterable[str], modules: Iterable[str]) -> set[str]:
    """The modules of ours that hold these names; a name of the package itself is the module `""`."""
    known = set(modules)
    found = set()
    for name in names:
        top, _, rest = name.partition(".")
        if top != PACKAGE:
            continue
        while rest not in known:
            rest = rest.rpartition(".")[0]
        found.add(rest)
    return found


def import_graph(root: Path) -> Graph:
    """Module -> the modules of ours that it imports."""
    files = module_files(root)
    graph = {}
    for name, path in files.items():
        parts = [PACKAGE, *name.split(".")] if name else [PACKAGE]
        if path.name != "__init__.py":
            parts.pop()
        names = imported_names(path.read_text(), ".".join(parts))
        graph[name] = own_modules(names, files) - {name}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by whatever way (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = len(order)
        low[module] = order[module]
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in order:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            start = stack.index(module)
            group = stack[start:]
            del stack[start:]
            if len(group) > 1:
                found.append(sorted(group))

    for module in graph:
        if module not in order:
            visit(module)
    return found


def longest_path(graph: Mapping[str, set[str]]) -> list[str]:
    """The longest chain of imports, from the top down; the graph has no circle."""
    chains: dict[str, list[str]] = {}

    def chain(module: str) -> list[str]:
        if module not in chains:
            below = max((chain(other) for other in graph[module]), key=len, default=[])
            chains[module] = [module, *below]
        return chains[module]

    return max((chain(module) for module in graph), key=len)


def within(module: str, folders: Iterable[str]) -> bool:
    """Whether a module is one of these, or lies in one of them."""
    return any(module == folder or module.startswith(f"{folder}.") for folder in folders)


def room(module: str, rooms: Iterable[str]) -> str | None:
    """The innermost of the rooms that a module lies in."""
    around: Iterator[str] = (name for name in rooms if within(module, [name]))
    return max(around, key=len, default=None)
