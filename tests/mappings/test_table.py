"""Expanding rows: what wins, what is carried over, and that mistakes are refused."""

import pytest

from weightport.mappings.errors import MappingError
from weightport.mappings.library import load_table
from weightport.mappings.table import Link


@pytest.fixture
def table(tmp_path):
    def load(text: str, name: str = "t"):
        (tmp_path / f"{name}.toml").write_text(text)
        load_table.cache_clear()
        return load_table(name, tmp_path)

    yield load
    load_table.cache_clear()


def _pairs(links: list[Link]) -> dict[tuple[str, ...], tuple[str, ...]]:
    return {link.targets: link.sources for link in links}


def test_prefix_is_matched_and_the_rest_carried_over(table):
    links = table('prefix = "m."\n[main]\n"a.{i}" = "b.{2*i+1}"').links(
        ["a.3.weight", "a.0.x.bias"], {}
    )
    assert _pairs(links) == {("a.3.weight",): ("m.b.7.weight",), ("a.0.x.bias",): ("m.b.1.x.bias",)}


def test_more_segments_win_then_fewer_wildcards(table):
    rows = table('[main]\n"a.*" = "star.*"\n"a.b" = "exact"\n"a.b.c" = "longest"')
    assert _pairs(rows.links(["a.z.w", "a.b.w", "a.b.c.w"], {})) == {
        ("a.z.w",): ("star.z.w",), ("a.b.w",): ("exact.w",), ("a.b.c.w",): ("longest.w",)
    }  # fmt: skip


def test_sections_and_ops_finish_a_key(table):
    rows = table('[main]\nconv = "c : kernel"\n[kernel]\nweight = "k : i o -> o i"\nbias = "b"')
    links = rows.links(["conv.weight", "conv.bias"], {})
    assert _pairs(links) == {("conv.weight",): ("c.k",), ("conv.bias",): ("c.b",)}
    assert str(links[0].op) == "i o -> o i"
    assert links[1].op is None
    assert "weight" in links[0].row
    assert "conv" in links[0].row
    with pytest.raises(MappingError, match="no row explains"):
        rows.links(["conv.weight.extra"], {})


def test_let_and_config_enter_the_arithmetic(table):
    rows = table('[let]\nn = "layers + 1"\n[main]\n"d.{i}" = "in.{n*i}.{kinds[i] == \'X\'}"')
    assert rows.links(["d.1"], {"layers": 2, "kinds": ["Y", "X"]})[0].sources == ("in.3.True",)


def test_parts_of_a_fused_tensor_become_one_link(table):
    rows = table('[main]\n"{q,k,v}_proj.weight" = "in_proj : (p o) i -> p o i"')
    (link,) = rows.links(["k_proj.weight", "v_proj.weight", "q_proj.weight"], {})  # in any order
    assert link.sources == ("in_proj",)
    assert link.targets == ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    assert link.inverse.inverse == link


def test_extends_overrides_row_by_row(table):
    table('[main]\na = "x"\nb = "y"\n[ignore]\n"z*" = "no use"', "base")
    rows = table('extends = "base"\n[main]\nb = "z"')
    assert _pairs(rows.links(["a", "b"], {})) == {("a",): ("x",), ("b",): ("z",)}
    assert rows.ignored("zz") == "no use"
    assert rows.ignored("a") is None


def test_two_targets_from_one_source_are_refused(table):
    with pytest.raises(MappingError, match="claimed by"):
        table('[main]\na = "x"\nb = "x"').links(["a", "b"], {})


def test_a_key_without_a_row_is_refused(table):
    with pytest.raises(MappingError, match="no row explains b"):
        table('[main]\na = "x"').links(["a", "b"], {})


def test_covers_limits_what_a_table_explains(table):
    rows = table('[about]\ncovers = ["dec"]\n[main]\ndec = "d"')
    assert [link.targets for link in rows.links(["dec.w", "enc.w", "decoder.w"], {})] == [
        ("dec.w",)
    ]


@pytest.mark.parametrize("text", ["[main\n", '[main]\na = "x"\na = "y"', ""])
def test_a_file_that_is_no_table_is_refused(table, text):
    with pytest.raises(MappingError):
        table(text).links(["a"], {})
