"""What all models share: their config, and the way from a folder or the Hub and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, Unpack

import torch
from torch import nn

from .config import DIFFUSERS_VERSION, Config
from .files import STEMS, find_weights, shard_names
from .saving import placed, write_json
from .source import HubOptions, Source, open_source
from .weights import Empty, load_weights, write_safetensors


class Model(nn.Module):
    """The base of the models.

    Attributes:
        config: the content of `config.json`, complete with defaults.
        library: `diffusers` or `transformers`, the library whose names the files have.
    """

    library: ClassVar[str] = "diffusers"
    config: Config

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = Config(config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    @classmethod
    def rename(cls, key: str) -> str | None:
        """The name that a key of an older or newer file has here; None for what this model has no use for."""
        return key

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A model with random weights."""
        return cls(config)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | Source,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype | Literal["auto"] | None = None,
        torch_dtype: torch.dtype | Literal["auto"] | None = None,
        use_safetensors: bool | None = None,
        **hub: Unpack[HubOptions],
    ) -> Self:
        """The model in a folder, in evaluation mode."""
        source = open_source(name_or_path, subfolder, **hub)
        weights = find_weights(source.names, cls.library, variant, use_safetensors)
        if weights is None:
            raise OSError(f"{source.name}: there are no weights of a {cls.__name__} in it")
        shards = shard_names(source.json(weights.name), source.name) if weights.sharded else [weights.name]
        folder = source.fetch(shards)
        with Empty():
            model = cls(source.json("config.json"))
        dtype = dtype or torch_dtype or torch.float32
        load_weights(model, [folder / name for name in shards], cls.rename, None if dtype == "auto" else dtype)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str], *, variant: str | None = None) -> None:
        """Write `config.json` and the weights."""
        with placed(folder) as staging:
            write_json(staging / "config.json", self._saved_config())
            part = f".{variant}" if variant else ""
            write_safetensors(staging / f"{STEMS[self.library][0]}{part}.safetensors", self.state_dict())

    def _saved_config(self) -> dict[str, Any]:
        config = {key: value for key, value in self.config.items() if not key.startswith("_")}
        if self.library == "transformers":
            return config | {"architectures": [type(self).__name__]}
        return config | {"_class_name": type(self).__name__, "_diffusers_version": DIFFUSERS_VERSION}
