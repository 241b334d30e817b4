"""What can be asked of a conversion: each option once, with the words of its help.

The command line is made from this, `conversion.json` reports it, and `weightport.convert` has the
same names and defaults, by a test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..io import dtypes
from ..mappings import conventions, embeddings, families, layouts

PREDICTION_TYPES = ("epsilon", "v_prediction")
TEXT_ACTIVATIONS = ("tanh", "erf")
TARGETS = (*layouts.NAMES, *conventions.written(), *embeddings.written()[1:])
COMPONENTS = (*families.component_names(), *families.halves())


@dataclass(frozen=True)
class Option:
    """An option, as people see it.

    Attributes:
        help: what it does.
        typed: its default as people type it; None for one that has no default to show.
        choices: what it may be; empty for anything.
        parse: makes a value of what is typed.
        metavar: what stands for its value in the help.
        flag: its name on the command line, where that is not the field's.
        reported: whether `conversion.json` says what was asked: always, or only where it is set.
    """

    help: str
    typed: Any = None
    choices: Sequence[str] = ()
    parse: Callable[[str], Any] = str
    metavar: str | None = None
    flag: str | None = None
    reported: bool | None = None

    ALWAYS = True
    IF_SET = False


def strengths(text: str) -> tuple[float, ...]:
    """Numbers with commas between them.

    Raises:
        ValueError: one is no finite number.
    """
    values = tuple(float(part) for part in text.split(","))
    if not all(map(math.isfinite, values)):
        raise ValueError(text)
    return values


def option(default: Any, help: str, *, typed: Any = None, **more: Any) -> Any:
    """A field of settings; `typed` is the default as people type it, where that differs."""
    shown = default if typed is None else typed
    return field(default=default, metadata={"option": Option(help, shown, **more)})


@dataclass(frozen=True)
class Settings:
    """Everything that can be asked of a conversion beside its sources, output and base.

    The values are checked ones: `dtype` is a name of safetensors or `keep`, sizes are bytes.
    """

    to: str = option(
        layouts.CANONICAL,
        "the layout to write; of an adapter the convention, of an embedding the form",
        choices=TARGETS,
    )
    family: str | None = option(
        None,
        "where the tensors leave a choice",
        choices=families.NAMES,
        reported=Option.IF_SET,
    )
    component: str | None = option(
        None,
        "convert only this one",
        choices=COMPONENTS,
        reported=Option.IF_SET,
    )
    vae: Path | None = option(
        None,
        "bake in the VAE of this file, in place of the sources' own",
        metavar="FILE",
        reported=Option.IF_SET,
    )
    dtype: str = option(
        dtypes.KEEP,
        "of the weights",
        choices=(dtypes.KEEP, *dtypes.CHOICES),
        reported=Option.ALWAYS,
    )
    variant: str | None = option(
        None, "part of the weights' file names, such as fp16", reported=Option.IF_SET
    )
    max_shard_size: int = option(
        10_000_000_000,
        "larger components are written in shards",
        typed="10GB",
        metavar="SIZE",
        reported=Option.ALWAYS,
    )
    text_activation: str = option(
        "tanh",
        "SD 2.x: tanh is keras-cv from 0.6.4 on",
        choices=TEXT_ACTIVATIONS,
        reported=Option.ALWAYS,
    )
    placeholder_tokens: tuple[str, ...] = option(
        (),
        "name of an added token row, <cat>=2 of two; repeat in order",
        flag="--placeholder-token",
        metavar="TOKEN",
        reported=Option.IF_SET,
    )
    lora_alpha: float | None = option(
        None,
        "merge LoRA factors with this alpha",
        parse=float,
        metavar="ALPHA",
        reported=Option.IF_SET,
    )
    lora: tuple[str, ...] = option(
        (),
        "bake in an adapter: FILE, FILE@0.8, FILE@unet=0.8,text_encoder=0.5; repeat for several",
        metavar="FILE[@STRENGTH]",
    )
    merge: tuple[float, ...] = option(
        (),
        "make one adapter of several, with a strength for each",
        parse=strengths,
        metavar="0.7,0.4",
    )
    expand: bool = option(False, "of an adapter: make plain LoRA of LoHa, LoKr and mid factors")
    embedding: tuple[str, ...] = option(
        (),
        "teach the model the words of a textual inversion; repeat for several",
        metavar="FILE",
    )
    extract_embeddings: bool = option(
        False, "write the words that textual inversion added to a model, or that lie in a LoRA"
    )
    ignore_unmatched: bool = option(
        False,
        "leave out what an adapter or embedding holds for no part of the model",
        reported=Option.IF_SET,
    )
    ema: bool = option(
        False,
        "take the moving average of the weights instead of the weights themselves",
        reported=Option.IF_SET,
    )
    revision: str | None = option(
        None,
        "of a folder in the Hub's cache: a branch, a tag or a commit",
        reported=Option.IF_SET,
    )
    prediction_type: str | None = option(
        None, "of the UNet", choices=PREDICTION_TYPES, reported=Option.IF_SET
    )
    heads: tuple[str, ...] = option(
        (),
        "attention heads, which no tensor tells: unet=8, or one for each block, unet=5,10,20,20",
        metavar="COMPONENT=N",
        reported=Option.IF_SET,
    )
    image_size: int | None = option(
        None,
        "for the configs (default: the file's or family's)",
        parse=int,
        metavar="PIXELS",
        reported=Option.IF_SET,
    )
    residue: bool = option(True, "write no residue file, and look for none")
    hashes: bool = option(True, "leave sha256 out of the report", flag="--no-hash")
    sync: bool = option(True, "do not wait until the output has reached the disk")
    allow_nan: bool = option(
        False, "write NaN and Inf instead of refusing them", reported=Option.ALWAYS
    )
    license: str | None = option(
        None,
        "for the model card, as the Hub names it: creativeml-openrail-m, mit, ...",
        metavar="ID",
        reported=Option.IF_SET,
    )
    base_model: str | None = option(
        None,
        "for the model card: what the model was fine-tuned from",
        metavar="HUB_ID",
        reported=Option.IF_SET,
    )
    overwrite: bool = option(False, "replace an earlier output")
    dry_run: bool = option(False, "check and plan only")

    @property
    def is_of_adapters(self) -> bool:
        """Whether what is asked for is of adapters."""
        return self.to in conventions.NAMES or self.expand or bool(self.merge)

    @property
    def is_of_embeddings(self) -> bool:
        """Whether a file of words is asked for."""
        return self.extract_embeddings or self.to in embeddings.written()[1:]

    def report(self) -> dict[str, Any]:
        """What `conversion.json` says of them."""
        said: dict[str, Any] = {}
        for name, described in options(Settings).items():
            value = getattr(self, name)
            is_set = value not in (None, (), False)
            if described.reported is Option.ALWAYS or (described.reported is not None and is_set):
                said[name] = _plain(value)
        return said


def options(kind: type) -> dict[str, Option]:
    """The options of a dataclass, by field, in order."""
    return {one.name: one.metadata["option"] for one in fields(kind) if "option" in one.metadata}


def _plain(value: Any) -> Any:
    """A value as JSON has it; of a path the name alone, as reports are the same everywhere."""
    if isinstance(value, Path):
        return value.name
    return list(value) if isinstance(value, tuple) else value
