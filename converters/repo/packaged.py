"""The packaged data of tokenizers, compressed; `mappings/tokenizer/LICENSE` says whose they
are."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

from ... import mappings
from ...errors import ConversionError

FOLDER = Path(mappings.__file__).parent / "tokenizer"
_GZIP = 16 + zlib.MAX_WBITS
_SHA256 = {  # unpacked
    "clip_vocab.json": "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349",
    "clip_bpe_merges.txt": "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02",
    "t5_tokenizer.json": "6cd1badb7467cdab971403bbeb1945070ca385652385a2b6549f672b08089dfc",
}


def unpacked(name: str) -> bytes:
    """The content of a packaged file, 0.5 to 2.4 MB.

    Raises:
        ConversionError: the installed data file is damaged.
    """
    packed = FOLDER / f"{name}.gz"
    try:
        content = zlib.decompress(packed.read_bytes(), _GZIP)
    except (OSError, zlib.error):
        content = b""
    if hashlib.sha256(content).hexdigest() != _SHA256[name]:
        raise ConversionError(
            f"{packed}: the data of a tokenizer is missing or damaged; reinstall weightport"
        )
    return content
