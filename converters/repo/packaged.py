"""The packaged data of tokenizers, compressed; `mappings/tokenizer/LICENSE` says whose they
are."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from importlib import resources

from ... import mappings
from ...errors import ConversionError

_SHA256 = {  # unpacked
    "clip_vocab.json": "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349",
    "clip_bpe_merges.txt": "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02",
    "t5_tokenizer.json": "6cd1badb7467cdab971403bbeb1945070ca385652385a2b6549f672b08089dfc",
}


def unpacked(name: str) -> Iterator[bytes]:
    """The content of a packaged file, in pieces.

    Raises:
        ConversionError: the installed data file is damaged; known after the last piece.
    """
    packed = resources.files(mappings) / "tokenizer" / f"{name}.gz"
    digest = hashlib.sha256()
    with (
        contextlib.suppress(OSError, EOFError, zlib.error),
        packed.open("rb") as file,
        gzip.open(file) as content,
    ):
        while piece := content.read(1 << 16):
            digest.update(piece)
            yield piece
    if digest.hexdigest() != _SHA256[name]:
        raise ConversionError(
            f"{packed}: the data of a tokenizer is missing or damaged; reinstall weightport"
        )
