"""Baking: adapters become part of the weights that they change.

A tensor that an adapter changes is computed from the planned one: float64, some rows at a time,
rounded once to the dtype that is written. All others stay what they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.change import (
    Change,
    bias_change,
    changes_bias,
    changes_weight,
    row_blocks,
    weight_change,
)
from ..adapters.marks import BUNDLED
from ..adapters.modules import Model, Module
from ..adapters.rounding import rounded
from ..errors import ConversionError, printable
from ..io.arrays import DTYPES, Array
from ..mappings.families import Family, component_names
from .adapters import opened
from .checkpoint import Computed, Tensor
from .layouts.adapters import AdapterFile
from .planning.baked import Baked, Baking, Tally
from .planning.keys import brief
from .planning.plan import PlannedComponent, PlannedTensor
from .settings import Settings


@dataclass(frozen=True)
class Strengths:
    """How strongly an adapter is applied.

    Attributes:
        whole: to components that are not named.
        components: component -> to it.
    """

    whole: float = 1.0
    components: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Strengths:
        """`0.8`, or `unet=0.8,text_encoder=0.5`, where components that are not named stay.

        Raises:
            ValueError: it is neither.
        """
        if "=" not in text:
            return cls(_finite(text))
        named = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            if name not in component_names():
                raise ValueError(name)
            named[name] = _finite(value)
        return cls(0.0, named)

    def of(self, component: str) -> float:
        """The strength for a component."""
        return self.components.get(component, self.whole)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def parse_lora(text: str) -> tuple[str, Strengths]:
    """`FILE`, `FILE@0.8` or `FILE@unet=0.8,text_encoder=0.5` -> the file, and how strongly.

    What follows the last `@` is part of the file's name, if it is no strength.
    """
    path, _, tail = text.rpartition("@")
    try:
        return (path, Strengths.parse(tail)) if path else (text, Strengths())
    except ValueError:
        return text, Strengths()


def bake(
    components: dict[str, PlannedComponent],
    family: Family,
    settings: Settings,
) -> Baking:
    """Plan that adapters change the components; fills in what it answers as weights are written.

    Raises:
        ConversionError: an adapter cannot be read, or does not fit the model.
    """
    baking = Baking()
    models = {name: _model(component, family) for name, component in components.items()}
    changes: dict[tuple[str, str], list[_Applied]] = {}
    for number, text in enumerate(settings.lora):
        path, strengths = parse_lora(text)
        file = opened(Path(path))
        adapter = file.sorted_for(family.name, models)
        _refuse_unfit(file, adapter.unmatched, adapter.flaws, family, settings)
        words = {} if path in settings.embedding else adapter.bundled
        if words and not settings.ignore_unmatched:
            raise ConversionError(
                f"{path}: holds the embedding `{printable(next(iter(words)))}`, for which no weight"
                f" has a place; --embedding {path} teaches it, --ignore-unmatched leaves it out"
            )
        left_out = (*adapter.unmatched, *(BUNDLED + name for name in words))
        baked = Baked(file.checkpoint, number, {}, {}, left_out)
        baking.adapters.append(baked)
        for module in adapter.modules.values():
            strength = strengths.of(module.component)
            if strength == 0:
                continue
            baked.strengths[module.component] = strength
            kind = (module.component, module.title)
            baked.flavours[kind] = baked.flavours.get(kind, 0) + 1
            if module.is_fused and not module.has_rows_apart:
                raise ConversionError(
                    f"{path}: `{printable(module.name)}` is {module.title} over layers that the"
                    " model has apart, and depends on all of them at once"
                )
            for one in module.layers():
                applied = _Applied(file, number, one, strength)
                changes.setdefault((one.component, one.path), []).append(applied)
    for (name, path), applied_here in changes.items():
        component = components[name]
        tally = baking.tallies.setdefault(name, Tally())
        for key in _patched(component, path, applied_here, tally, settings):
            baking.dtypes[name] = component.tensors[key].dtype
    return baking


@dataclass(frozen=True)
class _Applied:
    """A module of an adapter at a strength."""

    file: AdapterFile
    number: int
    module: Module[Tensor]
    strength: float

    @property
    def title(self) -> str:
        return f"{self.strength:g} x {self.file.path.name} ({self.module.title})"


def _model(component: PlannedComponent, family: Family) -> Model:
    shapes = {key: planned.shape for key, planned in component.tensors.items()}
    own = family.components[component.name].model.own_tensors
    return Model(shapes, component.config, own)


def _refuse_unfit(
    file: AdapterFile,
    unmatched: Sequence[str],
    flaws: Mapping[str, str],
    family: Family,
    settings: Settings,
) -> None:
    if unmatched and not settings.ignore_unmatched:
        raise ConversionError(
            f"{file.path}: {len(unmatched)} tensors belong to no module of the {family.title}"
            f" model: {brief(unmatched)}; --ignore-unmatched leaves them out"
        )
    for name, why in flaws.items():
        more = f" (and {len(flaws) - 1} more)" if len(flaws) > 1 else ""
        raise ConversionError(f"{file.path}: `{printable(name)}` {why}{more}")


def _patched(
    component: PlannedComponent,
    path: str,
    applied: Sequence[_Applied],
    tally: Tally,
    settings: Settings,
) -> list[str]:
    """Put changes into the plan of a layer; the keys that change."""
    dependent = [one for one in applied if one.module.depends_on_base]
    if len(dependent) > 1:
        names = " and ".join(str(one.file.path) for one in dependent[:2])
        raise ConversionError(
            f"{names} both change `{path}` in ways whose order matters"
            f" ({dependent[0].module.title}, {dependent[1].module.title}); bake one of them alone"
        )
    keys = []
    weights = [one for one in applied if changes_weight(one.module)]
    biases = [one for one in applied if changes_bias(one.module)]
    for key, several, make in (
        (f"{path}.weight", weights, _weight_change),
        (f"{path}.bias", biases, _bias_change),
    ):
        if not several:
            continue
        if key not in component.tensors:
            raise ConversionError(
                f"{several[0].file.path}: `{printable(several[0].module.name)}` changes a bias,"
                f" and the layer of the {component.name} has none"
            )
        planned = component.tensors[key]
        component.tensors[key] = _changed(planned, several, make, tally, settings)
        keys.append(key)
    return keys


_Make = Callable[[_Applied, Mapping[str, Array], Array], Change]


def _weight_change(one: _Applied, arrays: Mapping[str, Array], weight: Array) -> Change:
    return weight_change(one.module, arrays, weight, one.strength)


def _bias_change(one: _Applied, arrays: Mapping[str, Array], bias: Array) -> Change:
    change = bias_change(one.module, arrays, one.strength)
    assert change is not None
    columns = change[:, None]
    return lambda _, which: columns[which]


def _changed(
    planned: PlannedTensor,
    applied: Sequence[_Applied],
    make: _Make,
    tally: Tally,
    settings: Settings,
) -> PlannedTensor:
    """The planned tensor with changes on top."""
    base = planned.tensor()
    dtype = planned.output_dtype(settings.dtype)
    factors = [list(one.module.tensors.items()) for one in applied]
    inputs = [tensor for several in factors for _, tensor in several]

    def compute(weight: Array, *arrays: Array) -> Array:
        given = iter(arrays)
        made = []
        for one, several in zip(applied, factors, strict=True):
            named = {role: next(given) for role, _ in several}
            _check_finite(one, named, settings)
            made.append((one.number, make(one, named, weight)))
        return _summed(weight, made, DTYPES[dtype], tally)

    how = ", ".join(f"plus {one.title}" for one in applied)
    computed = Computed(base.name, dtype, planned.shape, (base, *inputs), compute, how)
    return planned._replace(sources=(computed,), op=None, part=0, parts=1)


def _check_finite(one: _Applied, arrays: Mapping[str, Array], settings: Settings) -> None:
    for role, array in arrays.items():
        if not settings.allow_nan and not np.isfinite(array.astype(np.float64)).all():
            raise ConversionError(
                f"{one.file.path}: `{printable(one.module.name)}` holds NaN or Inf ({role});"
                " --allow-nan bakes it all the same"
            )


def _summed(
    weight: Array, changes: Sequence[tuple[int, Change]], dtype: np.dtype[Any], tally: Tally
) -> Array:
    """The weight plus changes, rounded once; in place where the dtype is the same."""
    matrix = weight.reshape(len(weight), -1)
    result = matrix if matrix.dtype == dtype and matrix.flags.writeable else None
    if result is None:
        result = np.empty(matrix.shape, dtype)
    for which in row_blocks(*matrix.shape):
        old = matrix[which].astype(np.float64)
        parts = [change(old, which) for _, change in changes]
        for (number, _), part in zip(changes, parts, strict=True):
            tally.changes[number] = tally.changes.get(number, 0.0) + _square(part)
        total = sum(parts[1:], parts[0])
        tally.weights += _square(old)
        tally.change += _square(total)
        exact = np.add(old, total, out=old)
        new = rounded(exact, dtype)
        result[which] = new
        exact -= new.astype(np.float64)
        tally.lost += _square(exact)
    return result.reshape(weight.shape)


def _square(x: Array) -> float:
    """The square of a norm."""
    flat = x.reshape(-1)
    return float(np.dot(flat, flat))
