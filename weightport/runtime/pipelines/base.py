"""`DiffusionPipeline`: the base of the pipelines, which holds components, loads and saves them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import nn
from tqdm import tqdm

from ...hub.download import HubOptions
from ...hub.mixin import PushToHub
from ...io.atomic import merged
from ...io.config_files import DIFFUSERS_VERSION, write_json
from ...io.weight_files import sibling_files
from ..images import numpy_to_pil
from ..loading.components import (
    choose_arguments,
    fetch_components,
    load_arguments,
    planned_arguments,
    read_signature,
)
from ..loading.config import Config, HasConfig
from ..loading.custom_code import copy_code, custom_file, load_class
from ..loading.model import LoadOptions, Model
from ..loading.source import Place, Source, StrPath, open_source, split_options
from ..registry import PIPELINES, library_of, public_class
from ..single_file import PlanOptions, planned_repo

if TYPE_CHECKING:
    from PIL import Image

INDEX = "model_index.json"


class DiffusionPipeline(HasConfig, PushToHub):
    """A pipeline is made of components: models, a scheduler, a tokenizer.

    A subclass takes its components as arguments of `__init__`, hands them to `register_modules` and
    does its work in `__call__`. Each component is an attribute, and a folder of the same name in
    the repository. Arguments with a default are options, or components if `_optional_components`
    names them.
    """

    config_name: ClassVar[str] = INDEX
    _optional_components: ClassVar[list[str]] = []

    name_or_path: str = ""
    _names: tuple[str, ...] = ()  # of the components
    _options: Mapping[str, Any] = {}
    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("load_ip_adapter", "set_ip_adapter_scale", "unload_ip_adapter"),
            "IP-Adapter is not supported; load the pipeline with diffusers",
        ),
        **dict.fromkeys(
            (
                "enable_model_cpu_offload",
                "enable_sequential_cpu_offload",
                "enable_group_offload",
                "reset_device_map",
            ),
            "accelerate's offloading is not supported; move the pipeline with to(), load it in"
            " float16, and let the VAE work in parts: vae.enable_tiling(), vae.enable_slicing()",
        ),
        **dict.fromkeys(
            (
                "enable_xformers_memory_efficient_attention",
                "disable_xformers_memory_efficient_attention",
            ),
            "xformers is not used; attention is PyTorch's own, which takes no more memory",
        ),
    }
    _progress_bar_config: Mapping[str, Any] = {}

    def register_modules(self, **components: Any) -> None:
        """Make these the components of the pipeline, as attributes of the same names."""
        self._names += tuple(name for name in components if name not in self._names)
        vars(self).update(components)

    def register_to_config(self, **options: Any) -> None:
        """Remember options of the constructor that are no components; they are saved in
        `model_index.json`."""
        self._options = {**self._options, **options}

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @property
    def components(self) -> dict[str, Any]:
        """Name -> component, in the order of the constructor; None where there is none."""
        return {name: getattr(self, name) for name in self._names}

    @property
    def parameters(self) -> dict[str, Any]:
        """The constructor's arguments that are no components: `Other(**pipe.components,
        **pipe.parameters)`."""
        _, names = read_signature(type(self))
        return {name: self._options[name] for name in names if name in self._options}

    @property
    def config(self) -> Config:
        """What `model_index.json` says: the class of each component, and options."""
        entries = {name: _entry(component) for name, component in self.components.items()}
        head = {"_class_name": type(self).__name__, "_diffusers_version": DIFFUSERS_VERSION}
        return Config({**head, **entries, **self._options})

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.config, indent=2, sort_keys=True)}\n"

    # --- devices ----------------------------------------------------------------------------------

    def _models(self) -> list[nn.Module]:
        components = self.components.values()
        return [component for component in components if isinstance(component, nn.Module)]

    def _parameters(self) -> Iterator[nn.Parameter]:
        for model in self._models():
            yield from model.parameters()

    @property
    def device(self) -> torch.device:
        """Where the first model is."""
        return next((one.device for one in self._parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first model."""
        return next((one.dtype for one in self._parameters()), torch.float32)

    @property
    def _execution_device(self) -> torch.device:
        return self.device

    @staticmethod
    def numpy_to_pil(images: Any) -> list[Image.Image]:
        """An array (b, h, w, c) in [0, 1] -> images."""
        return numpy_to_pil(images)

    def to(
        self,
        *arguments: Any,
        device: Any = None,
        dtype: torch.dtype | None = None,
        torch_device: Any = None,
        torch_dtype: torch.dtype | None = None,
        silence_dtype_warnings: bool = False,
    ) -> Self:
        """Move and cast every model: `to(device)`, `to(dtype)`, `to(device, dtype)`.

        `torch_device` and `torch_dtype` are older names; there are no warnings to silence.

        Raises:
            ValueError: the arguments are something else.
        """
        everything = (device, torch_device, dtype, torch_dtype)
        named = [value for value in everything if value is not None]
        given = [*arguments, *named]
        are_dtypes = [isinstance(value, torch.dtype) for value in given]
        if are_dtypes not in ([], [False], [True], [False, True]):
            raise ValueError(f"to() takes a device, a dtype, or a device and a dtype, not {given}")
        for model in self._models():
            model.to(*given)
        return self

    # --- progress ---------------------------------------------------------------------------------

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A tqdm bar over `iterable`, or for `total` steps; shown on a terminal only."""
        options = {"disable": None, **self._progress_bar_config}
        return tqdm(iterable, total=total, **options)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Arguments of tqdm for `progress_bar`, such as `disable=True`."""
        self._progress_bar_config = options

    # --- loading ----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Place,
        *,
        custom_pipeline: StrPath | None = None,
        custom_revision: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """The pipeline in a folder or on the Hub.

        `DiffusionPipeline` itself loads the class that `model_index.json` names; a subclass loads
        itself, from the repository of any pipeline that has its components.

        Args:
            pretrained_model_name_or_path: a local folder, or the id of a repository on the Hub.
            custom_pipeline: the code of another pipeline: a `.py` file, or a folder or repository
                with `pipeline.py`.
            custom_revision: the revision of that repository.
            trust_remote_code: agree to run code that a file or repository brings along.
            options: `LoadOptions` and `HubOptions`; components to take instead of those of the
                repository (which are then not downloaded), None for components to do without; other
                arguments of the pipeline's constructor.

        Raises:
            OSError: the folder, the repository or a file in it is missing.
            ValueError: components are missing or of a wrong kind, or the weights do not fit.
        """
        kind, source, index, wanted, given = cls._find(
            pretrained_model_name_or_path,
            custom_pipeline,
            custom_revision,
            trust_remote_code,
            options,
        )
        if not issubclass(kind, DiffusionPipeline):
            # the code of a class that extends diffusers' pipeline expects diffusers' components
            foreign: Self = kind.from_pretrained(
                pretrained_model_name_or_path, trust_remote_code=trust_remote_code, **options
            )
            return foreign
        arguments = load_arguments(
            kind, source, index, given, LoadOptions(**wanted), trust_remote_code
        )
        pipeline: Self = kind(**arguments)
        pipeline.name_or_path = source.name
        return pipeline

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: StrPath | Sequence[StrPath], **options: Any
    ) -> Self:
        """The pipeline that a checkpoint of any layout is: equal to converting first, and nothing
        is written.

        Args:
            pretrained_model_link_or_path: what `weightport.convert` reads, one or several: an
                original `.ckpt` or `.safetensors`, KerasCV's files, a folder; or the address of a
                file on the Hub.
            options: `PlanOptions` and `LoadOptions`; components to take instead of those of the
                checkpoint; other arguments of the pipeline's constructor.

        Raises:
            ConversionError: the checkpoint cannot be read.
            ValueError: it is no pipeline of this class, or components are missing.
        """
        plan, others = split_options(options, PlanOptions)
        wanted, given = split_options(others, LoadOptions)
        with planned_repo(pretrained_model_link_or_path, cast(PlanOptions, plan)) as repo:
            if not repo.index:
                held = ", ".join(repo.classes.values())
                raise ValueError(f"{repo.name}: no pipeline; {held}.from_single_file loads it")
            kind = cls
            if cls is DiffusionPipeline:
                kind = _known_class(repo.name, repo.index["_class_name"])
            arguments = planned_arguments(kind, repo, given, LoadOptions(**wanted))
        pipeline: Self = kind(**arguments)
        pipeline.name_or_path = repo.name
        return pipeline

    @classmethod
    def download(
        cls,
        pretrained_model_name: Place,
        *,
        custom_pipeline: StrPath | None = None,
        custom_revision: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> str:
        """Download what `from_pretrained` with these options would, and load nothing; but code that
        comes along must be trusted here too, as it says which components it takes.

        Returns:
            The local folder.

        Raises:
            OSError: the repository or a file in it is missing.
        """
        kind, source, index, wanted, given = cls._find(
            pretrained_model_name, custom_pipeline, custom_revision, trust_remote_code, options
        )
        load = LoadOptions(**wanted)
        fetch_components(kind, source, index, given, load, trust_remote_code)
        return str(source.fetch([INDEX]))

    @classmethod
    def _find(
        cls,
        place: Place,
        custom_pipeline: StrPath | None,
        custom_revision: str | None,
        trust: bool,
        options: Mapping[str, Any],
    ) -> tuple[Any, Source, dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The class to load, where its parts are, their index, how to load them, and what is given
        in their place."""
        hub, others = split_options(options, HubOptions)
        wanted, given = split_options(others, LoadOptions)
        source = open_source(place, **hub)
        index = source.json(INDEX)
        hub["revision"] = custom_revision
        kind = cls._find_class(source, index.get("_class_name"), custom_pipeline, trust, hub)
        return kind, source, index, wanted, given

    @classmethod
    def _find_class(
        cls, source: Source, name: Any, custom: Any, trust: bool, hub: Mapping[str, Any]
    ) -> Any:
        """The class to load: of the custom code, this one, or the one that the index names."""
        if custom is not None and Path(custom).suffix == ".py":
            file = Path(custom).expanduser().absolute()
            return load_class(Source(file.parent), file.stem, None, trust)
        if custom is not None:
            if "/" not in str(custom) and not Path(custom).is_dir():
                raise ValueError(
                    f"custom_pipeline = {custom!r} names one of diffusers' community pipelines,"
                    " whose code imports diffusers; load it with diffusers, or give a .py file, a"
                    " folder or a repository with a pipeline.py"
                )
            return load_class(open_source(custom, **hub), "pipeline", None, trust)
        if cls is not DiffusionPipeline:
            return cls
        if isinstance(name, list) and [type(part) for part in name] == [str, str]:
            module, custom_class = name
            return load_class(source, module, custom_class, trust)
        return _known_class(source.name, name)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> Self:
        """A pipeline of this class that shares the components of another; nothing is copied, moved
        or cast.

        Args:
            pipeline: where the components come from.
            options: components and constructor options to take instead.

        Raises:
            ValueError: a component that this class needs is missing.
        """
        kind = type(pipeline) if cls is DiffusionPipeline else cls
        known = {**pipeline.config, **pipeline.components}
        arguments = choose_arguments(kind, type(pipeline).__name__, known, options)
        result: Self = kind(**arguments)  # type: ignore[assignment]
        result.name_or_path = pipeline.name_or_path
        return result

    # --- saving -----------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: StrPath,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Write every component into a folder of its name, and `model_index.json`, as diffusers
        loads them.

        Other files of the folder stay, such as other variants. Code that came with the pipeline is
        written beside. See `PushToHub` for uploading the folder afterwards.

        Args:
            save_directory: made if it does not exist.
            safe_serialization: False writes `.bin` in place of safetensors, in components of
                diffusers.
            variant: a part of the names of the weights.
            max_shard_size: bytes, or text such as `500MB`; larger weights are split.

        Raises:
            OSError: the folder cannot be written.
            ValueError: a component cannot be saved.
        """
        place = Path(save_directory).expanduser()
        given = {
            "safe_serialization": safe_serialization,
            "variant": variant,
            "max_shard_size": max_shard_size,
        }
        stale: list[str] = []
        with merged(place, stale) as staging:
            for name, component in self._folders():
                if not hasattr(component, "save_pretrained"):
                    raise ValueError(
                        f"{name}: a {type(component).__name__} cannot be saved, it has no"
                        " save_pretrained"
                    )
                known = inspect.signature(component.save_pretrained).parameters
                taken = {key: value for key, value in given.items() if key in known}
                component.save_pretrained(staging / name, **taken)
                if custom_file(type(component)):
                    copy_code(type(component), staging / name)
                if isinstance(component, Model):
                    files = sibling_files(Source(place / name).names, component.library, variant)
                    stale += [f"{name}/{file}" for file in files]
            if custom_file(type(self)):
                copy_code(type(self), staging)
            write_json(staging / INDEX, self._saved_config())

    def _saved_config(self) -> dict[str, Any]:
        saved = super()._saved_config()
        module = custom_file(type(self))
        if module:
            saved["_class_name"] = [module, type(self).__name__]
        return saved

    def _folders(self) -> Iterator[tuple[str, Any]]:
        """What is saved, and into which folder: several ControlNets into `controlnet`,
        `controlnet_1`, and so on."""
        for name, component in self.components.items():
            for i, part in enumerate(getattr(component, "nets", [component])):
                if part is not None:
                    yield f"{name}_{i}" if i else name, part


def _known_class(place: str, name: Any) -> Any:
    """The pipeline of the runtime of a name, which the index in a place has."""
    if name not in PIPELINES:
        raise ValueError(
            f"{place}: the runtime has no pipeline {name!r}; load it with a class that it has"
        )
    return public_class(name)


def _entry(component: Any) -> list[str | None]:
    """The library and class of a component, as `model_index.json` has them."""
    if component is None:
        return [None, None]
    kind = type(component)
    return [custom_file(kind) or library_of(kind), kind.__name__]
