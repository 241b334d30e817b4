"""What is true of every file in a layout."""

import pytest

from weightport.converters.layouts.sources import LAYOUTS
from weightport.converters.outputs import OUTPUTS
from weightport.mappings.facts import FOLDER
from weightport.mappings.families import NAMES as FAMILIES
from weightport.mappings.layouts import CANONICAL, NAMES, layouts
from weightport.mappings.library import all_tables


def test_every_layout_has_facts_tables_and_modules() -> None:
    assert tuple(layouts()) == NAMES
    for name in NAMES:
        assert (FOLDER / f"{name}.toml").is_file()
        assert any(table.about["layout"] == name for table in all_tables())
    assert LAYOUTS.keys() == OUTPUTS.keys() == set(NAMES)
    assert [name for name, output in OUTPUTS.items() if output.is_repo] == [CANONICAL]


@pytest.mark.parametrize("name", NAMES)
def test_facts_name_families_that_there_are(name: str) -> None:
    layout = layouts()[name]
    named = {*layout.base_models, *layout.stock_files}
    if layout.text_activation:
        named |= set(layout.text_activation.families)
    assert named <= set(FAMILIES)


def test_what_kerascv_does_is_the_same_in_every_model() -> None:
    kerascv = layouts()["kerascv"]
    assert kerascv.scheduler is not None
    assert kerascv.scheduler["_class_name"] == "DDIMScheduler"
    assert kerascv.pad_token == "<|endoftext|>"
    assert kerascv.text_activation is not None
    assert set(kerascv.text_activation.choices) == {"tanh", "erf"}


@pytest.mark.parametrize("name", ["diffusers", "ldm"])
def test_files_of_other_layouts_differ(name: str) -> None:
    layout = layouts()[name]
    assert layout.scheduler is None
    assert layout.pad_token is None
    assert layout.text_activation is None
    assert not layout.text_encoder
