"""The tokenizer folder of T5, which Stable Diffusion 3 and Flux encode prompts with.

One file defines it, `tokenizer.json`, which transformers 4 and 5 and `tokenizers` load. It is a
constant, the Unigram model of Google's T5 v1.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...io.config_files import write_json
from .packaged import unpacked

CLASS_NAME = "T5TokenizerFast"
"""What `model_index.json` calls it."""

MAX_LENGTH = 512
_SENTINELS = 100  # tokens for masked spans, <extra_id_0> and so on
_ROLES = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def write_t5_tokenizer(folder: Path) -> list[Path]:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.

    Args:
        folder: created if missing.

    Returns:
        The files, in the order they were written.

    Raises:
        ConversionError: the packaged data is damaged; nothing is written.
    """
    content = unpacked("t5_tokenizer.json")
    folder.mkdir(parents=True, exist_ok=True)
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    files = [folder / name for name in names]
    files[0].write_bytes(content)
    write_json(files[1], _config())
    write_json(files[2], _special_tokens())
    return files


def _config() -> dict[str, Any]:
    return {
        **_special_tokens(),
        "extra_ids": _SENTINELS,
        "model_max_length": MAX_LENGTH,
        "tokenizer_class": "T5Tokenizer",
    }


def _special_tokens() -> dict[str, Any]:
    sentinels = [f"<extra_id_{number}>" for number in range(_SENTINELS)]
    return {**_ROLES, "additional_special_tokens": sentinels}
