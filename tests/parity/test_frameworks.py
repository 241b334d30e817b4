"""What `mappings/facts/parity.toml` says fits families, runners and sources."""

from __future__ import annotations

import sys

import pytest

from weightport.converters.layouts.sources import LAYOUTS
from weightport.errors import ConversionError
from weightport.mappings.facts import facts
from weightport.mappings.families import families, halves
from weightport.parity.frameworks import OURS, call_of, framework_of, frameworks
from weightport.parity.process import RUNNERS

CHECKS = {name for family in families().values() for name in family.components} | set(halves())


def test_every_framework_has_its_runner() -> None:
    scripts = {path.stem.removeprefix("run_") for path in RUNNERS.glob("run_*.py")}
    assert scripts == set(frameworks())
    assert OURS in frameworks()


def test_every_model_can_be_called() -> None:
    for family in families().values():
        for name, component in family.components.items():
            for check in component.halves or [name]:
                assert call_of(check, component.class_name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_a_framework(layout: str) -> None:
    for family in families().values():
        assert framework_of(layout, family.name, family.denoiser, sys.executable)


def test_facts_name_checks_that_there_are() -> None:
    known = facts("parity")
    named = set(known["tolerances"]) - {"every"}
    for framework in frameworks().values():
        named |= set(framework.differs)
    for source in known["sources"]:
        assert source["framework"] in frameworks()
        for family, checks in source.get("checks", {}).items():
            assert set(checks) <= set(families()[family].components) | set(halves())
    assert named <= CHECKS


@pytest.mark.parametrize(
    ("layout", "family", "check", "name"),
    [
        ("kerascv", "sd2", "unet", "kerascv"),
        ("diffusers", "sdxl", "vae", "diffusers"),
        ("ldm", "sd1", "text_encoder", "ldm"),
        ("ldm", "sd2", "decoder", "ldm"),
        ("ldm", "sdxl", "unet", "diffusers"),
        ("ldm", "sd1", "controlnet", "diffusers"),
    ],
)
def test_who_runs_what(layout: str, family: str, check: str, name: str) -> None:
    assert framework_of(layout, family, check, sys.executable).name == name


def test_diffusers_takes_the_place_of_what_is_not_installed() -> None:
    assert framework_of("ldm", "sd2", "text_encoder", "/no/python").name == "diffusers"


def test_a_layout_that_no_one_runs() -> None:
    with pytest.raises(ConversionError, match="no program is known that runs files with x's names"):
        framework_of("x", "sd1", "unet", sys.executable)


def test_our_runtime_follows_the_sources_maths_first() -> None:
    kerascv = frameworks()["kerascv"]
    assert kerascv.semantics("unet") == ("kerascv", "diffusers")
    assert kerascv.semantics("text_encoder") == ("kerascv",)
    assert frameworks()["ldm"].semantics("unet") == ("diffusers",)
