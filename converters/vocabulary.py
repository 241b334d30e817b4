"""Words in a model: put into its text encoders and tokenizers, and taken out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..adapters.embeddings import ANY, Embedding, grouped, number_of, role_of, spelled
from ..errors import ConversionError, printable
from ..io.arrays import DTYPES, Array
from ..io.dtypes import WORDS
from ..mappings.facts import facts
from ..mappings.families import Family
from .checkpoint import Computed, Stored, Tensor
from .layouts.embeddings import EmbeddingFile, open_embeddings
from .layouts.source import Source
from .planning.plan import PlannedComponent, PlannedTensor
from .planning.taught import Taught
from .repo.added_tokens import check_new, known_tokens, token_rows
from .settings import Settings

Components = Mapping[str, PlannedComponent]


def teach(components: Components, family: Family, settings: Settings) -> list[Taught]:
    """Plan that the text encoders get the words of embeddings.

    Raises:
        ConversionError: a file cannot be read, or a word does not fit the model.
    """
    taught = []
    for text in settings.embedding:
        file = open_embeddings(Source(Path(text)))
        tokens: dict[str, dict[str, int]] = {}
        left_out: list[str] = []
        notes: list[str] = []
        for word in file.embeddings:
            used = set()
            for folder, tokenizer in family.tokenizers.items():
                encoder = components.get(tokenizer.encoder)
                if encoder is None or not _takes_words(encoder):
                    continue
                vectors = word.of_width(encoder.config[facts("embeddings")["model"]["width"]])
                if vectors is None:
                    continue
                used.add(id(vectors))
                rows = _add(file, word.token, vectors, encoder, folder, settings, notes)
                tokens.setdefault(encoder.name, {}).update(rows)
            rest = _unused(file, word, used, components, family, settings)
            left_out += rest
            notes += [f"{file.path.name}: left out {one}" for one in rest]
        taught.append(Taught(file.path, file.checkpoints, tokens, tuple(left_out), tuple(notes)))
    return taught


def _takes_words(encoder: PlannedComponent) -> bool:
    """Whether a text encoder is one that words are taught to: CLIP's, not T5."""
    return facts("embeddings")["model"]["table"] in encoder.expected


def _unused(
    file: EmbeddingFile,
    word: Embedding[Tensor],
    used: set[int],
    components: Components,
    family: Family,
    settings: Settings,
) -> list[str]:
    """The vectors of a word that no text encoder takes.

    Raises:
        ConversionError: there are some, and nobody allowed it.
    """
    rest = {role: one for role, one in word.vectors.items() if id(one) not in used}
    if rest and (not settings.ignore_unmatched or not used):
        role, tensor = next(iter(rest.items()))
        advice = "; --ignore-unmatched leaves them out" if used else ""
        if role in word.outputs:
            raise ConversionError(
                f"{file.path}: `{role}` of `{printable(word.token)}` stands in place of what a text"
                " encoder answers, for which a model has no place; load_textual_inversion of"
                f" weightport applies it{advice}"
            )
        what = f"`{role}`" if role else f"vectors of width {tensor.shape[-1]}"
        width = facts("embeddings")["model"]["width"]
        encoders = [components[one] for one in family.text_encoders if one in components]
        known = filter(_takes_words, encoders)
        wide = " and ".join(str(encoder.config[width]) for encoder in known)
        its = f"its text encoders have {wide} channels" if wide else "it has no text encoder here"
        raise ConversionError(
            f"{file.path}: {what} of `{printable(word.token)}` fit no text encoder of the"
            f" {family.title} model: {its}{advice}"
        )
    return [f"{word.token} {role}".strip() for role in rest]


def _add(
    file: EmbeddingFile,
    token: str,
    vectors: Tensor,
    encoder: PlannedComponent,
    folder: str,
    settings: Settings,
    notes: list[str],
) -> dict[str, int]:
    """Put the vectors of a word behind a text encoder's table; the rows of its tokens."""
    described = facts("embeddings")["model"]
    table = encoder.tensors[described["table"]]
    vocabulary, _ = known_tokens(encoder, folder)
    given = () if encoder.words else settings.placeholder_tokens
    added = token_rows(encoder, folder, table.shape[0], given) | encoder.words
    first = max((*vocabulary.values(), *added.values()), default=-1) + 1
    count = number_of(vectors)
    rows: dict[str, int] = {}
    for i, one in enumerate(spelled(token, count)):
        check_new(one, {**vocabulary, **added, **rows}, file.path)
        rows[one] = first + i
    encoder.words |= rows
    encoder.tensors[described["table"]] = _longer(table, vectors, first, count)
    size = encoder.tensors[described["table"]].shape[0]
    encoder.config[described["rows"]] = size
    encoder.chosen[described["rows"]] = size
    end = described["end"]
    if encoder.config.get(end["option"]) == end["legacy"]:
        encoder.config[end["option"]] = end["id"]
        encoder.chosen[end["option"]] = end["id"]
    listed = ", ".join(f"{printable(one)} ({row})" for one, row in rows.items())
    notes.append(f"{encoder.name}: new tokens {listed}")
    if DTYPES[table.dtype].itemsize < DTYPES[vectors.dtype].itemsize:
        notes.append(
            f"the vectors of {printable(token)} are rounded from {WORDS[vectors.dtype]} to"
            f" {WORDS[table.dtype]}, in which the {encoder.name} is"
        )
    return rows


def _longer(table: PlannedTensor, vectors: Tensor, first: int, count: int) -> PlannedTensor:
    """A table of tokens with vectors from a row on."""
    base = table.tensor()
    shape = (max(base.shape[0], first + count), base.shape[1])

    def compute(old: Array, new: Array) -> Array:
        result = np.zeros(shape, old.dtype)
        result[: len(old)] = old
        result[first : first + count] = new.reshape(count, -1)
        return result

    how = f"rows {first} to {first + count - 1} are new words"
    longer = Computed(base.name, base.dtype, shape, (base, vectors), compute, how)
    return PlannedTensor(table.key, shape, (longer,), None, 0, 1, table.row)


# --- out of a model -------------------------------------------------------------------------------


def words_of(
    sources: Sequence[Path], components: Components, family: Family, settings: Settings
) -> EmbeddingFile:
    """The words that a model was taught, by its tokenizers or as the user names them.

    Raises:
        ConversionError: it has none.
    """
    described = facts("embeddings")["model"]
    several = len(family.text_encoders) > 1
    found: dict[str, dict[str, Tensor]] = {}
    checkpoints = []
    for folder, tokenizer in family.tokenizers.items():
        encoder = components.get(tokenizer.encoder)
        if encoder is None or not _takes_words(encoder):
            continue
        checkpoints += [part.checkpoint for part in encoder.parts]
        table = encoder.tensors[described["table"]].tensor()
        rows = token_rows(encoder, folder, table.shape[0], settings.placeholder_tokens)
        role = role_of(encoder.name) if several else ANY
        at = 0
        tokens = list(rows)
        for word, count in grouped(tokens).items():
            mine = [rows[one] for one in tokens[at : at + count]]
            at += count
            found.setdefault(word, {})[role] = _rows(table, mine)
    if not found:
        raise ConversionError(
            f"{sources[0]}: --extract-embeddings, but its text encoders have no token rows beyond"
            " CLIP's vocabulary"
        )
    words = tuple(Embedding(word, vectors) for word, vectors in found.items())
    return EmbeddingFile(sources[0], words, True, tuple(checkpoints))


def _rows(table: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of a table."""
    first = rows[0]
    shape = (len(rows), table.shape[1])
    if isinstance(table, Stored) and list(rows) == list(range(first, first + len(rows))):
        width = table.shape[1] * DTYPES[table.dtype].itemsize
        return Stored(table.name, table.dtype, shape, table.file, table.offset + first * width)

    def take(array: Array) -> Array:
        return array[list(rows)]

    return Computed(table.name, table.dtype, shape, (table,), take, "rows of new words")
