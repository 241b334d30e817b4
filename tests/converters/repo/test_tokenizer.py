"""The tokenizer folder gives the ids that KerasCV gave, whoever reads it."""

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, CLIPTokenizer

from weightport.converters.repo import packaged
from weightport.converters.repo.t5_tokenizer import write_t5_tokenizer
from weightport.converters.repo.tokenizer import (
    placeholder_names,
    placeholder_warnings,
    write_tokenizer,
)
from weightport.errors import ConversionError

START, END = 49406, 49407
PLACEHOLDERS = ("<my-cat>", "<zebra>", "<a-late-one>")

# Ids that keras-cv 0.6.4's SimpleTokenizer gives after add_tokens(PLACEHOLDERS), start and end
# tokens left out.
KERASCV_IDS = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "": [],
    "A PHOTO  of\ta <my-cat>, with<zebra>s!": [
        320,
        1125,
        539,
        320,
        49408,
        267,
        593,
        49409,
        338,
        256,
    ],
    "Wow!!! It's 1234 o'clock; they'll say “no”…": [
        *[2781, 995, 585, 568, 272, 273, 274, 275, 334, 262, 6716],
        *[282, 889, 1342, 1451, 728, 506, 871, 728, 251, 959],
    ],
    "naïve café 猫が 🐱": [1097, 35689, 563, 15304, 163, 234, 104, 4813, 490, 22979],
    "Собака, οδός İ": [
        *[
            23669,
            20978,
            109,
            16912,
            27152,
            27080,
            267,
            138,
            123,
            138,
            112,
            139,
            234,
            139,
            480,
            328,
            16384,
        ],
    ],
    "supercalifragilisticexpialidocious x_y--z 100% #1 <|endoftext|> end": [
        *[1642, 2857, 13093, 2076, 5868, 26850, 835, 639, 38466, 343, 318, 344, 2432, 345],
        *[272, 271, 271, 260, 258, 272, 49407, 806],
    ],
    "snow☃man 👨\u200d👩\u200d👧": [2583, 1741, 481, 786, 25023, 26304, 964, 356],
    "क्ष السلام": [22067, 19389, 3124, 371, 12973, 17856, 14251, 8453, 483],
}

# SHA-256 of the files in the published SD 1.x repositories.
PUBLISHED = {
    "vocab.json": "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349",
    "merges.txt": "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
    "special_tokens_map.json": "c4864a9376a8401918425bed71fc14fc0e81f9b59ec45c1cf96cccb2df508eac",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repo") / "tokenizer"
    write_tokenizer(folder, placeholder_tokens=PLACEHOLDERS)
    return folder


def padded(ids: list[int], pad: int = END) -> list[int]:
    ids = [START, *ids, END]
    return ids + [pad] * (77 - len(ids))


@pytest.mark.parametrize(
    "load", [CLIPTokenizer.from_pretrained, AutoTokenizer.from_pretrained], ids=["CLIP", "Auto"]
)
@pytest.mark.parametrize("text", KERASCV_IDS)
def test_transformers_gives_kerascv_ids(
    folder: Path, load: Callable[[Path], CLIPTokenizer], text: str
) -> None:
    assert load(folder)(text, padding="max_length").input_ids == padded(KERASCV_IDS[text])


def test_transformers_knows_the_special_tokens(folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.unk_token_id) == (
        START,
        *[END] * 3,
    )
    assert loaded.model_max_length == 77
    assert len(loaded) == 49408 + len(PLACEHOLDERS)
    assert loaded.convert_tokens_to_ids(list(PLACEHOLDERS)) == [49408, 49409, 49410]
    long = loaded("cat " * 100, padding="max_length", truncation=True).input_ids
    assert long == [START, *[2368] * 75, END]


@pytest.mark.parametrize("text", [text for text in KERASCV_IDS if "<" not in text])
def test_tokenizers_reads_the_classic_files(folder: Path, text: str) -> None:
    bpe = Tokenizer(
        BPE.from_file(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            unk_token="<|endoftext|>",
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
        )
    )
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    assert bpe.encode(text).ids == KERASCV_IDS[text]


def test_files_equal_the_published_ones(tmp_path: Path) -> None:
    written = write_tokenizer(tmp_path / "tokenizer")
    assert {path.name for path in written} == {*PUBLISHED, "tokenizer_config.json"}
    assert all(path.parent == tmp_path / "tokenizer" for path in written)
    for name, digest in PUBLISHED.items():
        assert hashlib.sha256((tmp_path / "tokenizer" / name).read_bytes()).hexdigest() == digest, (
            name
        )


def test_same_bytes_every_time(folder: Path, tmp_path: Path) -> None:
    again = write_tokenizer(tmp_path, placeholder_tokens=PLACEHOLDERS)
    assert {path.name for path in again} == {path.name for path in folder.iterdir()}
    for path in again:
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_pad_token(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, pad_token="!")
    ids = AutoTokenizer.from_pretrained(tmp_path)("a cat", padding="max_length").input_ids
    assert ids == padded([320, 2368], pad=0)
    with pytest.raises(ConversionError, match="pad token '<pad>' is not in"):
        write_tokenizer(tmp_path, pad_token="<pad>")


def test_the_vocabulary_follows_from_the_merges(folder: Path) -> None:
    """A symbol for each byte, the same at the end of a word, every merge joined, the two special
    tokens (CLIP)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(code) for code in [*visible, *range(0x100, 0x200 - len(visible))]]
    version, *merges = (folder / "merges.txt").read_text().splitlines()
    joined = [merge.replace(" ", "") for merge in merges]
    tokens = [
        *symbols,
        *(f"{symbol}</w>" for symbol in symbols),
        *joined,
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    assert (version, len(merges), len(tokens)) == ("#version: 0.2", 48894, 49408)
    assert json.loads((folder / "vocab.json").read_text()) == {
        token: id_ for id_, token in enumerate(tokens)
    }


@pytest.mark.parametrize(
    "data", [None, b"", b"not gzip", gzip.compress(b"i n\nt h\n")], ids=lambda d: repr(d)[:9]
)
@pytest.mark.parametrize(
    "name", ["clip_vocab.json.gz", "clip_bpe_merges.txt.gz", "t5_tokenizer.json.gz"]
)
def test_damaged_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(packaged.FOLDER, folder)
    (folder / name).unlink()
    if data is not None:
        (folder / name).write_bytes(data)
    monkeypatch.setattr(packaged, "FOLDER", folder)
    write = write_t5_tokenizer if name.startswith("t5") else write_tokenizer
    with pytest.raises(ConversionError, match=f"{name}: .* missing or damaged; reinstall"):
        write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_placeholder_names() -> None:
    assert placeholder_names(49408, ()) == ()
    assert placeholder_names(49410, ()) == ("<placeholder-0>", "<placeholder-1>")
    assert placeholder_names(49410, ["<zebra>", "<Ant>"]) == ("<zebra>", "<Ant>")


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        (
            49410,
            ["<one>"],
            "49410 rows, 2 more than .* 1 placeholder tokens are named: name exactly 2",
        ),
        (49408, ["<one>"], "49408 rows, 0 more"),
        (1000, ["<one>"], "1000 rows, 0 more"),
        (49409, [""], "is empty"),
        (49409, ["my cat"], "white space"),
        (49409, ["cat\x1b[2J"], r"'cat\\x1b\[2J' is empty or holds white space or control"),
        (49409, ["cat"], "is token .* of CLIP's vocabulary"),
        (49409, ["<|endoftext|>"], "is token 49407"),
        (49410, ["<a>", "<a>"], "named twice"),
        (49410, ["<a>", "<A>"], "named twice"),
    ],
)
def test_bad_placeholders_are_refused(
    tmp_path: Path, rows: int, given: list[str], message: str
) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        placeholder_names(rows, given)
    assert "\n" not in str(caught.value)
    if "rows" not in message:
        with pytest.raises(ConversionError, match=message):
            write_tokenizer(tmp_path / "t", placeholder_tokens=given)
        assert not (tmp_path / "t").exists()


def test_upper_case_placeholders_are_pointed_out() -> None:
    assert placeholder_warnings(["<my-cat>"]) == []
    (line,) = placeholder_warnings(["<my-cat>", "<MyCat>"])
    assert "<MyCat>" in line
    assert "lower-case" in line


def test_added_tokens_file(folder: Path, tmp_path: Path) -> None:
    added = json.loads((folder / "added_tokens.json").read_text())
    assert added == {"<my-cat>": 49408, "<zebra>": 49409, "<a-late-one>": 49410}
    write_tokenizer(tmp_path)
    assert not (tmp_path / "added_tokens.json").exists()
