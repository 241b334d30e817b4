"""`CLIPTokenizer`: byte-pair encoding on the `tokenizers` library, with transformers' ids.

The algorithm is CLIP's (`clip/simple_tokenizer.py`, https://github.com/openai/CLIP) in the terms of
that library, which is imported with the first tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, Unpack

import torch

from ...errors import printable
from ...io.atomic import merged
from ...io.config_files import write_json
from ..loading.source import Place, PlaceOptions, Source, StrPath, open_source
from .prompt_tokenizer import UNKNOWN, PromptTokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

START = "<|startoftext|>"
END = "<|endoftext|>"
WORD_END = "</w>"
ROLES = {  # in the order of their addition
    "bos_token": START,
    "eos_token": END,
    "unk_token": END,
    "pad_token": END,
}
# the names that transformers 4 and 5 give a list
EXTRA = ("additional_special_tokens", "extra_special_tokens")
MAX_LENGTH = 77
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class CLIPTokenizer(PromptTokenizer):
    """Text to the token ids of CLIP's text encoder, and back.

    Args:
        vocab: token -> id.
        merges: pairs of symbols, the most frequent first.
        special_tokens: `bos_token`, `eos_token`, `unk_token` and `pad_token`, where they are not
            CLIP's, and others.
        added_tokens: id -> token that matches anywhere in a text.
        model_max_length: the ids that fit into the text encoder, the start and end token among
            them.

    Raises:
        ValueError: an added token has an id that is not the next one.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        *,
        special_tokens: Mapping[str, str | AddedToken] | None = None,
        added_tokens: Mapping[int, AddedToken] | None = None,
        model_max_length: int = MAX_LENGTH,
    ) -> None:
        roles = {**ROLES, **(special_tokens or {})}
        special = {role: _token(token, special=True) for role, token in roles.items()}
        added = dict(sorted((added_tokens or {}).items()))
        given = {token.content for token in added.values()}
        others = [token for token in special.values() if token.content not in given]
        self.model_max_length = model_max_length
        self.vocab_size = len(vocab)
        self.backend = _backend(vocab, merges, special["unk_token"].content)
        self.backend.add_tokens([*added.values(), *others])
        for id_, token in added.items():
            place = self.backend.token_to_id(token.content)
            if place != id_:
                raise ValueError(
                    f"the added token {token.content!r} is said to have id {id_}, but gets {place}"
                )
        self.bos_token = special["bos_token"].content
        self.eos_token = special["eos_token"].content
        self.unk_token = special["unk_token"].content
        self.pad_token = special["pad_token"].content
        self.bos_token_id = self._id(self.bos_token)
        self.eos_token_id = self._id(self.eos_token)
        self.unk_token_id = self._id(self.unk_token)
        self.pad_token_id = self._id(self.pad_token)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Place, **options: Unpack[PlaceOptions]
    ) -> Self:
        """Read `tokenizer.json`, or else `vocab.json` and `merges.txt`, with configs beside them.

        Raises:
            OSError: the files are not there.
            ValueError: a file is damaged.
        """
        source = open_source(pretrained_model_name_or_path, **options)
        try:
            return cls._from_source(source)
        except OSError:
            raise
        except Exception as error:  # `tokenizers` raises nothing more special
            if str(error).startswith(source.name):
                raise  # it says which file
            raise ValueError(
                f"{source.name}: the tokenizer cannot be read: {printable(error)}"
            ) from error

    @classmethod
    def _from_source(cls, source: Source) -> Self:
        from tokenizers import AddedToken

        def read(name: str, schema: str) -> dict[str, Any]:
            return source.json(name, schema) if name in source.names else {}

        config = read("tokenizer_config.json", "tokenizer_config")
        whole = read("tokenizer.json", "tokenizer")
        if "added_tokens_decoder" in config:  # the record of transformers 4.34 and later: complete
            recorded = config["added_tokens_decoder"]
            added = {int(id_): _token(token) for id_, token in recorded.items()}
        else:
            config |= read("special_tokens_map.json", "tokenizer_config")
            special = {token.content for token in _special_tokens(config).values()}
            beyond = read("added_tokens.json", "vocabulary")
            added = {id_: AddedToken(text, special=text in special) for text, id_ in beyond.items()}
            added |= {token["id"]: _token(token) for token in whole.get("added_tokens", ())}
        if whole:
            vocab = whole["model"]["vocab"]
            merges = [_pair(merge) for merge in whole["model"]["merges"]]
        else:
            vocab = source.json("vocab.json", "vocabulary")
            merges = _merges(source.text("merges.txt"))
        length = config.get("model_max_length", MAX_LENGTH)
        length = length if length < UNKNOWN else MAX_LENGTH
        return cls(
            vocab,
            merges,
            special_tokens=_special_tokens(config),
            added_tokens=added,
            model_max_length=length,
        )

    def save_pretrained(self, save_directory: StrPath) -> None:
        """Write `vocab.json`, `merges.txt` and their configs, as transformers 4 and 5 read them."""
        special = {role: getattr(self, role) for role in ROLES}
        added = self.backend.get_added_tokens_decoder()
        beyond = {token.content: id_ for id_, token in added.items() if id_ >= self.vocab_size}
        config = {
            "added_tokens_decoder": {
                str(id_): token.__getstate__() for id_, token in added.items()
            },
            "model_max_length": self.model_max_length,
            "tokenizer_class": "CLIPTokenizer",
        }
        with merged(save_directory) as staging:
            self.backend.model.save(str(staging))
            write_json(staging / "tokenizer_config.json", config | special)
            write_json(staging / "special_tokens_map.json", special)
            if beyond:
                write_json(staging / "added_tokens.json", beyond)

    def _ids(self, text: str, wrapped: bool, limit: int | None) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        if not wrapped:
            return ids[:limit]
        if limit is not None:
            ids = ids[: max(limit - 2, 0)]
        return [self.bos_token_id, *ids, self.eos_token_id]

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of some ids: in lower case, and with single spaces."""
        ids = torch.as_tensor(ids).reshape(-1).tolist()
        text = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text.replace(WORD_END, " ").strip()

    def cut_off(self, text: str, max_length: int | None = None) -> str:
        """What truncation to `max_length`, by default `model_max_length`, takes off a text."""
        limit = max_length or self.model_max_length
        ids = self._ids(text, True, None)
        return self.decode(ids[limit - 1 : -1])


def _backend(vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str) -> Tokenizer:
    """The pipeline of a text: normalise, split into words, merge the bytes of each word."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    bpe = models.BPE(
        vocab, merges, unk_token=unknown, continuing_subword_prefix="", end_of_word_suffix=WORD_END
    )
    backend = Tokenizer(bpe)
    clean = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    backend.normalizer = normalizers.Sequence(clean)
    words = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    letters = pre_tokenizers.ByteLevel(False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges(text: str) -> list[tuple[str, str]]:
    """The pairs in a `merges.txt`, a line for each below the version."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#version")]
    return [(left, right) for line in lines for left, right in [line.split(" ")]]


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """A merge in either spelling of `tokenizer.json`: "a b" or ["a", "b"]."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _special_tokens(config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The special tokens that a config names: those with a role, then the others."""
    special = {role: _token(config[role], special=True) for role in ROLES if config.get(role)}
    others = [_token(token, special=True) for name in EXTRA for token in config.get(name) or ()]
    return special | {token.content: token for token in others}


def _token(token: str | Mapping[str, Any] | AddedToken, **flags: bool) -> AddedToken:
    """A token in any spelling of the configs."""
    from tokenizers import AddedToken

    if isinstance(token, AddedToken):
        return token
    if isinstance(token, str):
        return AddedToken(token, **flags)
    options = {key: value for key, value in token.items() if key not in ("__type", "id")}
    return AddedToken(**options | flags)
