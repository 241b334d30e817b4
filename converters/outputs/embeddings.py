"""Words as output: in the form that is asked for, bit for bit. What a form has no place for is
refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...adapters.embeddings import ANY, Embedding
from ...errors import ConversionError, printable
from ...io import atomic
from ...mappings.embeddings import Form, forms
from ...mappings.facts import facts
from ..checkpoint import Tensor
from ..settings import Settings
from ..writers.embedding_image import write_embedding_image
from ..writers.safetensors import Output, write_safetensors
from ..writers.torch_file import write_torch

Tensors = dict[str, Tensor]
_PICTURE = ".png"
_SAFETENSORS = ".safetensors"


@dataclass(frozen=True)
class Written:
    """Words in a form.

    Attributes:
        tensors: name -> vectors.
        metadata: what the file says beside.
    """

    form: Form
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def in_form(
    where: Path,
    words: Sequence[Embedding[Tensor]],
    metadata: Mapping[str, str],
    output: Path,
    name: str,
) -> Written:
    """Words in the form of a name that fits the ending of the output.

    Args:
        where: they come from, for messages.

    Raises:
        ConversionError: the form has no place for them, or files of that ending are none of it.
    """
    named = [form for form in forms() if form.name == name]
    form = next((form for form in named if output.suffix in form.suffixes), None)
    if form is None:
        endings = " or ".join(suffix for one in named for suffix in one.suffixes)
        raise ConversionError(
            f"{output}: a textual inversion becomes a file; for --to {name} its name ends in"
            f" {endings}"
        )
    if len(words) > 1 and not form.several:
        listed = ", ".join(printable(word.token) for word in words[:5])
        raise ConversionError(
            f"{where}: holds {len(words)} words ({listed}), and a file of {form.title} one; --to"
            " diffusers holds several"
        )
    tensors: Tensors = {}
    for word in words:
        tensors |= _named(where, word, form)
    return Written(form, tensors, metadata)


def write(made: Written, word: str, output: Path, settings: Settings) -> None:
    """Write the file; it appears whole or not at all.

    Args:
        word: the token of the first.
    """
    with atomic.file(output, settings.overwrite, settings.sync) as path:
        if output.suffix == _SAFETENSORS:
            _write_safetensors(made, word, path, output, settings)
            return
        _refuse_nonfinite(made, output, settings)
        content = _content(made, word)
        if output.suffix == _PICTURE:
            write_embedding_image(path, content)
        else:
            write_torch(path, content)


def _named(where: Path, word: Embedding[Tensor], form: Form) -> Tensors:
    """The vectors of a word by the names of a form."""
    if not form.roles:
        return {word.token: _only(where, word, form)}
    if ANY in form.roles:
        return {form.roles[ANY]: _upright(_only(where, word, form))}
    found: Tensors = {}
    for encoder, tensor in word.for_encoders().items():
        name = form.roles.get(encoder)
        if name is None:
            what = f"`{encoder}`" if encoder else f"vectors of width {tensor.shape[-1]}"
            raise ConversionError(f"{where}: holds {what}, for which {form.title} has no place")
        found[name] = _upright(tensor)
    return found


def _only(where: Path, word: Embedding[Tensor], form: Form) -> Tensor:
    """The vectors of a word for a single text encoder."""
    if word.outputs:
        raise ConversionError(
            f"{where}: holds `{word.outputs[0]}`, vectors in place of a text encoder's answer, for"
            f" which {form.title} has no place; --to clip holds them"
        )
    if len(word.vectors) > 1:
        raise ConversionError(
            f"{where}: holds vectors for {len(word.vectors)} text encoders, and {form.title} has a"
            " place for one; --to clip holds both"
        )
    return next(iter(word.vectors.values()))


def _upright(tensor: Tensor) -> Tensor:
    """Vectors (n, channels)."""
    return tensor if len(tensor.shape) == 2 else tensor.reshaped((1, *tensor.shape))


def _content(made: Written, word: str) -> dict[str, object]:
    """What a pickle holds; names with a map in front lie in that map."""
    front = facts("embeddings")["nameless"]["map"]
    inside = {
        name.removeprefix(front): one
        for name, one in made.tensors.items()
        if name.startswith(front)
    }
    if not inside:
        return dict(made.tensors)
    step = made.metadata.get("step", "")
    return {
        **facts("embeddings")["written"],
        front.removesuffix("."): inside,
        "name": word,
        "step": int(step) if step.isdecimal() and len(step) < 9 else None,
        "sd_checkpoint": made.metadata.get("sd_checkpoint"),
        "sd_checkpoint_name": made.metadata.get("sd_checkpoint_name"),
    }


def _write_safetensors(
    made: Written, word: str, path: Path, output: Path, settings: Settings
) -> None:
    said = {facts("embeddings")["says"]["token"]: word} if made.form.roles else {}
    outputs = [
        Output(name, tensor.dtype, tensor.shape, (tensor,)) for name, tensor in made.tensors.items()
    ]
    written = write_safetensors(
        path.parent,
        path.name,
        outputs,
        max_shard_size=1 << 62,
        metadata={"format": "pt", **made.metadata, **said},
        sync=settings.sync,
    )
    if written.nonfinite and not settings.allow_nan:
        _refuse(output, next(iter(written.nonfinite)))


def _refuse_nonfinite(made: Written, output: Path, settings: Settings) -> None:
    for name, tensor in made.tensors.items():
        if not settings.allow_nan and not np.isfinite(tensor.numpy().astype(np.float64)).all():
            _refuse(output, name)


def _refuse(output: Path, name: str) -> None:
    raise ConversionError(
        f"{output}: `{printable(name)}` holds NaN or Inf; --allow-nan writes it anyway"
    )
