"""Opens what the user names: the only place that chooses among the layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from ...errors import ConversionError
from ..checkpoint import Checkpoint
from . import diffusers, kerascv, kerashub, ldm
from .adapters import refuse_adapter
from .embeddings import refuse_embedding
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


LAYOUTS: dict[str, Layout] = {
    "kerashub": kerashub,
    "kerascv": kerascv,
    "ldm": ldm,
    "diffusers": diffusers,
}
"""Name -> the module; asked in this order."""


def open_source(source: Source) -> list[Checkpoint]:
    """The components that a path holds.

    Raises:
        ConversionError: nothing readable is there, or a model that is not supported.
    """
    path = located(source.path, source.revision)
    if path != source.path:
        source = replace(source, path=path)
    refuse_embedding(source)
    refuse_adapter(source)
    if source.kind == "zip":
        refuse_archive(source.path)
    if source.kind == "folder":
        return _files(source)
    if source.raw is not None:
        refuse_contents(source.raw)
        refuse_unsupported(source.raw, configured=bool(stated_configs(source.raw.metadata)))
    layout = next(layout for layout in LAYOUTS.values() if layout.reads(source))
    return layout.parts(source)


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
