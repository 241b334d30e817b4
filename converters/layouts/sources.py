"""Opens what the user names: the only place that chooses among the layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Protocol, cast

from ...errors import ConversionError
from ..checkpoint import Checkpoint
from ..readers.listed import KINDS as LISTED
from ..readers.sniff import KERAS
from .folders import left_beside, located, weight_files
from .foreign import refuse_archive, refuse_contents, refuse_folder
from .ldm_configs import stated_configs
from .source import Source
from .unsupported import refuse_unsupported


class Layout(Protocol):
    """What a module of this folder offers."""

    def reads(self, source: Source) -> bool:
        """Whether the source is in this layout."""

    def parts(self, source: Source) -> list[Checkpoint]:
        """The components that the source holds.

        Raises:
            ConversionError: nothing readable is there.
        """


LAYOUTS: dict[str, Sequence[str]] = {
    "kerashub": KERAS,
    "kerascv": (*KERAS, "tensorflow"),
    "ldm": LISTED,
    "diffusers": (*LISTED, "repo", "model"),
}
"""Name -> the kinds of sources that may be in it; asked in this order.

Its module is imported for the first such source.
"""


def open_source(source: Source) -> list[Checkpoint]:
    """The components that a path holds.

    Raises:
        ConversionError: nothing readable is there, or a model that is not supported.
    """
    path = located(source.path, source.revision)
    if path != source.path:
        source = replace(source, path=path)
    _refuse_changes(source)
    if source.kind == "zip":
        refuse_archive(source.path)
    if source.kind == "folder":
        return _files(source)
    if source.raw is not None:
        refuse_contents(source.raw)
        refuse_unsupported(source.raw, configured=bool(stated_configs(source.raw.metadata)))
    asked = (_layout(name) for name, kinds in LAYOUTS.items() if source.kind in kinds)
    return next(layout for layout in asked if layout.reads(source)).parts(source)


def _layout(name: str) -> Layout:
    return cast(Layout, import_module(f".{name}", __package__))


def _refuse_changes(source: Source) -> None:
    """Refuse what changes models where one is expected.

    Raises:
        ConversionError: it is an adapter or an embedding; says what to do with it.
    """
    if source.is_embedding:
        raise ConversionError(
            f"{source.path}: a textual inversion, new words for a model rather than a model; put it"
            " into one with `weightport convert MODEL --embedding FILE`, or write it for another"
            " program: `--to diffusers`, `--to a1111`, ..."
        )
    if source.is_adapter:
        raise ConversionError(
            f"{source.path}: an adapter, which changes a model rather than being one; put it into"
            " a model with `weightport convert MODEL --lora FILE`, or into another convention with"
            " `--to kohya`, `--to peft`, ..."
        )


def _files(folder: Source) -> list[Checkpoint]:
    """The components in the files of a folder without configs, such as a training program leaves.

    Raises:
        ConversionError: there are none.
    """
    files = weight_files(folder.path)
    if not any(file.suffix == ".safetensors" for file in files):
        refuse_folder(folder.path)
    if not files:
        raise ConversionError(
            f"{folder.path}: a folder, but neither a diffusers repo nor a SavedModel or TensorFlow"
            " checkpoint, and without weights in it"
        )
    parts = []
    for file in files:
        parts += open_source(replace(folder, path=file, revision=None))
    parts[0].skipped.update(left_beside(folder.path))
    return parts
