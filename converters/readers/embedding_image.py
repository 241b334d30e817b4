"""Embeddings of textual inversion in a picture, as AUTOMATIC1111 writes them.

A text chunk holds JSON in base64. Older pictures hold it in their pixels: at the left the lower and
at the right the upper halves of the bytes of a zlib stream, in the lower four bits of each channel,
beyond a black column each. Source: modules/textual_inversion/image_embedding.py.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from ...errors import ConversionError, printable
from ...io.arrays import Array
from ...io.documents import parse_json
from ..checkpoint import Checkpoint, Computed, SourceFile, Tensor
from .png import Png, read_png

CHUNK = "sd-ti-embedding"
PARAMETERS = "string_to_param"
TENSOR = "TORCHTENSOR"
"""The key of an object that is a tensor."""

_MAX_JSON = 32 << 20
_FACTOR = 1664525
_SUMMAND = 1013904223
_MODULUS = 1 << 32


def read_embedding_image(path: Path) -> Checkpoint | None:
    """The embedding in a PNG, by the names of the same in a pickle; None if there is none.

    Raises:
        ConversionError: picture or embedding are damaged.
    """
    picture = read_png(path)
    if CHUNK in picture.texts:
        try:
            packed = base64.b64decode(picture.texts[CHUNK], validate=True)
        except binascii.Error:
            raise ConversionError(f"{path}: its `{CHUNK}` is no base64") from None
    else:
        found = _hidden(picture)
        if found is None:
            return None
        packed = found
    content = parse_json(packed, path)
    parameters = content.get(PARAMETERS)
    if not isinstance(parameters, dict):
        raise ConversionError(f"{path}: the embedding in it has no `{PARAMETERS}`")
    tensors: dict[str, Tensor] = {}
    for name, value in parameters.items():
        key = f"{PARAMETERS}.{name}"
        tensors[key] = _tensor(key, value, path)
    said = {
        printable(key): printable(str(value))
        for key, value in content.items()
        if isinstance(value, str | int | float)
    }
    form = "PNG with an embedding"
    return Checkpoint(path, form, tensors, files=[SourceFile(path)], metadata=said)


def _tensor(name: str, value: object, path: Path) -> Tensor:
    """Numbers in float32, which the decimals of JSON hold exactly."""
    rows = value.get(TENSOR) if isinstance(value, Mapping) else None
    array: Array = np.zeros((), np.float32)
    with contextlib.suppress(ValueError, TypeError):
        array = np.array(rows, np.float32)
    if rows is None or array.ndim not in (1, 2):
        raise ConversionError(f"{path}: `{printable(name)}` in it is no tensor of vectors")
    return Computed(name, "F32", array.shape, (), partial(_same, array), "from the picture")


def _same(array: Array) -> Array:
    return array


# --- in pixels ------------------------------------------------------------------------------------


def _hidden(picture: Png) -> bytes | None:
    """What the pixels hold, if they hold anything."""
    pixels = picture.pixels()
    if pixels is None:
        return None
    nibbles = _cropped(pixels) & 0x0F
    columns = np.flatnonzero(nibbles.sum((0, 2), dtype=np.int64) == 0)
    if len(columns) < 2:
        return None
    low = _unmasked(nibbles[:, : columns[0]])
    high = _unmasked(nibbles[:, columns[-1] + 1 :])
    if low.shape != high.shape or not low.size:
        return None
    packed = ((high << 4) | low).tobytes()
    try:
        return zlib.decompressobj().decompress(packed, _MAX_JSON)
    except zlib.error:
        return None


def _cropped(pixels: Array) -> Array:
    """The pixels without a border of black."""
    bright: Array = np.all(pixels > 0, axis=2)
    rows = np.flatnonzero(bright.any(1))
    columns = np.flatnonzero(bright.any(0))
    if not len(rows):
        return pixels[:0]
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _unmasked(block: Array) -> Array:
    """Half bytes, less the random numbers that hide them."""
    mask = np.empty(block.size, np.uint8)
    seed = 0
    for i in range(len(mask)):
        seed = (_FACTOR * seed + _SUMMAND) % _MODULUS
        mask[i] = seed % 255
    clear: Array = block ^ (mask.reshape(block.shape) & 0x0F)
    return clear
