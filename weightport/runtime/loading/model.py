"""What all models share: their config, and the way from a folder or the Hub and back."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import nn

from ...hub.mixin import PushToHub
from ...io.atomic import merged
from ...io.collector import collector_paused
from ...io.config_files import write_json
from ...io.heap import keep_freed_memory
from ...io.sizes import parse_size
from ...io.weight_files import find_weights, read_index, sibling_files, why_no_weights
from ..notices import FUSED, SLICED, say_once
from ..registry import COMPONENTS, component_class
from ..single_file import PlannedRepo, PlanOptions, planned_repo
from .budget import at_most, check_numbers, parameters_for
from .config import Config, HasConfig, described_by, read_config, refuse_unknown
from .options import Options, choices_of, defaults_of
from .source import Place, PlaceOptions, Source, StrPath, open_source, split_options
from .weights import NoInit, count_tensors, fill, load_weights, write_weights

CONFIG = "config.json"


@dataclass(frozen=True)
class LoadOptions:
    """How weights are loaded, by models and by pipelines.

    Attributes:
        variant: load `*.<variant>.safetensors`; of a pipeline, in the components that have it.
        dtype: what floating-point weights are cast to, float32 by default; `auto` leaves them as
            they are. For a pipeline, a dict gives each component its own, and `default` that of the
            others.
        torch_dtype: the older name of `dtype`.
        use_safetensors: True loads no `.bin`, False nothing else; by default safetensors come
            first.
        device_map: the device to load to.
        disable_mmap: read the files into memory instead of mapping them.
        low_cpu_mem_usage: of no effect; loading always takes as little memory as it can.
        ignore_mismatched_sizes: weights of another shape than the model's stay random.
    """

    variant: str | None = None
    dtype: Any = None
    torch_dtype: Any = None
    use_safetensors: bool | None = None
    device_map: str | torch.device | None = None
    disable_mmap: bool = False
    low_cpu_mem_usage: bool = True
    ignore_mismatched_sizes: bool = False

    def dtypes(self) -> dict[str, torch.dtype | None]:
        """Component, or `default` -> the dtype to cast to; None leaves weights as they are.

        Raises:
            ValueError: both names are given, or weights cannot be of a dtype.
        """
        if self.dtype is not None and self.torch_dtype is not None:
            raise ValueError(
                "dtype and torch_dtype are two names of one argument; give one of them"
            )
        wanted = self.torch_dtype if self.dtype is None else self.dtype
        each = wanted if isinstance(wanted, Mapping) else {"default": wanted}
        return {str(name): _one_dtype(value) for name, value in {"default": None, **each}.items()}

    def device(self) -> torch.device | None:
        """The device that `device_map` means.

        Raises:
            ValueError: it is not a device; models are not spread over several.
        """
        try:
            return None if self.device_map is None else torch.device(self.device_map)
        except (RuntimeError, TypeError):
            message = (
                f"device_map = {self.device_map!r} is not supported; give one device, such as"
                " 'cuda'"
            )
            raise ValueError(message) from None


class Model(nn.Module, HasConfig, PushToHub):
    """The base of the models.

    Attributes:
        config: the content of `config.json`, complete with defaults.
        irrelevant: options that only other code reads, or that matter only in training.
        library: `diffusers` or `transformers`, the library whose file names the weights have.
        wide_in_float16: names of parts whose weights are float32 where the model is loaded in
            float16, whose range they would leave.
        name_or_path: where the model was loaded from.
    """

    config_name: ClassVar[str] = CONFIG
    library: ClassVar[str] = "diffusers"
    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("set_attn_processor", "attn_processors"),
            "custom attention processors are not supported; attention is PyTorch's own",
        ),
        **dict.fromkeys(
            ("enable_gradient_checkpointing", "disable_gradient_checkpointing"),
            "gradient checkpointing is for training; train with diffusers",
        ),
        "enable_xformers_memory_efficient_attention": "xformers is not used; attention is"
        " PyTorch's own, which takes no more memory",
        "enable_group_offload": "offloading is not supported; move the model with to()",
        "enable_layerwise_casting": "layerwise casting is not supported; load in dtype=float16",
    }
    irrelevant: ClassVar[Collection[str]] = ()
    wide_in_float16: ClassVar[tuple[str, ...]] = ()
    ignored: ClassVar[tuple[str, ...]] = ()
    config: Config
    name_or_path: str = ""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)  # a parameter or a part
            except AttributeError:
                return HasConfig.__getattr__(self, name)

    def _configure(self, options: Options, init: Callable[..., None]) -> None:
        """Make the config from the options that are given to `init`."""
        name = type(self).__name__
        defaults = defaults_of(init)
        self.config = read_config(name, options, defaults, choices_of(init), self.irrelevant)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; the process keeps the memory of its activations for the next run."""
        keep_freed_memory()
        return super().__call__(*args, **kwargs)

    def set_default_attn_processor(self) -> None:
        """Of no effect, which is said once."""
        say_once("set_default_attn_processor has no effect: attention is always PyTorch's own")

    def set_attention_slice(self, slice_size: str | int | Sequence[int] = "auto") -> None:
        """Of no effect, which is said once."""
        say_once(f"set_attention_slice {SLICED}")

    def fuse_qkv_projections(self) -> None:
        """Of no effect, which is said once."""
        say_once(f"fuse_qkv_projections {FUSED}")

    def unfuse_qkv_projections(self) -> None:
        """Of no effect, which is said once."""
        say_once(f"unfuse_qkv_projections {FUSED}")

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the model has; of those that train, or without tables of embeddings."""
        tables = [one for one in self.modules() if isinstance(one, nn.Embedding)]
        left_out = {id(one.weight) for one in tables} if exclude_embeddings else set()
        return sum(
            one.numel()
            for one in self.parameters()
            if id(one) not in left_out and (one.requires_grad or not only_trainable)
        )

    @classmethod
    def rename(cls, key: str) -> str | None:
        """The name that a key of an older or newer file has here; None for what this model has no
        use for."""
        return key

    @classmethod
    def _given(cls, config: Mapping[str, Any] | Place, options: dict[str, Any]) -> dict[str, Any]:
        """A config, or the one at a place, changed as options say."""
        if isinstance(config, Mapping):
            return {**config, **options}
        read, changes = cls.load_config(config, return_unused_kwargs=True, **options)
        return {**read, **changes}

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Place, **options: Any) -> Self:
        """A model with random weights.

        Args:
            config: the content of a `config.json`, or where one is: a folder, or a repository on
                the Hub.
            options: take precedence over the config; for a place also `PlaceOptions`.

        Raises:
            ValueError: the config asks for something that is not implemented.
        """
        given = cls._given(config, options)
        known = inspect.signature(cls.__init__).parameters.keys()
        others = {key: value for key, value in given.items() if key not in known}
        refuse_unknown(cls.__name__, others, cls.irrelevant)
        model = cls(**{key: value for key, value in given.items() if key in known})
        model.config = Config({**model.config, **others})
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Place,
        *,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Self:
        """The model in a folder or on the Hub, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a local folder, or the id of a repository on the Hub.
            output_loading_info: return the model and, as diffusers does, a dict of lists:
                `missing_keys` and `error_msgs`, always empty as these raise, `mismatched_keys`, and
                `unexpected_keys`, those that are known to be of no use.
            options: see `LoadOptions` and `PlaceOptions`, and options of the model that take
                precedence over its config; a model alone never falls back from a variant to the
                main weights.

        Raises:
            OSError: the folder, the repository or a file in it is missing.
            TypeError: an option is unknown.
            ValueError: the config asks for something that is not implemented, or the weights do not
                fit.
        """
        place, others = split_options(options, PlaceOptions)
        load, changes = split_options(others, LoadOptions)
        known = inspect.signature(cls.__init__).parameters.keys()
        if unknown := [key for key in changes if key not in known]:
            raise TypeError(f"{cls.__name__}.from_pretrained() takes no {', '.join(unknown)}")
        wanted = LoadOptions(**load)
        source = open_source(pretrained_model_name_or_path, **place)
        dtype, device = wanted.dtypes()["default"], wanted.device()
        files = find_files(source, cls.library, wanted.variant, wanted.use_safetensors)
        folder = source.fetch([CONFIG, *files] if CONFIG in source.names else files)
        paths = [folder / name for name in files]
        with collector_paused():
            model = cls._built(source, paths, changes)
            unfit: list[str] | None = [] if wanted.ignore_mismatched_sizes else None
            mmap = not wanted.disable_mmap
            wide = cls.wide_in_float16
            unused = load_weights(model, paths, cls.rename, dtype, device, mmap, unfit, wide)
        if unfit:
            check_numbers(sum(model.get_parameter(key).numel() for key in unfit), source.name)
            random = cls.from_config(source.json(CONFIG), **changes).state_dict()
            fresh = {key: random[key].to(device, dtype) for key in unfit}
            model.load_state_dict(fresh, strict=False, assign=True)
        model.name_or_path = source.name
        model.eval()
        if output_loading_info:
            info = {
                "missing_keys": [],
                "unexpected_keys": unused,
                "mismatched_keys": unfit or [],
                "error_msgs": [],
            }
            return model, info  # type: ignore[return-value]
        return model

    @classmethod
    def _built(cls, source: Source, paths: Sequence[Path], changes: Options) -> Self:
        """The model that a config describes, on the meta device.

        Raises:
            ValueError: none can be made of it, or none that the weights could fill.
        """
        config = source.json(CONFIG)
        limit = parameters_for(sum(map(count_tensors, paths)))
        with (
            described_by(f"{source.name}/{CONFIG}"),
            torch.device("meta"),
            NoInit(),
            at_most(limit),
        ):
            return cls.from_config(config, **changes)

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: StrPath | Sequence[StrPath],
        *,
        component: str | None = None,
        **options: Any,
    ) -> Self:
        """The model that a checkpoint of any layout holds, in evaluation mode: equal to converting
        first, and nothing is written.

        Args:
            pretrained_model_link_or_path_or_dict: what `weightport.convert` reads, one or several;
                or the address of a file on the Hub.
            component: which, where the checkpoint holds several of this class.
            options: see `PlanOptions` and `LoadOptions`.

        Raises:
            ConversionError: the checkpoint cannot be read.
            TypeError: an option is unknown.
            ValueError: it holds no such model.
        """
        plan, others = split_options(options, PlanOptions)
        load, unknown = split_options(others, LoadOptions)
        if unknown:
            raise TypeError(f"{cls.__name__}.from_single_file() takes no {', '.join(unknown)}")
        with planned_repo(pretrained_model_link_or_path_or_dict, cast(PlanOptions, plan)) as repo:
            mine = [name for name, kind in repo.classes.items() if kind == cls.__name__]
            if not mine or component not in (None, *mine):
                held = ", ".join(f"{name} ({kind})" for name, kind in repo.classes.items())
                raise ValueError(f"{repo.name}: there is no {cls.__name__} in it, but {held}")
            return cls.from_planned(repo, component or mine[0], LoadOptions(**load))

    @classmethod
    def from_planned(cls, repo: PlannedRepo, component: str, wanted: LoadOptions) -> Self:
        """A component of a planned repository, in evaluation mode."""
        dtype = wanted.dtypes()["default"]
        with torch.device("meta"), NoInit():
            model = cls.from_config(repo.config(component))
        where = f"{repo.name}: {component}"
        tensors = repo.tensors(component)
        wide = cls.wide_in_float16
        fill(model, tensors, where, cls.rename, dtype, wanted.device(), wide=wide)
        model.name_or_path = repo.name
        model.eval()
        return model

    def save_pretrained(
        self,
        save_directory: StrPath,
        *,
        is_main_process: bool = True,
        save_function: None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Write `config.json` and the weights, as diffusers and transformers load them; may also
        push, see `PushToHub`.

        Other files of the folder stay, such as other variants; earlier weights of the same variant
        are replaced.

        Args:
            save_directory: made if it does not exist.
            is_main_process: False writes nothing: another process does.
            save_function: of no use, which is said: files appear whole or not at all.
            safe_serialization: False writes `.bin` in place of safetensors.
            variant: a part of the names of the weights; the config is the same for all variants.
            max_shard_size: bytes, or text such as `500MB`; larger weights are split.

        Raises:
            OSError: the folder cannot be written.
            ValueError: the variant or the size makes no sense, or the model has what no file holds.
        """
        if save_function is not None:
            warnings.warn("save_function is not called", stacklevel=3)
        if not is_main_process:
            return
        if variant is not None and not re.fullmatch(r"[\w-]+", variant):
            raise ValueError(f"variant = {variant!r} cannot be part of a file name")
        if unsaved := self._unsaved():
            raise ValueError(f"{type(self).__name__}: {unsaved}")
        stale = sibling_files(Source(Path(save_directory)).names, self.library, variant)
        with merged(save_directory, stale) as staging:
            write_json(staging / CONFIG, self._saved_config())
            write_weights(
                staging,
                self.state_dict(),
                self.library,
                variant,
                _shard_size(max_shard_size),
                safe_serialization,
            )

    def _unsaved(self) -> str:
        """What the model has that its files have no place for, and what to do; empty if nothing."""
        return ""

    def _saved_config(self) -> dict[str, Any]:
        """The config for other readers. No dtype: transformers would impose it on every variant of
        the weights."""
        config, hidden = super()._saved_config(), ("_", "dtype", "torch_dtype")
        if self.library == "diffusers":
            return config
        own = {key: value for key, value in config.items() if not key.startswith(hidden)}
        return own | {"architectures": [type(self).__name__]}


class TransformersModel(Model):
    """A model of transformers, whose constructor takes the config as one."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = Config(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Place, **options: Any) -> Self:
        """As of every model."""
        return cls(cls._given(config, options))


class AutoModel:
    """Loads a model whose class `config.json` tells."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Place, **options: Any) -> Model:
        """The model in a folder or on the Hub; for the other arguments see `Model.from_pretrained`.

        Raises:
            ValueError: the config names no class of the runtime.
        """
        place, options = split_options(options, PlaceOptions)
        source = open_source(pretrained_model_name_or_path, **place)
        config = source.json(CONFIG)
        name = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
        for kind in (component_class(library, str(name)) for library in COMPONENTS):
            if kind is not None and issubclass(kind, Model):
                return kind.from_pretrained(source, **options)
        raise ValueError(
            f"{source.name}: its config.json names {name!r}, which is not a model of the runtime"
        )


def find_files(
    source: Source, library: str, variant: str | None, use_safetensors: bool | None
) -> list[str]:
    """The names of the files that hold a model's weights.

    Raises:
        OSError: there are none, or shards are missing.
        ValueError: the index of the shards is damaged.
    """
    weights = find_weights(source.names, library, variant, use_safetensors)
    if weights is None:
        raise OSError(
            f"{source.name}: {why_no_weights(source.names, library, variant, use_safetensors)}"
        )
    if not weights.endswith(".json"):
        return [weights]
    suffix = "safetensors" if ".safetensors." in weights else "bin"
    try:
        shards = sorted(set(read_index(source.json(weights), suffix).values()))
    except ValueError as error:
        raise ValueError(f"{source.name}/{weights}: {error}") from None
    if missing := [name for name in shards if name not in source.names]:
        raise OSError(
            f"{source.name}: {weights} names {missing[0]}, which is missing; download it again"
        )
    return shards


def _one_dtype(wanted: Any) -> torch.dtype | None:
    if wanted is None or wanted == "auto":
        return torch.float32 if wanted is None else None
    if not isinstance(wanted, torch.dtype):
        warnings.warn(f"dtype = {wanted!r} is not a torch.dtype; float32 is used", stacklevel=3)
        return torch.float32
    if not wanted.is_floating_point:
        raise ValueError(f"dtype = {wanted} is not a floating-point dtype")
    return wanted


def _shard_size(size: int | str) -> int:
    try:
        return parse_size(size)
    except ValueError as error:
        raise ValueError(f"max_shard_size = {size!r}: {error}") from None
