"""Refuses files and folders of other programs by name: `mappings/facts/containers.toml`."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from ...errors import ConversionError
from ...mappings.facts import facts
from ..checkpoint import Checkpoint, SourceFile
from ..planning.keys import brief
from ..readers.sniff import file_names, folder_names

_HEAD = 1024  # bytes that tell what a file is
_PREAMBLE = re.compile(r"\ufeff|\xef\xbb\xbf|\s|<\?[^>]*>|<!--.*?-->", re.DOTALL)
_ELEMENT = re.compile(r"<(!?[\w:.-]+)")
_DEPTH = 2  # folders in folders that are looked at
_ENTRIES = 10_000


def refuse_file(path: Path) -> NoReturn:
    """Say what a file is that holds no weights for us.

    Raises:
        ConversionError: always.
    """
    file = SourceFile(path)
    try:
        head = file.read(0, min(file.size, _HEAD))
    finally:
        file.close()
    text = head.decode("latin-1")
    for pattern, meaning in facts("containers")["first"].items():
        if re.match(pattern, text, re.DOTALL):
            raise ConversionError(_said(path, meaning))
    if element := _ELEMENT.match(_without_preamble(text)):
        known = facts("containers")["elements"]
        meaning = known.get(element[1].lower(), "an XML file, not a checkpoint")
        raise ConversionError(_said(path, meaning))
    is_text = all(byte >= 0x20 or byte in b"\t\r\n" for byte in head)
    kind = "a text file" if is_text else "in no format known here"
    raise ConversionError(f"{path}: {kind}, not a checkpoint")


def refuse_contents(checkpoint: Checkpoint, place: Path | None = None) -> None:
    """Refuse weights that are not there, and those of another framework.

    Args:
        place: what messages name, if not the file.

    Raises:
        ConversionError: it holds such weights.
    """
    _refuse_hollow(checkpoint, place or checkpoint.path)
    _refuse_turned(checkpoint, place or checkpoint.path)


def _refuse_hollow(checkpoint: Checkpoint, place: Path) -> None:
    """Refuse weights without elements."""
    known = facts("containers")["hollow"]
    empty = [key for key, tensor in checkpoint.tensors.items() if 0 in tensor.shape]
    hollow = [key for pattern in known["tensors"] for key in fnmatch.filter(empty, pattern)]
    if hollow:
        raise ConversionError(f"{place}: {len(hollow)} tensors {known['reason']}: {brief(hollow)}")


def _refuse_turned(checkpoint: Checkpoint, path: Path) -> None:
    """Refuse weights whose matrices may lie the other way round.

    Where a matrix is square its shape tells nothing: the container must.
    """
    known = facts("containers")
    for pattern, meaning in known["entries"].items():
        if fnmatch.filter([*checkpoint.tensors, *checkpoint.skipped], pattern):
            raise ConversionError(_said(path, meaning))
    header = checkpoint.metadata.get("format", "")
    if header in known["formats"]:
        raise ConversionError(_said(path, known["formats"][header]))
    bare = known["arrays"]
    if checkpoint.format not in bare["formats"] and header not in bare["headers"]:
        return
    shapes = [tensor.shape for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2]
    if shapes and all(rows == columns for rows, columns in shapes):
        raise ConversionError(_said(path, bare["reason"]))


def refuse_archive(path: Path) -> None:
    """Name a zip archive of another program.

    Raises:
        ConversionError: it is one.
    """
    from ..readers.archives import zip_members

    file = SourceFile(path)
    try:
        names = list(zip_members(file))
    except ConversionError:
        return  # its reader says what is wrong with it
    finally:
        file.close()
    _refuse(path, names, "members")


def refuse_folder(path: Path) -> None:
    """Name a folder of another program.

    Raises:
        ConversionError: it is one.
    """
    _refuse(path, _entries(path, _DEPTH), "folders")


def _refuse(path: Path, names: Iterable[str], kind: str) -> None:
    found = list(itertools.islice(names, _ENTRIES))
    for pattern, meaning in facts("containers")[kind].items():
        if fnmatch.filter(found, pattern):
            raise ConversionError(_said(path, meaning))


def _entries(folder: Path, depth: int) -> Iterable[str]:
    """The names in a folder, and in the folders in it."""
    yield from file_names(folder)
    for name in folder_names(folder):
        yield name
        if depth:
            yield from _entries(folder / name, depth - 1)


def _without_preamble(text: str) -> str:
    """The text from its first element on."""
    at = 0
    while found := _PREAMBLE.match(text, at):
        at = found.end()
    return text[at:]


def _said(path: Path, meaning: str) -> str:
    return f"{path}: {meaning.replace('{path}', str(path))}"
