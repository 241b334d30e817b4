"""Textual inversion: words with embeddings of their own.

Gal et al. 2022, https://arxiv.org/abs/2208.01618.

Files map a token to a vector (d,) or to several (n, d). AUTOMATIC1111's `.pt` has them below
`string_to_param`, its safetensors below `emb_params`, both without a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..loading.config import Config
from ..loading.pickles import open_pickle, read_pickle
from ..loading.source import Place, Source, open_source
from ..loading.weights import read_tensors

PARAMETERS = "string_to_param"
NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")
Embedding = Place | Mapping[str, Any] | Tensor


def load_textual_inversion(
    tokenizer: Any,
    text_encoder: Any,
    embeddings: Embedding | Sequence[Embedding],
    token: str | Sequence[str | None] | None = None,
    *,
    weight_name: str | None = None,
    **options: Any,
) -> None:
    """Give the tokenizer new tokens and the text encoder their vectors.

    All of them, or none if one is faulty.

    Several vectors become `token`, `token_1`, `token_2`, …; pipelines write them out in a prompt.

    Args:
        tokenizer: gets the tokens; ours, or transformers'.
        text_encoder: gets the vectors; likewise.
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
    table: nn.Embedding = text_encoder.get_input_embeddings()
    known = tokenizer.get_vocab()
    vectors: dict[str, Tensor] = {}
    for item, name in zip(items, tokens, strict=True):
        is_content = isinstance(item, (Mapping, Tensor))
        where = "the embedding" if is_content else str(getattr(item, "name", item))
        content = item if is_content else _load(item, weight_name, options)
        content = {"*": content} if isinstance(content, Tensor) else content
        name, values = _read(content, name, where)
        if values.ndim != 2 or values.shape[1] != table.embedding_dim:
            width = f"a text encoder of {table.embedding_dim} channels"
            raise ValueError(f"{where}: vectors {[*values.shape]} do not fit {width}")
        for i, vector in enumerate(values):
            one = f"{name}_{i}" if i else name
            if one in known or one in vectors:
                raise ValueError(
                    f"{where}: the token {one!r} is in the vocabulary already; choose another token"
                )
            vectors[one] = vector
    tokenizer.add_tokens(list(vectors))
    known = tokenizer.get_vocab()
    _enlarge(table, {known[one]: vector for one, vector in vectors.items()}, len(tokenizer))
    _tell_size(text_encoder, table.num_embeddings)


def unload_textual_inversion(
    tokenizer: Any, text_encoder: Any, tokens: str | Sequence[str] | None = None
) -> None:
    """Take words out of the tokenizer, and their vectors out of the text encoder.

    Args:
        tokenizer: ours.
        text_encoder: ours, or transformers'.
        tokens: which; by default all that were added.

    Raises:
        ValueError: a token was not added, or the tokenizer is another library's.
    """
    if not hasattr(tokenizer, "remove_tokens"):
        raise ValueError("only a CLIPTokenizer of weightport can forget words")
    wanted = [tokens] if isinstance(tokens, str) else tokens
    kept = tokenizer.remove_tokens(wanted)
    table: nn.Embedding = text_encoder.get_input_embeddings()
    with torch.no_grad():
        rows = table.weight[kept]
    table.weight = nn.Parameter(rows, requires_grad=table.weight.requires_grad)
    table.num_embeddings = len(rows)
    _tell_size(text_encoder, len(rows))


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


def _read(content: Mapping[str, Any], token: str | None, where: str) -> tuple[str, Tensor]:
    """The token and the vectors (n, d) in the content of a file."""
    if PARAMETERS in content:
        token = token or content.get("name")
        content = content[PARAMETERS]
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if len(tensors) != 1:
        raise ValueError(f"{where}: holds {len(tensors)} embeddings, not one")
    ((key, values),) = tensors.items()
    token = token or (key if key not in ("*", "emb_params") else None)
    if not token:
        raise ValueError(f"{where}: does not name its token; give one with token=")
    return token, values[None] if values.ndim == 1 else values


def _load(item: Place, weight_name: str | None, options: Mapping[str, Any]) -> Any:
    if isinstance(item, Source) or not Path(item).is_file():
        source = open_source(item, **options)
        usual = next((name for name in NAMES if name in source.names), NAMES[0])
        item = source.path(weight_name or usual)
    path = Path(item)
    return dict(read_tensors(path)) if path.suffix == ".safetensors" else _of_pickle(path)


def _of_pickle(path: Path) -> dict[str, Any]:
    """The content of a pickle, whose reader names tensors by their way from the top."""
    content: dict[str, Any] = {**open_pickle(path).metadata, **dict(read_pickle(path, False))}
    front = f"{PARAMETERS}."
    below = {
        key.removeprefix(front): value for key, value in content.items() if key.startswith(front)
    }
    return {**content, PARAMETERS: below} if below else content
