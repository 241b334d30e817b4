"""The T5 tokenizer that is written, as transformers and the runtime read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from weightport.converters.repo.t5_tokenizer import write_t5_tokenizer
from weightport.runtime.registry import component_class
from weightport.runtime.text.t5_tokenizer import T5Tokenizer

from .test_tokenizer import HARD

OPTIONS: list[dict[str, Any]] = [
    {},
    {"padding": "max_length", "truncation": True, "max_length": 77},
    {"padding": "max_length", "truncation": True, "max_length": 5},
    {"truncation": True, "max_length": 5, "add_special_tokens": False},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5") / "tokenizer_3"
    files = write_t5_tokenizer(folder)
    assert sorted(folder.iterdir()) == sorted(files)
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """By the class that `model_index.json` names, offline."""
    return transformers.T5TokenizerFast.from_pretrained(folder, local_files_only=True)


def test_known_ids(folder: Path, theirs: Any) -> None:
    expected = [3, 9, 1202, 13, 3, 9, 1712, 1]
    assert theirs("a photo of a cat")["input_ids"] == expected
    assert T5Tokenizer.from_pretrained(folder)("a photo of a cat")["input_ids"] == expected
    assert theirs.model_max_length == 512
    assert (theirs.pad_token_id, theirs.eos_token_id) == (0, 1)
    found = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert type(found) is type(theirs)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ids_and_texts_are_those_of_transformers(
    folder: Path, theirs: Any, options: dict[str, Any]
) -> None:
    ours = T5Tokenizer.from_pretrained(folder)
    for text in HARD:
        expected = theirs(text, **options)
        found = ours(text, **options)
        assert found["input_ids"] == expected["input_ids"], text
        assert found["attention_mask"] == expected["attention_mask"], text
        assert ours.decode(found["input_ids"]) == theirs.decode(expected["input_ids"]), text


def test_what_is_cut_off_a_long_prompt(folder: Path) -> None:
    ours = T5Tokenizer.from_pretrained(folder)
    assert ours.cut_off("one two three four five", 4) == "four five"
    assert ours.cut_off("one two", 77) == ""


def test_saved_and_loaded_again(folder: Path, theirs: Any, tmp_path: Path) -> None:
    T5Tokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in HARD[:12]:
        assert again(text)["input_ids"] == theirs(text)["input_ids"]
    assert T5Tokenizer.from_pretrained(tmp_path).model_max_length == 512


def test_what_is_no_tokenizer_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(OSError, match=r"tokenizer\.json"):
        T5Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        T5Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<none>"}')
    with pytest.raises(ValueError, match="no '<none>'"):
        T5Tokenizer.from_pretrained(tmp_path)


def test_both_names_of_the_class_are_known() -> None:
    for name in ("T5Tokenizer", "T5TokenizerFast"):
        assert component_class("transformers", name) is T5Tokenizer
