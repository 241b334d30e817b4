"""Checkpoints as the repositories that a conversion would write of them, without writing one: the
only place where the runtime meets the converters.

Plans, configs and tensors are those of the conversion. What a file holds as it lies is mapped, and
read when it is first touched; the rest is made block by block, in place.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from ..io import dtypes

if TYPE_CHECKING:
    from ..converters.checkpoint import SourceFile, Stored
    from ..converters.repo.tokenizers import StockTokenizer
    from ..converters.writers.pieces import Output

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, word) for name, word in dtypes.WORDS.items()}
INDEX = "model_index.json"


_ON_THE_HUB = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/(.+)")
StrPath = str | os.PathLike[str]


class PlanOptions(TypedDict, total=False):
    """How a checkpoint is read, as of `weightport.convert`.

    Attributes:
        base: where components come from that the sources lack.
        family: of the model, where the tensors leave a choice.
        text_activation: of an SD 2.x text encoder of KerasCV: `tanh` or `erf`.
        placeholder_tokens: names for the token rows that textual inversion added, in order.
        lora_alpha: merge LoRA factors of a Keras file with this alpha.
        ema: take the moving average of the weights instead of the weights themselves.
        prediction_type: what the UNet predicts, where its file does not say or says it wrongly.
        image_size: in pixels, for the configs.
    """

    base: StrPath | None
    family: str | None
    text_activation: Literal["tanh", "erf"]
    placeholder_tokens: tuple[str, ...]
    lora_alpha: float | None
    ema: bool
    prediction_type: Literal["epsilon", "v_prediction"] | None
    image_size: int | None


@dataclass
class PlannedRepo:
    """A repository that is not there.

    Attributes:
        name: of the checkpoint, for messages.
        configs: place in it -> content of the JSON file.
        lacks: what a pipeline needs and it does not have, in words.
        classes: model -> the name of its class.
    """

    name: str
    configs: Mapping[str, dict[str, Any]]
    lacks: list[str]
    classes: Mapping[str, str]
    _outputs: Mapping[str, list[Output]]
    _write_tokenizers: Callable[[Path], None]
    _stock_tokenizers: Mapping[str, StockTokenizer]
    _maps: dict[int, mmap.mmap] = field(default_factory=dict)

    @property
    def index(self) -> dict[str, Any]:
        """The content of `model_index.json`; empty for a model that extends others."""
        return self.configs.get(INDEX, {})

    def tokenizer(self, component: str, kind: Any) -> Any:
        """A tokenizer of a class, from files that are there only meanwhile.

        One whose vocabulary comes with this package, which cannot be faulty, is read when it is
        first used.
        """
        stock = self._stock_tokenizers.get(component)
        if stock is not None:
            return kind.when_used(partial(_read_stock, kind, stock))
        with TemporaryDirectory(prefix="weightport-") as folder:
            self._write_tokenizers(Path(folder))
            return kind.from_pretrained(Path(folder, component))

    @property
    def schedulers(self) -> dict[str, str]:
        """Schedulers -> places of their configs."""
        places = [place for place in self.configs if place.endswith("/scheduler_config.json")]
        return {place.partition("/")[0]: place for place in places}

    def config(self, component: str) -> dict[str, Any]:
        """The config of a model."""
        place = f"{component}/config.json" if self.index else "config.json"
        return self.configs[place]

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor, bool]]:
        """The weights of a model one at a time, and whether they lie in a mapped file."""
        from ..converters.writers.pieces import Blocks, as_stored

        blocks = Blocks()
        for output in self._outputs[component]:
            stored = as_stored(output)
            tensor = None if stored is None else self._mapped(stored, output)
            if tensor is None:
                yield output.key, _made(blocks, output), False
            else:
                yield output.key, tensor, True

    def _mapped(self, stored: Stored, output: Output) -> Tensor | None:
        """The tensor in its file, writable without changing that; None where it is not aligned."""
        dtype = DTYPES[output.dtype]
        if stored.offset % dtype.itemsize or not output.nbytes:
            return None
        data = self._map(stored.file)
        count = output.nbytes // dtype.itemsize
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=stored.offset)
        return flat.view(output.shape)

    def _map(self, file: SourceFile) -> mmap.mmap:
        if id(file) not in self._maps:
            with file.path.open("rb") as opened:
                self._maps[id(file)] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[id(file)]


def _read_stock(kind: Any, stock: StockTokenizer) -> Any:
    with TemporaryDirectory(prefix="weightport-") as folder:
        stock.write(Path(folder))
        return kind.from_pretrained(folder)


def _made(blocks: Any, output: Output) -> Tensor:
    """A tensor filled block by block."""
    tensor = torch.empty(output.shape, dtype=DTYPES[output.dtype])
    target = tensor.view(-1).view(torch.uint8).numpy()
    done = 0
    for block in blocks.of([output]):
        target[done : done + len(block.data)] = np.frombuffer(block.data, np.uint8)
        done += len(block.data)
    return tensor


@contextmanager
def planned_repo(
    sources: StrPath | Sequence[StrPath], options: PlanOptions
) -> Iterator[PlannedRepo]:
    """The repository that the conversion of some sources would be.

    Args:
        sources: as of `weightport.convert`, or the address of a file on the Hub.
        options: see `PlanOptions`.

    Raises:
        ConversionError: anything a user can act on.
    """
    from ..converters.convert import as_sources, planned
    from ..converters.outputs.diffusers import evidence
    from ..converters.repo.layout import (
        described,
        outputs_of,
        stock_tokenizers,
        write_tokenizers,
    )
    from ..converters.settings import Settings

    paths = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    files = [_local(path) for path in paths]
    asked: dict[str, Any] = {key: value for key, value in options.items() if key != "base"}
    settings = Settings(**asked, dry_run=True, hashes=False, residue=False)
    base = options.get("base")
    folder = None if base is None else _local(base)
    with planned(as_sources(files, settings), folder, settings) as (conversion, named):
        predicted, told = evidence(conversion, named)
        family = conversion.architecture
        configs = described(family, conversion.components, told, predicted)
        outputs = {
            name: outputs_of(component, dtypes.KEEP)
            for name, component in conversion.components.items()
        }
        yield PlannedRepo(
            str(paths[0]) if len(paths) == 1 else f"{paths[0]} and others",
            configs,
            conversion.lacks,
            {name: one.described.class_name for name, one in conversion.components.items()},
            outputs,
            lambda folder: write_tokenizers(folder, family, conversion.components, told),
            stock_tokenizers(family, conversion.components, told) if INDEX in configs else {},
        )


def _local(path: StrPath) -> Path:
    """A local path as it is; of what is on the Hub, the downloaded file or folder."""
    from ..pull import fetch

    text = os.fspath(path)
    if found := _ON_THE_HUB.match(text):
        text = f"hub:{found[1]}@{found[2]}/{found[3]}"
    return fetch(text) if text.startswith("hub:") else Path(text).expanduser()
