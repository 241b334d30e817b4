"""The laws of naming conventions, for every module of every family."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from weightport.adapters.modules import parts_of
from weightport.mappings.conventions import (
    Convention,
    Layer,
    Naming,
    conventions,
    stock_layers,
    written,
)
from weightport.mappings.facts import facts
from weightport.mappings.families import families

Module = tuple[str, str]
ADAPTED = [name for name, family in families().items() if family.adapted]
PARTIAL = {"xlabs"}  # it names attention alone


def namings(family: str, convention: Convention) -> Iterator[Naming]:
    """Those of a pipeline's models: a ControlNet's modules are named as the UNet's."""
    components = families()[family].components
    for naming in convention.namings:
        known = components.get(naming.component)
        if known is not None and not known.extends and naming.serves(family):
            yield naming


def modules(family: str) -> set[Module]:
    return {
        (component.name, key.removesuffix(".weight"))
        for component in families()[family].components.values()
        if not component.extends and component.name != "vae"
        for key in component.manifest()
        if key.endswith(".weight")
    }


def written_layer(family: str, convention: Convention, module: Module) -> Layer | None:
    """What the convention writes for a module, by the first naming that has a name for it."""
    component, path = module
    layers = (stock_layers(naming, family).get(path) for naming in convention.of(component, family))
    return next((layer for layer in layers if layer is not None), None)


@pytest.mark.parametrize("family", ADAPTED)
def test_all_conventions_together_are_injective(family: str) -> None:
    """So that a file may even mix them."""
    owners: dict[str, tuple[str, tuple[str, ...]]] = {}
    for convention in conventions().values():
        for naming in namings(family, convention):
            for layer in stock_layers(naming, family).values():
                ours = (naming.component, layer.modules)
                assert owners.setdefault(layer.name, ours) == ours, layer.name
    assert {(name, path) for name, paths in owners.values() for path in paths} == modules(family)


@pytest.mark.parametrize("family", ADAPTED)
def test_rows_of_fused_layers_are_those_of_its_modules(family: str) -> None:
    """Each once, so that what is taken apart can be put together."""
    for convention in conventions().values():
        for naming in namings(family, convention):
            shapes = families()[family].components[naming.component].manifest()
            for layer in stock_layers(naming, family).values():
                if layer.op is None:
                    continue
                assert layer.op.keeps_order, layer
                height = sum(shapes[f"{path}.weight"][0] for path in layer.modules)
                taken: list[int] = []
                for part in parts_of(layer):
                    own = [i for first, last, _ in part.shares for i in range(first, last)]
                    (of,) = {of for _, _, of in part.shares}
                    assert len(own) * height == of * shapes[f"{part.path}.weight"][0], part
                    taken += own
                assert sorted(taken) == list(range(of)), layer


@pytest.mark.parametrize("family", ADAPTED)
@pytest.mark.parametrize("name", written())
def test_every_module_survives_a_round_trip(family: str, name: str) -> None:
    convention = conventions()[name]
    read = {
        layer.name: (naming.component, layer.modules)
        for naming in namings(family, convention)
        for layer in stock_layers(naming, family).values()
    }
    denoiser = families()[family].denoiser
    knows = any(naming.component == denoiser for naming in namings(family, convention))
    names: dict[str, tuple[str, tuple[str, ...]]] = {}
    for module in modules(family):
        layer = written_layer(family, convention, module)
        if layer is None:
            assert not knows or name in PARTIAL, module
            continue
        assert module[1] in layer.modules
        ours = (module[0], layer.modules)
        assert names.setdefault(layer.name, ours) == ours
        assert read[layer.name] == ours
    assert names or not knows


def test_every_role_is_used_and_named_once() -> None:
    known = facts("adapters")
    endings = [ending for several in known["roles"].values() for ending in several]
    assert len(endings) == len(set(endings))
    used = set(known["refused"])
    for flavour in known["flavours"].values():
        used |= {role for need in flavour["needs"] for role in need.replace("|", " ").split()}
        used |= set(flavour["may"])
    assert used == set(known["roles"])


def test_conventions_name_roles_and_flavours_that_exist() -> None:
    known = facts("adapters")
    for convention in conventions().values():
        assert set(convention.flavours) <= set(known["flavours"])
        assert set(convention.lacks) <= set(known["roles"])
        for naming in convention.namings:
            for role, ending in {**convention.roles, **naming.roles}.items():
                assert ending in known["roles"][role]
