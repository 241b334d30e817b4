"""The laws of naming conventions, for every module of every family."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from weightport.mappings.conventions import Convention, Naming, conventions, stock_names, written
from weightport.mappings.facts import facts
from weightport.mappings.families import families

Module = tuple[str, str]
UNNAMED = {"sd3", "sd35_medium", "sd35_large", "flux", "flux_schnell"}  # no convention knows them
NAMED = [name for name in families() if name not in UNNAMED]


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


def written_name(family: str, convention: Convention, module: Module) -> str:
    """The name that the convention writes, by the first naming that has one."""
    component, path = module
    names = (stock_names(naming, family).get(path) for naming in convention.of(component, family))
    return next(name for name in names if name is not None)


@pytest.mark.parametrize("family", NAMED)
def test_all_conventions_together_are_injective(family: str) -> None:
    """So that a file may even mix them."""
    owners: dict[str, Module] = {}
    for convention in conventions().values():
        for naming in namings(family, convention):
            for path, name in stock_names(naming, family).items():
                owner = owners.setdefault(name, (naming.component, path))
                assert owner == (naming.component, path), name
    assert set(owners.values()) == modules(family)


@pytest.mark.parametrize("family", NAMED)
@pytest.mark.parametrize("name", written())
def test_every_module_survives_a_round_trip(family: str, name: str) -> None:
    convention = conventions()[name]
    read = {
        spelled: (naming.component, path)
        for naming in namings(family, convention)
        for path, spelled in stock_names(naming, family).items()
    }
    names = {module: written_name(family, convention, module) for module in modules(family)}
    assert len(set(names.values())) == len(names)
    assert {module: read[spelled] for module, spelled in names.items()} == {m: m for m in names}


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
