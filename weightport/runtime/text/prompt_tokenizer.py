"""What the tokenizers share: texts become ids of one length, and ids texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch

from ..loading.config import Attributes

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

UNKNOWN = 10**6  # a model_max_length above this is transformers' way to say that there is none


class Encoding(Attributes):
    """What tokenizer and image processor return."""

    def to(self, device: torch.device | str) -> Self:
        """The same with its tensors on `device`."""
        return type(self)({key: value.to(device) for key, value in self.items()})


class PromptTokenizer(ABC):
    """Text to the token ids of a text encoder, and back.

    Attributes:
        backend: the tokenizer of the library `tokenizers` that does the work.
        model_max_length: the ids that fit into the text encoder, special ones among them.
    """

    library: ClassVar[str] = "transformers"
    backend: Tokenizer
    model_max_length: int
    pad_token_id: int
    unk_token_id: int

    @classmethod
    def when_used(cls, read: Callable[[], Self]) -> Self:
        """A tokenizer that is read when something of it is first asked for."""
        tokenizer = cls.__new__(cls)
        vars(tokenizer)["_read"] = read
        return tokenizer

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            read = vars(self).get("_read")
            if read is None:  # another thread was here first, or there is no such thing
                return object.__getattribute__(self, name)
            made = read()
            vars(self).update({**vars(made), **vars(self)})
            vars(self).pop("_read", None)
            return getattr(made, name)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | Literal["max_length", "longest", "do_not_pad"] = False,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: Literal["pt"] | None = None,
    ) -> Encoding:
        """Encode one text or several.

        Args:
            text: the prompts; a plain string gives plain lists of ids, or one row with
                `return_tensors`.
            padding: to `max_length`, or to the longest text.
            truncation: keep the first ids and the end token where there are more than `max_length`.
            max_length: `model_max_length` by default.
            add_special_tokens: put the special tokens before and after each text.
            return_tensors: "pt" for int64 tensors (texts, ids).

        Returns:
            `input_ids`, and `attention_mask`: 1 on tokens, 0 on padding.

        Raises:
            ValueError: texts of different lengths cannot become one tensor.
        """
        limit = max_length or self.model_max_length
        cut = limit if truncation else None
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self._ids(one, add_special_tokens, cut) for one in texts]
        longest = max(map(len, rows), default=0)
        width = {"max_length": limit, "longest": longest, True: longest}.get(padding, 0)
        masks = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        rows = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
        columns: dict[str, Any] = {"input_ids": rows, "attention_mask": masks}
        if return_tensors is not None:
            if len({len(row) for row in rows}) > 1:
                raise ValueError(
                    "the texts have different numbers of tokens: padding=True makes one tensor of"
                    " them"
                )
            columns = {
                name: torch.tensor(column, dtype=torch.int64) for name, column in columns.items()
            }
        elif isinstance(text, str):
            columns = {name: column[0] for name, column in columns.items()}
        return Encoding(columns)

    @abstractmethod
    def _ids(self, text: str, wrapped: bool, limit: int | None) -> list[int]:
        """The ids of a text, with special tokens if it is to be wrapped, at most `limit`."""

    @abstractmethod
    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of some ids."""

    @abstractmethod
    def cut_off(self, text: str, max_length: int | None = None) -> str:
        """What truncation to `max_length`, by default `model_max_length`, takes off a text."""

    def batch_decode(
        self, rows: Iterable[Iterable[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """The text of each row of ids."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text, without those at its start and end."""
        tokens: list[str] = self.backend.encode(text, add_special_tokens=False).tokens
        return tokens

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text."""
        return self._ids(text, add_special_tokens, None)

    def add_tokens(
        self, tokens: str | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Give the next ids to tokens that are not known yet; returns how many there were."""
        tokens = [tokens] if isinstance(tokens, str) else list(tokens)
        if special_tokens:
            return self.backend.add_special_tokens(tokens)
        return self.backend.add_tokens(tokens)

    def remove_tokens(self, tokens: Sequence[str] | None = None) -> list[int]:
        """Forget added tokens, by default all but special ones; later ones move up.

        Returns:
            The ids that stay, in order: the rows to keep of a text encoder's table.

        Raises:
            ValueError: a token was not added.
        """
        added = self.backend.get_added_tokens_decoder()
        removable = {token.content: id_ for id_, token in added.items() if not token.special}
        names = list(removable) if tokens is None else list(tokens)
        if unknown := [name for name in names if name not in removable]:
            raise ValueError(f"{unknown[0]!r} is not an added token")
        gone = {removable[name] for name in names}
        kept = [id_ for id_ in range(len(self)) if id_ not in gone]
        self.backend = _with_tokens(
            self.backend, [token for id_, token in sorted(added.items()) if id_ not in gone]
        )
        return kept

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """The id of a token, or of each; that of `unk_token` where there is none."""
        if isinstance(tokens, str):
            return self._id(tokens)
        return [self._id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str]:
        """The token of an id, or of each."""
        if isinstance(ids, int):
            return str(self.backend.id_to_token(ids))
        return [str(self.backend.id_to_token(int(one))) for one in ids]

    def _id(self, token: str) -> int:
        id_ = self.backend.token_to_id(token)
        return self.unk_token_id if id_ is None else id_

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, added tokens too."""
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Special and added token -> id, in the order of the ids."""
        added = sorted(self.backend.get_added_tokens_decoder().items())
        return {token.content: id_ for id_, token in added}

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)


def _with_tokens(backend: Tokenizer, tokens: Iterable[AddedToken]) -> Tokenizer:
    """The same tokenizer with these added tokens alone, their ids one after the other."""
    from tokenizers import Tokenizer

    made = Tokenizer(backend.model)
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        part = getattr(backend, name)
        if part is not None:
            setattr(made, name, part)
    for are_special, group in groupby(tokens, key=attrgetter("special")):
        add = made.add_special_tokens if are_special else made.add_tokens
        add(list(group))
    return made
