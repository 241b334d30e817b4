"""Textual inversion: words with embeddings of their own.

Gal et al. 2022, https://arxiv.org/abs/2208.01618. Files of every program are read; what they call
the vectors is in `mappings/facts/embeddings.toml`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...adapters.embeddings import Embedding, Share, read_embeddings, role_of, spelled
from ...adapters.marks import BUNDLED
from ...converters.readers.embedding_image import read_embedding_image
from ...converters.readers.signatures import is_picture
from ...errors import ConversionError
from ..loading.config import Config
from ..loading.pickles import as_torch, open_pickle, read_pickle
from ..loading.source import Place, Source, open_source
from ..loading.weights import read_tensors

NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")
UNNAMED = "*"
Embeddings = Place | Mapping[str, Any] | Tensor


class Encoder(NamedTuple):
    """A text encoder and its tokenizer, ours or transformers'.

    Attributes:
        name: of the component; empty where it is the only one that is meant.
    """

    name: str
    tokenizer: Any
    model: Any

    @property
    def table(self) -> nn.Embedding:
        """The vectors of its tokens."""
        table: nn.Embedding = self.model.get_input_embeddings()
        return table


class _Vectors(NamedTuple):
    """Of a token.

    Attributes:
        row: (d,), for the table of tokens.
        output: (d,), in place of what the text encoder answers.
    """

    row: Tensor
    output: Tensor | None


class _Word(NamedTuple):
    """A word to learn, and for messages where it comes from."""

    where: str
    embedding: Embedding[Tensor]


def load_textual_inversion(
    encoders: Sequence[Encoder],
    embeddings: Embeddings | Sequence[Embeddings],
    token: str | Sequence[str | None] | None = None,
    *,
    weight_name: str | None = None,
    **options: Any,
) -> None:
    """Give tokenizers new tokens and text encoders their vectors.

    All of them, or none if one is faulty.

    Several vectors become `token`, `token_1`, `token_2`, …; pipelines write them out in a prompt.
    Vectors that take the place of what a text encoder answers do so in pipelines, as in OneTrainer:
    the table of tokens has zeros for these.

    Args:
        encoders: what gets them: of several, each those that are for it.
        embeddings: a file, a folder or repository with `learned_embeds`, or what was in such a
            file, or the vectors (d,) or (n, d) alone; or a list of them.
        token: the token of each, in place of the one in the file; a list for one tensor (n, d)
            names its rows.
        weight_name: the file in a folder or repository.
        options: `subfolder`, and how to reach the Hub.

    Raises:
        OSError: there is no such file.
        ValueError: a file holds no embedding or one of another model, or a token is missing or
            known already.
    """
    items: list[Any] = list(embeddings) if isinstance(embeddings, (list, tuple)) else [embeddings]
    if isinstance(embeddings, Tensor) and not (token is None or isinstance(token, str)):
        items = list(embeddings)  # a token for each row
    tokens = [token] * len(items) if token is None or isinstance(token, str) else list(token)
    if len(tokens) != len(items):
        raise ValueError(f"{len(tokens)} tokens are given for {len(items)} embeddings")
    words: list[_Word] = []
    for item, name in zip(items, tokens, strict=True):
        words += _words(item, name, weight_name, options)
    learned: list[dict[str, _Vectors]] = [{} for _ in encoders]
    for word in words:
        for number, share in _distributed(word, encoders):
            known = encoders[number].tokenizer.get_vocab()
            rows = _rows(share)
            for one, vector in zip(spelled(word.embedding.token, len(rows)), rows, strict=True):
                if one in known or one in learned[number]:
                    raise ValueError(
                        f"{word.where}: the token {one!r} is in the vocabulary already; choose"
                        " another token"
                    )
                learned[number][one] = vector
    for encoder, found in zip(encoders, learned, strict=True):
        if found:
            _learn(encoder, found)


def _rows(share: Share[Tensor]) -> list[_Vectors]:
    """The vectors of each token."""
    if share.outputs is None:
        return [_Vectors(row, None) for row in _upright(share.vectors)]
    return [_Vectors(torch.zeros_like(row), row) for row in _upright(share.outputs)]


def _learn(encoder: Encoder, vectors: Mapping[str, _Vectors]) -> None:
    """Add tokens with their vectors."""
    tokenizer = encoder.tokenizer
    tokenizer.add_tokens(list(vectors))
    known = tokenizer.added_tokens_encoder
    table = encoder.table
    _enlarge(table, {known[one]: vector.row for one, vector in vectors.items()}, len(tokenizer))
    _tell_size(encoder.model, table.num_embeddings)
    outputs = {one: vector.output for one, vector in vectors.items() if vector.output is not None}
    if outputs:
        encoder.model.word_outputs = {**_outputs(encoder), **outputs}


def _outputs(encoder: Encoder) -> dict[str, Tensor]:
    """Token -> what stands in place of the text encoder's answer."""
    return getattr(encoder.model, "word_outputs", {})


def _distributed(word: _Word, encoders: Sequence[Encoder]) -> Iterator[tuple[int, Share[Tensor]]]:
    """Which text encoder gets which vectors: that of their name, or the first that is as wide.

    Raises:
        ValueError: some are for none of them.
    """
    taken: set[int] = set()
    shares = word.embedding.shares
    for share in shares:
        vectors = share.vectors
        width = vectors.shape[-1]
        fitting = [
            number
            for number, one in enumerate(encoders)
            if one.table.embedding_dim == width and number not in taken
        ]
        named = [number for number in fitting if role_of(encoders[number].name) == share.role]
        if not fitting and len(shares) > 1 and not encoders[0].name:
            continue  # one text encoder is meant, and the others' are not for it
        if not fitting:
            wide = " and ".join(str(one.table.embedding_dim) for one in encoders)
            raise ValueError(
                f"{word.where}: vectors {[*_upright(vectors).shape]} do not fit a text"
                f" encoder of {wide} channels"
            )
        number = (named or fitting)[0]
        taken.add(number)
        yield number, share
    if not taken:
        wide = str(encoders[0].table.embedding_dim)
        raise ValueError(f"{word.where}: none of its vectors fit a text encoder of {wide} channels")


def unload_textual_inversion(
    encoders: Sequence[Encoder], tokens: str | Sequence[str] | None = None
) -> None:
    """Take words out of tokenizers, and their vectors out of text encoders.

    Args:
        encoders: of several, each forgets those that it knows.
        tokens: which; by default all that were added.

    Raises:
        ValueError: a token was not added, or a tokenizer is another library's.
    """
    for encoder in encoders:
        if not hasattr(encoder.tokenizer, "remove_tokens"):
            raise ValueError("only a CLIPTokenizer of weightport can forget words")
    wanted = [tokens] if isinstance(tokens, str) else tokens
    known = [set(encoder.tokenizer.added_tokens_encoder) for encoder in encoders]
    for token in wanted or ():
        if not any(token in some for some in known):
            raise ValueError(f"{token!r} is not an added token")
    for encoder, some in zip(encoders, known, strict=True):
        mine = wanted if wanted is None else [token for token in wanted if token in some]
        if mine is None or mine:
            _forget(encoder, mine)


def _forget(encoder: Encoder, tokens: Sequence[str] | None) -> None:
    kept = encoder.tokenizer.remove_tokens(tokens)
    known = encoder.tokenizer.added_tokens_encoder
    outputs = {token: one for token, one in _outputs(encoder).items() if token in known}
    encoder.model.word_outputs = outputs
    table = encoder.table
    with torch.no_grad():
        rows = table.weight[kept]
    table.weight = nn.Parameter(rows, requires_grad=table.weight.requires_grad)
    table.num_embeddings = len(rows)
    _tell_size(encoder.model, len(rows))


def _tell_size(text_encoder: Any, size: int) -> None:
    """Let the config say how many tokens there are."""
    if isinstance(text_encoder.config, Config):
        text_encoder.register_to_config(vocab_size=size)
    else:
        text_encoder.config.vocab_size = size


@torch.no_grad()
def _enlarge(table: nn.Embedding, rows: Mapping[int, Tensor], size: int) -> None:
    old = table.weight
    new = old.new_zeros(max(size, len(old)), table.embedding_dim)
    new[: len(old)] = old
    for id_, vector in rows.items():
        new[id_] = vector
    table.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    table.num_embeddings = len(new)


def _upright(vectors: Tensor) -> Tensor:
    """Vectors (n, channels)."""
    return vectors[None] if vectors.ndim == 1 else vectors


# --- what is in a file ----------------------------------------------------------------------------


def _words(
    item: Any, token: str | None, weight_name: str | None, options: Mapping[str, Any]
) -> list[_Word]:
    """The words in one of the things that may be given.

    Raises:
        ValueError: there are none, or a word has no token.
    """
    if isinstance(item, Tensor):
        item = {UNNAMED: item}
    if isinstance(item, Mapping):
        return _several("the embedding", dict(_flat(item)), str(item.get("name") or ""), token)
    path = _path(item, weight_name, options)
    tensors, said = _content(path)
    return _several(str(path), tensors, said, token, path.stem)


def _several(
    where: str, tensors: Mapping[str, Tensor], said: str, token: str | None, stem: str = ""
) -> list[_Word]:
    """The words among tensors, each with a token.

    Args:
        said: the token that the file says apart.
        stem: the name of the file, which stands for one.
    """
    if any(name.startswith(BUNDLED) for name in tensors):  # of a LoRA the rest changes layers
        tensors = {name: one for name, one in tensors.items() if name.startswith(BUNDLED)}
    try:
        found = read_embeddings(tensors)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if token is not None and len(found) > 1:
        raise ValueError(f"{where}: holds {len(found)} words, and token= names one")
    words = []
    for embedding in found:
        name = token or embedding.token or said or stem
        if not name:
            raise ValueError(f"{where}: does not name its token; give one with token=")
        words.append(_Word(where, Embedding(name, embedding.vectors)))
    return words


def _flat(content: Mapping[str, Any], front: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a dict and in the dicts in it, by their way from the top."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{front}{key}", value
        elif isinstance(value, (Mapping, nn.ParameterDict)) and not front:
            yield from _flat(dict(value.items()), f"{key}.")


def _path(item: Place, weight_name: str | None, options: Mapping[str, Any]) -> Path:
    """The file that is meant."""
    if not isinstance(item, Source) and Path(item).is_file():
        return Path(item)
    source = open_source(item, **options)
    usual = next((name for name in NAMES if name in source.names), NAMES[0])
    return Path(source.path(weight_name or usual))


def _content(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, and the token that it says apart."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get("name", "")
        return dict(read_tensors(path)), said
    if is_picture(path):
        return _of_picture(path)
    checkpoint = open_pickle(path)
    return dict(read_pickle(path, False)), checkpoint.metadata.get("name", "")


def _of_picture(path: Path) -> tuple[dict[str, Tensor], str]:
    try:
        checkpoint = read_embedding_image(path)
    except ConversionError as error:
        raise ValueError(str(error)) from None
    if checkpoint is None:
        raise ValueError(f"{path}: a picture without an embedding")
    tensors = {name: as_torch(one) for name, one in checkpoint.tensors.items()}
    return tensors, checkpoint.metadata.get("name", "")
