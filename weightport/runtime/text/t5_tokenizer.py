"""`T5Tokenizer`: T5's Unigram model on the `tokenizers` library, with transformers' ids.

Raffel et al. 2020, https://arxiv.org/abs/1910.10683.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self, Unpack

import torch

from ...errors import printable
from ...io.atomic import merged
from ...io.config_files import write_json
from ..loading.source import Place, PlaceOptions, StrPath, open_source
from .prompt_tokenizer import UNKNOWN, PromptTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROLES = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
MAX_LENGTH = 512


class T5Tokenizer(PromptTokenizer):
    """Text to the token ids of T5's encoder, and back.

    Args:
        backend: the content of a `tokenizer.json`.
        config: that of the `tokenizer_config.json` beside it.

    Raises:
        ValueError: a special token is not in the vocabulary.
    """

    def __init__(self, backend: Tokenizer, config: Mapping[str, Any] | None = None) -> None:
        given = config or {}
        length = given.get("model_max_length") or MAX_LENGTH
        self.backend = backend
        self.model_max_length = length if length < UNKNOWN else MAX_LENGTH
        self.backend.no_truncation()
        self.backend.no_padding()
        self.eos_token = _content(given.get("eos_token", ROLES["eos_token"]))
        self.unk_token = _content(given.get("unk_token", ROLES["unk_token"]))
        self.pad_token = _content(given.get("pad_token", ROLES["pad_token"]))
        self.eos_token_id = self._special_id(self.eos_token)
        self.unk_token_id = self._special_id(self.unk_token)
        self.pad_token_id = self._special_id(self.pad_token)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Place, **options: Unpack[PlaceOptions]
    ) -> Self:
        """Read `tokenizer.json` and the config beside it.

        Raises:
            OSError: the file is not there.
            ValueError: a file is damaged.
        """
        from tokenizers import Tokenizer

        source = open_source(pretrained_model_name_or_path, **options)
        name = "tokenizer_config.json"
        config = source.json(name, "tokenizer_config") if name in source.names else {}
        text = source.text("tokenizer.json")
        try:
            return cls(Tokenizer.from_str(text), config)
        except Exception as error:  # `tokenizers` raises nothing more special
            raise ValueError(
                f"{source.name}: the tokenizer cannot be read: {printable(error)}"
            ) from error

    def save_pretrained(self, save_directory: StrPath) -> None:
        """Write `tokenizer.json` and its config, as transformers 4 and 5 read them."""
        special = {role: getattr(self, role) for role in ROLES}
        sentinels = [token for token in self.added_tokens_encoder if token.startswith("<extra_id_")]
        config = {
            **special,
            "extra_ids": len(sentinels),
            "model_max_length": self.model_max_length,
            "tokenizer_class": "T5Tokenizer",
        }
        with merged(save_directory) as staging:
            self.backend.save(str(staging / "tokenizer.json"))
            write_json(staging / "tokenizer_config.json", config)
            write_json(staging / "special_tokens_map.json", special)

    def _ids(self, text: str, wrapped: bool, limit: int | None) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        if not wrapped:
            return ids[:limit]
        if limit is not None:
            ids = ids[: max(limit - 1, 0)]
        return [*ids, self.eos_token_id]

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of some ids."""
        ids = torch.as_tensor(ids).reshape(-1).tolist()
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def cut_off(self, text: str, max_length: int | None = None) -> str:
        """What truncation to `max_length`, by default `model_max_length`, takes off a text."""
        limit = max_length or self.model_max_length
        ids = self._ids(text, True, None)
        return self.decode(ids[limit - 1 : -1])

    def _special_id(self, token: str) -> int:
        id_ = self.backend.token_to_id(token)
        if id_ is None:
            raise ValueError(f"the vocabulary has no {token!r}")
        return id_


def _content(token: str | Mapping[str, Any]) -> str:
    """A special token in either spelling of the configs."""
    return token if isinstance(token, str) else str(token["content"])
