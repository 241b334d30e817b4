"""Where tables lie: `tables/kerascv/unet.toml` is the table `kerascv_unet`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from .errors import MappingError
from .table import Table

FOLDER = Path(__file__).resolve().parent / "tables"


@cache
def all_tables() -> tuple[Table, ...]:
    """Every table that reads a part of a checkpoint, by name.

    Those that only serve others name no part.
    """
    names = sorted(_name(path) for path in FOLDER.glob("*/*.toml"))
    tables = (load_table(name) for name in names)
    return tuple(table for table in tables if "part" in table.about)


def load_table(name: str, folder: Path = FOLDER) -> Table:
    """Load a table, and whatever it extends, from a folder or the folders in it.

    Raises:
        MappingError: no such table, or a part of it that cannot be read.
    """
    return loaded(name, folder)


@cache
def loaded(name: str, folder: Path) -> Table:
    """The same; each is read once, for whom it is asked for and for those that extend it."""
    try:
        text = _file(name, folder).read_bytes()
        return Table.parse(name, text, lambda base: loaded(base, folder))
    except MappingError:
        raise
    except (OSError, ValueError) as error:
        raise MappingError(f"table {name}: {error}") from None


def _name(path: Path) -> str:
    """The name of a table: folder and stem, or the stem alone where they are the same."""
    return "_".join(dict.fromkeys([path.parent.name, path.stem]))


def _file(name: str, folder: Path) -> Path:
    """The file of a table; one that is not there if there is none."""
    words = name.split("_")
    places = [folder / name / f"{name}.toml"]
    for count in range(1, len(words)):
        layout = "_".join(words[:count])
        stem = "_".join(words[count:])
        places.append(folder / layout / f"{stem}.toml")
    return next((place for place in places if place.is_file()), folder / f"{name}.toml")
