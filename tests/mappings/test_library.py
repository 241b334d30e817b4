"""Where tables lie, and what they are called."""

from pathlib import Path

import pytest

from weightport.mappings.errors import MappingError
from weightport.mappings.library import FOLDER, all_tables, load_table

FILES = sorted(FOLDER.glob("*/*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_is_a_table(path: Path) -> None:
    name = path.stem if path.stem == path.parent.name else f"{path.parent.name}_{path.stem}"
    assert load_table(name).name == name


def test_every_table_lies_in_a_folder() -> None:
    assert sorted(FOLDER.rglob("*.toml")) == FILES


def test_tables_are_in_order_and_name_a_part() -> None:
    names = [table.name for table in all_tables()]
    assert names == sorted(names)
    assert {"kerascv_unet", "ldm_vae", "openclip_sdxl", "diffusers_unet"} <= set(names)
    assert not {"keras", "openclip", "kerascv_vae"} & set(names)  # they only serve others


@pytest.mark.parametrize("place", ["a_b/c.toml", "a/b_c.toml", "a_b_c/a_b_c.toml", "a_b_c.toml"])
def test_names_may_hold_underscores(place: str, tmp_path: Path) -> None:
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text('[main]\n"*" = "*"')
    assert load_table("a_b_c", tmp_path).links(["x"], {})[0].sources == ("x",)


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MappingError, match=r"table kerascv_transformer: .*No such file"):
        load_table("kerascv_transformer")
    (tmp_path / "a.toml").write_text('extends = "b"')
    with pytest.raises(MappingError, match="table b: "):
        load_table("a", tmp_path)
