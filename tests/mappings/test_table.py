"""Expanding rows: what wins, what is carried over, and that mistakes are refused."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from weightport.mappings.errors import MappingError
from weightport.mappings.library import load_table, loaded
from weightport.mappings.table import Link, Table

Load = Callable[..., Table]


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Load]:
    def load(text: str, name: str = "t") -> Table:
        (tmp_path / f"{name}.toml").write_text(text)
        loaded.cache_clear()
        return load_table(name, tmp_path)

    yield load
    loaded.cache_clear()


def _pairs(links: list[Link]) -> dict[tuple[str, ...], tuple[str, ...]]:
    return {link.targets: link.sources for link in links}


def test_prefix_is_matched_and_the_rest_carried_over(table: Load) -> None:
    links = table('prefix = "m."\n[main]\n"a.{i}" = "b.{2*i+1}"').links(
        ["a.3.weight", "a.0.x.bias"], {}
    )
    assert _pairs(links) == {("a.3.weight",): ("m.b.7.weight",), ("a.0.x.bias",): ("m.b.1.x.bias",)}


def test_more_segments_win_then_fewer_wildcards(table: Load) -> None:
    rows = table('[main]\n"a.*" = "star.*"\n"a.b" = "exact"\n"a.b.c" = "longest"')
    assert _pairs(rows.links(["a.z.w", "a.b.w", "a.b.c.w"], {})) == {
        ("a.z.w",): ("star.z.w",), ("a.b.w",): ("exact.w",), ("a.b.c.w",): ("longest.w",)
    }  # fmt: skip


def test_sections_and_ops_finish_a_key(table: Load) -> None:
    rows = table('[main]\nconv = "c : kernel"\n[kernel]\nweight = "k : i o -> o i"\nbias = "b"')
    links = rows.links(["conv.weight", "conv.bias"], {})
    assert _pairs(links) == {("conv.weight",): ("c.k",), ("conv.bias",): ("c.b",)}
    assert str(links[0].op) == "i o -> o i"
    assert links[1].op is None
    assert "weight" in links[0].row
    assert "conv" in links[0].row
    with pytest.raises(MappingError, match="no row explains"):
        rows.links(["conv.weight.extra"], {})


def test_let_and_config_enter_the_arithmetic(table: Load) -> None:
    rows = table('[let]\nn = "layers + 1"\n[main]\n"d.{i}" = "in.{n*i}.{kinds[i] == \'X\'}"')
    assert rows.links(["d.1"], {"layers": 2, "kinds": ["Y", "X"]})[0].sources == ("in.3.1",)


def test_parts_of_a_fused_tensor_become_one_link(table: Load) -> None:
    rows = table('[main]\n"{q,k,v}_proj.weight" = "in_proj : (p o) i -> p o i"')
    (link,) = rows.links(["k_proj.weight", "v_proj.weight", "q_proj.weight"], {})  # in any order
    assert link.sources == ("in_proj",)
    assert link.targets == ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    assert link.inverse.inverse == link


def test_parts_may_be_of_several_segments(table: Load) -> None:
    rows = table(
        '[main]\n"{attn.to_q,attn.to_k,mlp}.*" = "one.* : (q+k+4m) ... -> q+k+4m ..."\n'
        '"attn.out" = "out"'
    )
    keys = ["mlp.weight", "attn.to_k.weight", "attn.out.weight", "attn.to_q.weight"]
    fused, out = rows.links(keys, {})
    assert fused.sources == ("one.weight",)
    assert fused.targets == ("attn.to_q.weight", "attn.to_k.weight", "mlp.weight")
    assert out.targets == ("attn.out.weight",)
    shapes = {"attn.to_q.weight": (2, 3), "attn.to_k.weight": (2, 3), "mlp.weight": (8, 3)}
    assert fused.source_shape(shapes) == (12, 3)
    with pytest.raises(MappingError, match="section `k`"):
        fused.source_shape({**shapes, "attn.to_k.weight": (3, 3)})
    with pytest.raises(MappingError, match=r"makes 3 tensors of `one\.weight`, but .* names 2"):
        rows.links(["mlp.weight", "attn.to_k.weight"], {})


def test_what_follows_may_depend_on_indices_and_config(table: Load) -> None:
    rows = table(
        '[main]\n"b.{i}.norm" = "c.{i}.norm : last{i == n - 1}"\n'
        '"b.{i}.heads" = "c.{i}.heads : {h} d o -> o ({h} d)"\n'
        '[last0]\n"*" = "*"\n[last1]\n"*" = "* : (a+b) -> (b+a)"'
    )
    keys = ["b.0.norm.w", "b.1.norm.w", "b.0.heads"]
    first, last, heads = rows.links(keys, {"n": 2, "h": 3})
    assert first.op is None
    assert str(last.op) == "(a+b) -> (b+a)"
    assert str(heads.op) == "3 d o -> o (3 d)"
    with pytest.raises(MappingError, match=r"`\{i == n - 1\}`"):
        rows.links(keys, {"h": 3})
    with pytest.raises(MappingError, match="op `last1`"):
        table('[main]\n"b.{i}" = "c : last{i}"').links(["b.1"], {})


def test_a_row_of_several_parts_is_replaced_whole_or_in_part(table: Load) -> None:
    table('[main]\n"{a.q,a.k}" = "x : (p o) -> p o"', "base")
    whole = table('extends = "base"\n[main]\n"{a.q,a.k}" = "y : (p o) -> p o"')
    assert _pairs(whole.links(["a.q", "a.k"], {})) == {("a.q", "a.k"): ("y",)}
    part = table('extends = "base"\n[main]\n"a.q" = "z"')
    assert _pairs(part.links(["a.q", "a.k"], {})) == {("a.q",): ("z",), ("a.k",): ("x",)}
    with pytest.raises(MappingError, match=r"\[main\] has two rows for `a\.k`"):
        _ = table('[main]\n"{a.q,a.k}" = "x : (p o) -> p o"\n"a.k" = "z"').sections


def test_extends_overrides_row_by_row(table: Load) -> None:
    table('[main]\na = "x"\nb = "y"\n[ignore]\n"z*" = "no use"', "base")
    rows = table('extends = "base"\n[main]\nb = "z"')
    assert _pairs(rows.links(["a", "b"], {})) == {("a",): ("x",), ("b",): ("z",)}
    assert rows.ignored({})("zz") == "no use"
    assert rows.ignored({})("a") is None


def test_two_targets_from_one_source_are_refused(table: Load) -> None:
    with pytest.raises(MappingError, match="claimed by"):
        table('[main]\na = "x"\nb = "x"').links(["a", "b"], {})


def test_a_key_without_a_row_is_refused(table: Load) -> None:
    with pytest.raises(MappingError, match="no row explains b"):
        table('[main]\na = "x"').links(["a", "b"], {})


def test_covers_limits_what_a_table_explains(table: Load) -> None:
    rows = table('[about]\ncovers = ["dec"]\n[main]\ndec = "d"')
    assert [link.targets for link in rows.links(["dec.w", "enc.w", "decoder.w"], {})] == [
        ("dec.w",)
    ]


@pytest.mark.parametrize("text", ["[main\n", '[main]\na = "x"\na = "y"', ""])
def test_a_file_that_is_no_table_is_refused(table: Load, text: str) -> None:
    with pytest.raises(MappingError):
        table(text).links(["a"], {})


# --- names without dots ---------------------------------------------------------------------------


def test_segments_are_joined_as_the_spelling_says(table: Load) -> None:
    rows = '[main]\n"*" = "*"\n[spelling]\nprefix = "lora_unet_"\njoin = '
    keys = ["down_blocks.0.to_q", "mid_block.1.ff.net.0"]
    names = {
        "_": ("lora_unet_down_blocks_0_to_q", "lora_unet_mid_block_1_ff_net_0"),
        "": ("lora_unet_down_blocks0to_q", "lora_unet_mid_block1ffnet0"),
        "-": ("lora_unet_down_blocks-0-to_q", "lora_unet_mid_block-1-ff-net-0"),
        ".": ("lora_unet_down_blocks.0.to_q", "lora_unet_mid_block.1.ff.net.0"),
    }
    for join, expected in names.items():
        spelled = table(f'{rows}"{join}"')
        assert tuple(link.sources[0] for link in spelled.links(keys, {})) == expected
        assert spelled.beginning == "lora_unet_"


def test_the_prefix_of_a_table_is_part_of_the_path(table: Load) -> None:
    rows = table('prefix = "m.n."\n[spelling]\nprefix = "ema."\njoin = ""\n[main]\n"*" = "*"')
    (link,) = rows.links(["a.b"], {})
    assert link.sources == ("ema.mnab",)


def test_a_spelling_without_prefix(table: Load) -> None:
    rows = table('[spelling]\njoin = "_"\n[main]\n"a.{i}" = "b.{i+1}"')
    assert rows.links(["a.0.w"], {})[0].sources == ("b_1_w",)
    assert rows.beginning == ""


def test_spelled_links_are_inverted_like_others(table: Load) -> None:
    rows = table('[spelling]\njoin = "_"\n[main]\n"{q,k}.w" = "qk.w : (p o) -> p o"')
    (link,) = rows.links(["k.w", "q.w"], {})
    assert link.sources == ("qk_w",)
    assert link.inverse.targets == ("qk_w",)
    assert link.inverse.sources == ("q.w", "k.w")
    assert link.inverse.inverse == link


def test_two_paths_of_one_name_are_refused(table: Load) -> None:
    rows = table('[spelling]\njoin = ""\n[main]\n"*" = "*"')
    assert len(rows.links(["a.1.12", "a.2.2"], {})) == 2
    with pytest.raises(MappingError, match=r"`a\.1\.12` and `a\.11\.2` are both spelled `a112`"):
        rows.links(["a.1.12", "a.11.2"], {})
    with pytest.raises(MappingError, match=r"`a\.b_c` and `a_b\.c` are both spelled `a_b_c`"):
        table('[spelling]\njoin = "_"\n[main]\n"*" = "*"').links(["a.b_c", "a_b.c"], {})


def test_a_spelling_is_inherited_and_replaced_as_a_whole(table: Load) -> None:
    table('[spelling]\nprefix = "p_"\njoin = "_"\n[main]\n"*" = "*"', "base")
    assert table('extends = "base"').links(["a.b"], {})[0].sources == ("p_a_b",)
    own = table('extends = "base"\n[spelling]\njoin = ""')
    assert own.links(["a.b"], {})[0].sources == ("ab",)


@pytest.mark.parametrize(
    "section", ['prefix = "a"', "join = 1", 'join = "_"\nprefix = ["a"]', 'join = ""\ndots = "no"']
)
def test_a_spelling_that_is_none_is_refused(table: Load, section: str) -> None:
    with pytest.raises(MappingError, match=r"t: \[spelling\]"):
        table(f"[spelling]\n{section}")
