"""What pipelines do with adapters: load, weigh, fuse and unload LoRA and its relatives.

Names and defaults are those of diffusers; files of every convention and flavour are read.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...adapters.alphas import KEY, WEIGHTS, Alphas
from ...adapters.marks import CONFIG
from ...adapters.modules import Adapter, Model, decode
from ...io.atomic import merged
from ...mappings.families import Family, families
from ..adapted import AdaptedModel, Fused, by_layer, is_plain
from ..loading.source import Place, Source, open_source
from ..loading.weights import read_tensors

NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_IGNORED = {"low_cpu_mem_usage", "hotswap", "use_safetensors", "unet_config"}  # of diffusers

Weight = float | Mapping[str, float] | None


class LoadsAdapters:
    """The part of a pipeline that adapters are loaded into.

    Attributes:
        adapted: the components that they may change.
    """

    _lora_loadable_modules: ClassVar[tuple[str, ...]] = ("unet", "text_encoder", "text_encoder_2")

    def _adapted(self) -> dict[str, AdaptedModel]:
        """Component -> its adapters."""
        models = {name: getattr(self, name, None) for name in self._lora_loadable_modules}
        return {
            name: AdaptedModel.of(model)
            for name, model in models.items()
            if isinstance(model, nn.Module)
        }

    @contextmanager
    def _changing(self) -> Iterator[dict[str, AdaptedModel]]:
        """Component -> its adapters, to say something else of; if that fails, all stay as they
        were.

        Raises:
            ValueError: a component is compiled.
        """
        self._check_not_compiled()
        adapted = self._adapted()
        before = {name: model.state for name, model in adapted.items()}
        try:
            yield adapted
            for model in adapted.values():
                model.update()
        except BaseException:
            for name, model in adapted.items():
                model.restore(before[name])
            raise

    # --- loading ----------------------------------------------------------------------------------

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Place | Mapping[str, Tensor],
        adapter_name: str | None = None,
        **options: Any,
    ) -> None:
        """Load an adapter, and use it alone from now on.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder or Hub id, or what was in a
                file: LoRA, LyCORIS, DoRA, OFT and more, under the names of any trainer.
            adapter_name: to speak of it later; by default `default_0`, `default_1`, ...
            options: `weight_name`, the file in a folder or repository; `subfolder`, and how to
                reach the Hub.

        Raises:
            OSError: there is no such file.
            ValueError: it is no adapter, or not of this model.
        """
        options = {key: value for key, value in options.items() if key not in _IGNORED}
        place = pretrained_model_name_or_path_or_dict
        if isinstance(place, Mapping):
            where = "the state dict"
            tensors = dict(place)
            alphas = Alphas()
        else:
            where, tensors, alphas = _read(place, options)
        self._check_not_compiled()
        name = adapter_name or f"default_{len(self._all_adapters())}"
        if name in self._all_adapters():
            raise ValueError(f"there is an adapter {name!r} already; choose another adapter_name")
        adapter = self._sorted(where, tensors, alphas)
        if adapter.bundled:
            warnings.warn(
                f"{where}: holds words too; load_textual_inversion of the same file teaches them",
                stacklevel=2,
            )
        with self._changing() as adapted:
            for component, model in adapted.items():
                modules = by_layer(
                    one for (of, _), one in adapter.modules.items() if of == component
                )
                if modules:
                    model.adapters[name] = modules
                    model.strengths = {name: 1.0}
                    model.is_enabled = True

    def _sorted(self, where: str, tensors: Mapping[str, Tensor], alphas: Alphas) -> Adapter[Tensor]:
        """The modules of an adapter, of this pipeline's models."""
        components = {name: getattr(self, name) for name in self._adapted()}
        adapter = None
        for family in _compatible(components):
            models = {name: _model(family, name, one) for name, one in components.items()}
            try:
                adapter = decode(tensors, family, models, alphas, lambda one: float(one.item()))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if adapter.fits:
                return adapter
        assert adapter is not None
        if adapter.unmatched:
            raise ValueError(
                f"{where}: {len(adapter.unmatched)} tensors belong to no module of the pipeline:"
                f" {adapter.unmatched[0]}"
            )
        name, why = next(iter(adapter.flaws.items()))
        raise ValueError(f"{where}: {name} {why}")

    def _check_not_compiled(self) -> None:
        for name in self._adapted():
            if "forward" in vars(getattr(self, name)):
                raise ValueError(
                    f"the {name} is compiled, and its graph knows nothing of adapters: load them"
                    " before compile()"
                )

    # --- weights ----------------------------------------------------------------------------------

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Weight | Sequence[Weight] = None
    ) -> None:
        """Use these adapters, each with a weight or with one for each component.

        Raises:
            ValueError: there is no such adapter, or not one weight for each.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights: list[Any] = (
            list(adapter_weights)
            if isinstance(adapter_weights, Sequence)
            else [adapter_weights] * len(names)
        )
        if len(names) != len(weights):
            raise ValueError(f"{len(names)} adapters are named, with {len(weights)} weights")
        self._check_known(names)
        with self._changing() as adapted:
            for component, model in adapted.items():
                model.strengths = {
                    name: _weight(weight, component)
                    for name, weight in zip(names, weights, strict=True)
                    if name in model.adapters
                }

    def get_active_adapters(self) -> list[str]:
        """The names of the adapters in use."""
        used = [name for model in self._adapted().values() for name in model.strengths]
        return list(dict.fromkeys(used))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Component -> the names of its adapters."""
        return {
            component: list(model.adapters)
            for component, model in self._adapted().items()
            if model.adapters
        }

    def enable_lora(self) -> None:
        """Use the adapters again."""
        self._enable(True)

    def disable_lora(self) -> None:
        """Use no adapter until `enable_lora`."""
        self._enable(False)

    def _enable(self, is_enabled: bool) -> None:
        with self._changing() as adapted:
            for model in adapted.values():
                model.is_enabled = is_enabled

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters.

        Raises:
            ValueError: there is no such adapter.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_known(names)
        with self._changing() as adapted:
            for model in adapted.values():
                for name in names:
                    model.adapters.pop(name, None)
                    model.strengths.pop(name, None)

    def unload_lora_weights(self) -> None:
        """Forget all adapters; what is fused stays."""
        self.delete_adapters(list(self._all_adapters()))

    # --- fusing -----------------------------------------------------------------------------------

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Make adapters part of the parameters, which then take no more time than without.

        Args:
            components: those to fuse; by default all.
            lora_scale: weight of all of them.
            safe_fusing: as in diffusers; NaN is refused in any case.
            adapter_names: by default those in use.

        Raises:
            ValueError: there is no such component or adapter, or parameters become NaN.
        """
        self._check_known(adapter_names or ())
        with self._changing() as adapted:
            for model in _chosen(adapted, components):
                names = [one for one in adapter_names or model.strengths if one in model.adapters]
                for name in names:
                    strength = lora_scale * model.strengths.get(name, 1.0)
                    model.fused[name] = Fused(model.adapters[name], strength)

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Put back the parameters from before `fuse_lora`, bit for bit."""
        with self._changing() as adapted:
            for model in _chosen(adapted, components):
                model.fused.clear()

    # --- saving -----------------------------------------------------------------------------------

    @classmethod
    def _save_adapters(
        cls,
        folder: str | Path,
        layers: Mapping[str, Mapping[str, Tensor] | None],
        configs: Mapping[str, Mapping[str, Any] | None],
        weight_name: str | None,
    ) -> None:
        """Save layers as diffusers does: one safetensors file, PEFT's configs in its header.

        Args:
            layers: component -> name -> tensor.
            configs: component -> PEFT's config.

        Raises:
            ValueError: there is nothing to save.
        """
        tensors: dict[str, Tensor] = {}
        said: dict[str, Any] = {}
        for component, state in layers.items():
            for key, tensor in (state or {}).items():
                tensors[f"{component}.{key}"] = tensor.detach().cpu().clone().contiguous()
            for key, value in (configs[component] or {}).items():
                said[f"{component}.{key}"] = sorted(value) if isinstance(value, set) else value
        if not tensors:
            raise ValueError("there are no layers to save")
        metadata = {"format": "pt"}
        if said:
            metadata[KEY] = json.dumps(said, indent=2, sort_keys=True)
        with merged(folder) as staging:
            save_file(tensors, staging / (weight_name or NAMES[0]), metadata)

    # --- checks -----------------------------------------------------------------------------------

    def _all_adapters(self) -> list[str]:
        every = [name for names in self.get_list_adapters().values() for name in names]
        return list(dict.fromkeys(every))

    def _check_known(self, names: Sequence[str]) -> None:
        known = self._all_adapters()
        for name in names:
            if name not in known:
                raise ValueError(f"there is no adapter {name!r}; there are {known}")

    def _check_scale(self, argument: str, scale: float) -> None:
        """Refuse a scale for adapters that are part of the parameters.

        Args:
            argument: of the call, that holds the scale.
        """
        if scale == 1:
            return
        for model in self._adapted().values():
            active = [model.adapters[name] for name in model.strengths]
            if any(not is_plain(one) for modules in active for one in modules.values()):
                raise ValueError(
                    f'{argument}={{"scale": ...}} is for plain LoRA; weigh others with set_adapters'
                )


def _chosen(
    adapted: Mapping[str, AdaptedModel], components: Sequence[str] | None
) -> list[AdaptedModel]:
    """The models of some components, or of all."""
    for name in components or ():
        if name not in adapted:
            raise ValueError(f"{name} is no component with adapters; there are {[*adapted]}")
    return [adapted[name] for name in components or adapted]


def _weight(weight: Weight, component: str) -> float:
    """The weight of an adapter in a component."""
    value: Any = weight.get(component) if isinstance(weight, Mapping) else weight
    if isinstance(value, Mapping):
        raise ValueError("weights for single blocks are not supported; give one for a component")
    return 1.0 if value is None else float(value)


def _model(family: str, name: str, model: Any) -> Model:
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    stock = families()[family].components[name]
    return Model(shapes, dict(model.config), stock.model.own_tensors)


def _compatible(models: Mapping[str, Any]) -> list[str]:
    """Families that have these models, those with no other text encoders first."""

    def has_them(family: Family) -> bool:
        if not models.keys() <= family.components.keys():
            return False
        if family.denoiser not in models:
            return True
        wanted = family.components[family.denoiser].class_name
        return any(kind.__name__ == wanted for kind in type(models[family.denoiser]).__mro__)

    fitting = [name for name, one in families().items() if has_them(one)]
    return sorted(fitting, key=lambda name: len(families()[name].text_encoders))


# --- files ----------------------------------------------------------------------------------------


def _read(place: Place, options: Mapping[str, Any]) -> tuple[str, dict[str, Tensor], Alphas]:
    """What is in a file: for messages its name, tensors, and what its header says of alphas."""
    config = None
    if isinstance(place, Source) or not Path(place).is_file():
        others = {key: value for key, value in options.items() if key != "weight_name"}
        source = open_source(place, **others)
        name = options.get("weight_name") or _only(source)
        if name in WEIGHTS and CONFIG in source.names:
            config = source.json(CONFIG)
        path = source.path(name)
    else:
        path = Path(place)
    try:
        tensors = dict(read_tensors(path))
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                alphas = Alphas.parse(file.metadata() or {})
        else:
            alphas = Alphas()
        if config is not None:
            alphas = Alphas.of_config(config)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(path) in message else f"{path}: {message}") from None
    return str(path), tensors, alphas


def _only(source: Source) -> str:
    """The file of a folder that is meant where none is named."""
    for name in (*NAMES, *WEIGHTS):
        if name in source.names:
            return name
    found = [name for name in source.names if name.endswith(".safetensors")]
    if len(found) != 1:
        raise ValueError(
            f"{source.name}: {len(found)} files may be the adapter; say which with weight_name"
        )
    return found[0]
