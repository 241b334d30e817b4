"""The road of embeddings: words in a file or a model -> a file of them, in any form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..adapters.embeddings import Embedding, fitting, number_of
from ..errors import ConversionError, printable
from ..io.arrays import DTYPES, Array
from ..io.atomic import check_apart
from ..io.dtypes import KEEP
from ..mappings.embeddings import written
from .checkpoint import Computed, Tensor
from .conversion import Conversion
from .layouts.embeddings import EmbeddingFile
from .outputs.embeddings import in_form, write
from .settings import Settings


def convert_embeddings(file: EmbeddingFile, output: Path, settings: Settings) -> Conversion:
    """Write words as a file.

    Raises:
        ConversionError: the form has no place for them; nothing is left behind.
    """
    if settings.to not in written():
        raise ConversionError(
            f"{file.path}: a textual inversion; --to {' or --to '.join(written())}"
        )
    check_apart(output, [file.path])
    words = _renamed(file, settings)
    made = in_form(file.path, words, file.metadata, output, settings.to)
    found = fitting(words)
    family = next(iter((*found.whole, *found.halves)), "")
    conversion = Conversion(family, {}, None if settings.dry_run else output)
    conversion.notes += [_described(word) for word in words]
    if not file.is_named and not settings.placeholder_tokens:
        conversion.notes.append(
            f"the file names no word, so it is that of its name, {printable(words[0].token)};"
            " --placeholder-token gives another"
        )
    if made.form.roles and words[0].token != output.stem:
        conversion.notes.append(
            f"programs that read this form take the file's name for the word: {output.stem} in"
            f" place of {printable(words[0].token)}"
        )
    if not settings.dry_run:
        write(made, words[0].token, output, settings)
    file.check_unchanged()
    return conversion


def _renamed(file: EmbeddingFile, settings: Settings) -> list[Embedding[Tensor]]:
    """The words by the names that the user gives, or their own."""
    given = settings.placeholder_tokens
    if not given:
        return [_cast(word, settings.dtype) for word in file.embeddings]
    if len(given) != len(file.embeddings):
        raise ConversionError(
            f"{file.path}: holds {len(file.embeddings)} words, but {len(given)} are named with"
            " --placeholder-token"
        )
    return [
        _cast(replace(word, token=name), settings.dtype)
        for word, name in zip(file.embeddings, given, strict=True)
    ]


def _cast(word: Embedding[Tensor], dtype: str) -> Embedding[Tensor]:
    """A word with its vectors in a dtype, or as they are."""
    if dtype == KEEP:
        return word

    def compute(array: Array) -> Array:
        with np.errstate(over="ignore"):  # infinite numbers are refused as they are written
            return array.astype(DTYPES[dtype])

    vectors = {
        role: Computed(one.name, dtype, one.shape, (one,), compute, f"cast to {dtype}")
        for role, one in word.vectors.items()
    }
    return replace(word, vectors=vectors)


def _described(word: Embedding[Tensor]) -> str:
    """A word and its vectors, in a sentence."""
    kinds = []
    for role, tensor in word.vectors.items():
        count = number_of(tensor)
        plural = "vector" if count == 1 else "vectors"
        of_role = f" ({role})" if role else ""
        kinds.append(f"{count} {plural} of {tensor.shape[-1]}{of_role}")
    return f"{printable(word.token)}: {', '.join(kinds)}"
