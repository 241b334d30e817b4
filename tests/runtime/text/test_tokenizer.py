"""The runtime's tokenizer against transformers': ids, decoding, files."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from weightport.converters.repo.tokenizer import write_tokenizer
from weightport.runtime.sampling.prompts import expanded, tokenize
from weightport.runtime.text.tokenizer import CLIPTokenizer

PLACEHOLDERS = ("<my-cat>", "<my-cat>_1", "<my-cat>_2", "Zeb", "sks", "back\\slash")
HARD = [
    "",
    " ",
    "\n\t \u3000\u00a0\u2028",
    "a photo of a cat",
    "A  PHOTO\tof\na Cat.",
    "hello!",
    "wow!!! !! ! !?",
    "it's they'll I'VE we'd 's 't",
    "naïve café nai\u0308ve cafe\u0301 ÀÉÎ Straße ﬁne İstanbul ΟΔΟΣ ς",
    "猫が好き 한국어 ภาษาไทย हिन्दी क्ष السلام עברית",
    "\uff46\uff55\uff4c\uff4c\uff57\uff49\uff44\uff54\uff48 ①②③ ½ ² Ⅷ x² 10³",
    "🐱 😀😃 👨\u200d👩\u200d👧 🏳️\u200d🌈 👍🏽 🇩🇪 ❤️",
    (
        "zero\u200bwidth soft\u00adhyphen \ufeffbom \u202eright \u0000nul \u0007bell \u001b[31m"
        " \x7f \u0085 \ufffd"
    ),
    "“quotes” \u2018single\u2019 — dash … ™ ® © € £ ¥",
    "&lt;b&gt; Ã© mojibake",
    "1234567890 3.14 1e-5 50% #1 @me $5 C++ x_y--z a/b\\c",
    "<|startoftext|> a <|endoftext|> b<|endoftext|>c <|ENDOFTEXT|> <|endoftext |>",
    "(masterpiece:1.2), [bad] {x|y} <lora:a:0.5>",
    "supercalifragilisticexpialidocious antidisestablishmentarianism pneumonoultramicroscopic",
    "a <my-cat>, with<my-cat>s and ZEB zebra xsksy SKS <MY-CAT>_1 back\\slash",
    "</w> <w> w</w> Ġ âĢĻ",
    "\U00010348 \U0001f9d1\U0001f3fb \U000e0067 \ue000 \U0010ffff",
    "a" * 300,
    "cat " * 100,
    "😀" * 60,
    "1" * 200,
    "a photo of " + ", ".join(f"thing {i}" for i in range(60)),
]
OPTIONS: list[dict[str, Any]] = [
    {"padding": "max_length", "truncation": True, "max_length": 77},
    {"padding": "max_length", "truncation": True, "max_length": 5, "add_special_tokens": False},
    {"add_special_tokens": False},
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind of repository -> its tokenizer folder."""
    root = tmp_path_factory.mktemp("tokenizers")

    @cache
    def make(kind: str) -> Path:
        layout, pad, placeholders = kind.split()
        folder = root / kind.replace(" ", "-")
        write_tokenizer(
            folder,
            pad_token="!" if pad == "!" else "<|endoftext|>",
            placeholder_tokens=PLACEHOLDERS if placeholders == "added" else (),
        )
        if layout == "json":  # what transformers 5 writes: tokenizer.json alone
            transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(folder / "5")
            folder = folder / "5"
            assert not (folder / "vocab.json").exists()
        elif layout == "ours":
            CLIPTokenizer.from_pretrained(folder).save_pretrained(folder / "ours")
            folder = folder / "ours"
        elif layout == "merges-as-text":  # tokenizer.json of tokenizers < 0.20
            transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(folder / "5")
            folder = folder / "5"
            whole = json.loads((folder / "tokenizer.json").read_text())
            whole["model"]["merges"] = [" ".join(pair) for pair in whole["model"]["merges"]]
            (folder / "tokenizer.json").write_text(json.dumps(whole))
        elif layout == "bare":
            (folder / "tokenizer_config.json").unlink()
            (folder / "special_tokens_map.json").unlink()
        return folder

    return make


KINDS = [
    f"{layout} {pad} {added}"
    for layout in ("classic", "json", "ours")
    for pad in "!e"
    for added in ("no", "added")
]
KINDS += ["merges-as-text e added", "bare e no", "bare e added"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(folder_of: Callable[[str], Path], kind: str) -> None:
    ours = CLIPTokenizer.from_pretrained(folder_of(kind))
    theirs = transformers.CLIPTokenizer.from_pretrained(folder_of(kind))
    for text in HARD:
        assert ours(text).input_ids == theirs(text).input_ids, text
        for options in OPTIONS:
            assert ours(text, **options) == dict(theirs(text, **options)), text
        ids = theirs(text).input_ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip
            )
    for name in ("bos", "eos", "unk", "pad"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token")
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.added_tokens_encoder == theirs.added_tokens_encoder
    assert len(ours) == len(theirs)
    assert ours.vocab_size == theirs.vocab_size


@pytest.mark.parametrize("pad", "!e")
def test_what_we_save_transformers_reads(folder_of: Callable[[str], Path], pad: str) -> None:
    before = transformers.CLIPTokenizer.from_pretrained(folder_of(f"classic {pad} added"))
    folder = folder_of(f"ours {pad} added")
    assert {path.name for path in folder.iterdir()} == {
        *(
            "vocab.json",
            "merges.txt",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
        ),
    }
    for load in (transformers.CLIPTokenizer, transformers.AutoTokenizer):
        after = load.from_pretrained(folder)
        for text in HARD:
            assert (
                after(text, padding="max_length").input_ids
                == before(text, padding="max_length").input_ids
            ), text
        assert after.model_max_length == 77


def test_padding_of_sd2(folder_of: Callable[[str], Path]) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder_of("classic ! no"))
    assert tokenizer("hello!", padding="max_length", max_length=7).input_ids == [
        49406,
        3306,
        0,
        49407,
        0,
        0,
        0,
    ]
    assert CLIPTokenizer.from_pretrained(folder_of("classic e no"))("hello!").input_ids == [
        49406,
        3306,
        256,
        49407,
    ]


def test_batches(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("classic ! no")
    ours, theirs = (
        CLIPTokenizer.from_pretrained(folder),
        transformers.CLIPTokenizer.from_pretrained(folder),
    )
    for padding in (True, "longest", "max_length"):
        options: dict[str, Any] = {
            "padding": padding,
            "max_length": 20,
            "truncation": True,
            "return_tensors": "pt",
        }
        for texts in (["a", "b c", "cat " * 40], "one text"):
            got, expected = ours(texts, **options), theirs(texts, **options)
            assert got.keys() == expected.keys()
            for key in expected:
                assert got[key].dtype == expected[key].dtype
                assert torch.equal(got[key], expected[key])
    assert ours(["a", "b c"]) == dict(theirs(["a", "b c"]))
    assert ours("a", return_tensors="pt").to("meta").input_ids.is_meta
    assert ours("a cat", add_special_tokens=False).input_ids == [320, 2368]
    with pytest.raises(ValueError, match="padding=True"):
        ours(["a", "b c"], return_tensors="pt")
    with pytest.raises(AttributeError, match="token_type_ids"):
        _ = ours("a").token_type_ids


def test_decode_takes_what_encode_gives(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("classic e no")
    ours, theirs = (
        CLIPTokenizer.from_pretrained(folder),
        transformers.CLIPTokenizer.from_pretrained(folder),
    )
    ids = ours(["a cat", "two dogs!"], padding="max_length", return_tensors="pt").input_ids
    assert ours.batch_decode(ids) == theirs.batch_decode(ids)
    assert ours.decode(ids[0]) == theirs.decode(ids[0])
    assert ours.decode(320) == "a"
    assert ours.convert_tokens_to_ids("cat</w>") == 2368
    assert ours.convert_tokens_to_ids(["cat</w>", "no such token"]) == [2368, 49407]


@pytest.mark.parametrize(
    "text",
    [
        "a cat",
        "cat " * 75,
        "cat " * 76,
        "cat " * 75 + "Dog, BIRD!",
        "word " * 75 + "<|endoftext|> x",
    ],
)
def test_the_text_that_is_cut_off(folder_of: Callable[[str], Path], text: str) -> None:
    """With either library's tokenizer a run warns of what diffusers warns of."""
    folder = folder_of("classic e no")
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    whole = theirs(text, padding="longest", return_tensors="pt").input_ids
    rest = theirs.batch_decode(whole[:, 77 - 1 : -1])[0]
    ids = []
    for tokenizer in (theirs, CLIPTokenizer.from_pretrained(folder)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            ids.append(tokenize(tokenizer, [text]))
        expected = (
            [f"the prompt is longer than 77 tokens; this is left out: {rest}"] if rest else []
        )
        assert [str(one.message) for one in told] == expected
    assert torch.equal(*ids)


def test_added_tokens(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("classic e no")
    ours, theirs = (
        CLIPTokenizer.from_pretrained(folder),
        transformers.CLIPTokenizer.from_pretrained(folder),
    )
    for tokens in ("sks", ["<a>", "<b>", "<a>"], ["cat</w>", "<B>x"], ["", "<c> d"]):
        assert ours.add_tokens(tokens) == theirs.add_tokens(tokens)
    assert ours.add_tokens(["<special>"], special_tokens=True) == theirs.add_tokens(
        ["<special>"], special_tokens=True
    )
    for text in ("xsksy SKS <a><b> <c>  d cat</w> <SPECIAL> <special>", *HARD):
        assert ours(text).input_ids == theirs(text).input_ids, text
    assert ours.added_tokens_encoder == theirs.added_tokens_encoder


def test_tokens_of_several_vectors(folder_of: Callable[[str], Path]) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder_of("classic e added"))
    assert expanded(tokenizer, "a <my-cat>, sks") == "a <my-cat> <my-cat>_1 <my-cat>_2, sks"
    assert expanded(tokenizer, "A <MY-CAT>") == "A <my-cat> <my-cat>_1 <my-cat>_2"
    assert expanded(tokenizer, "<my-cat>_1 alone") == "<my-cat>_1 alone"
    assert expanded(tokenizer, "no such") == "no such"
    first: Any = tokenizer.convert_tokens_to_ids("<my-cat>")
    assert tokenizer(expanded(tokenizer, "<my-cat>")).input_ids == [
        49406,
        first,
        first + 1,
        first + 2,
        49407,
    ]


@pytest.mark.parametrize(("written", "length"), [(248, 248), (10**30, 77), (None, 77)])
def test_model_max_length(
    folder_of: Callable[[str], Path], tmp_path: Path, written: int | None, length: int
) -> None:
    shutil.copytree(folder_of("classic e no"), tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"model_max_length": written}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, subfolder="tokenizer")
    assert len(tokenizer("cat " * 300, truncation=True, padding="max_length").input_ids) == length


def damage(name: str, text: str | None) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            (folder / name).write_text(text)

    return apply


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (damage("merges.txt", None), OSError, "there is no merges.txt in it"),
        (damage("merges.txt", "#version: 0.2\nq qq\n"), ValueError, "q"),
        (damage("vocab.json", "{"), ValueError, "cannot be read"),
        (damage("vocab.json", '{"a": 0}'), ValueError, "cannot be read"),
        (
            damage("tokenizer_config.json", "[1, 2"),
            ValueError,
            "tokenizer_config.json: the JSON in it",
        ),
        (damage("tokenizer_config.json", "[]"), ValueError, "the JSON in it is not an object"),
        (damage("tokenizer.json", '{"model": {}}'), ValueError, r"must contain \['vocab'\]"),
        (
            damage("added_tokens.json", '{"<a>": 49410}'),
            ValueError,
            "'<a>' is said to have id 49410, but .* 49408",
        ),
    ],
)
def test_damaged_files(
    folder_of: Callable[[str], Path],
    tmp_path: Path,
    harm: Callable[[Path], None],
    error: type[Exception],
    message: str,
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(folder_of("classic e no"), folder)
    harm(folder)
    with pytest.raises(error, match=message) as caught:
        CLIPTokenizer.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
