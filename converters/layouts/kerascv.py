"""Every file that a KerasCV user has, read without Keras, TensorFlow or HDF5 libraries.

Legacy `.h5` and whole-model `.h5`, `.weights.h5` in its layouts, `.keras` archives, sharded
`.weights.json`, TensorFlow checkpoints, SavedModels and Keras 3 exports. Keys are canonical (see
kerascv_layers.py); optimizer state is skipped, and every skipped tensor is named with the reason.
See docs/formats.md.
"""

from __future__ import annotations

from ...errors import ConversionError
from ..checkpoint import Checkpoint
from .kerascv_hdf5 import read_saved
from .kerascv_tensorflow import read_tensorflow
from .source import Source

_READERS = {
    "hdf5": read_saved,
    "zip": read_saved,
    "json": read_saved,
    "tensorflow": read_tensorflow,
}


def reads(source: Source) -> bool:
    """Whether the source is a file or folder that Keras writes."""
    return source.kind in _READERS


def parts(source: Source) -> list[Checkpoint]:
    """The components in a Keras file.

    Raises:
        ConversionError: the file is damaged, hostile, or holds no layers of a Stable Diffusion
            component.
    """
    components = _READERS[source.kind](source)
    if not components:
        raise ConversionError(
            f"{source.path}: a Keras file, but none of its layers belong to a KerasCV Stable"
            " Diffusion component"
        )
    if len(components) == 1:
        components[0].root = ""  # nothing to tell apart
    return components
