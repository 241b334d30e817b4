"""A picture with an embedding inside: a plain PNG with AUTOMATIC1111's text chunk."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import Tensor

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNK = b"sd-ti-embedding"
_SIDE = 64  # pixels
_GREY = 200


def write_embedding_image(path: Path, content: Mapping[str, Any]) -> None:
    """Write what the embedding's pickle would hold as a grey picture with JSON in it."""
    text = base64.b64encode(json.dumps(_plain(content)).encode())
    rows = (b"\0" + bytes([_GREY]) * _SIDE) * _SIDE
    head = struct.pack(">IIBBBBB", _SIDE, _SIDE, 8, 0, 0, 0, 0)
    chunks = {
        b"IHDR": head,
        b"tEXt": _CHUNK + b"\0" + text,
        b"IDAT": zlib.compress(rows, 9),
        b"IEND": b"",
    }
    path.write_bytes(_SIGNATURE + b"".join(_chunk(*one) for one in chunks.items()))


def _chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def _plain(value: Any) -> Any:
    """The same of what JSON is made of; decimals hold float32 exactly."""
    if isinstance(value, Tensor):
        return {"TORCHTENSOR": value.numpy().astype("float32").tolist()}
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return value
