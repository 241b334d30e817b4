"""Textual inversion: every form in, every form out, into models and out of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

import weightport
from weightport.adapters.embeddings import grouped, spelled
from weightport.converters.layouts.embeddings import open_embeddings
from weightport.converters.layouts.source import Source
from weightport.runtime.text.tokenizer import CLIPTokenizer as OurTokenizer

from ..support.adapter_files import kohya_state, stock_model
from ..support.embedding_files import Theirs, a1111, vectors, write_all, write_chunk, write_pixels

TEXT = "text_encoder/model.safetensors"
TABLE = "text_model.embeddings.token_embedding.weight"
FORMS = [
    ("diffusers", ".safetensors"),
    ("diffusers", ".bin"),
    ("a1111", ".pt"),
    ("a1111", ".safetensors"),
    ("a1111", ".png"),
    ("clip", ".safetensors"),
    ("clip", ".pt"),
    ("text-encoders", ".safetensors"),
]

Held = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Held]]:
    return write_all(tmp_path_factory.mktemp("embeddings"))


def held(path: Path) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    words = open_embeddings(Source(path)).embeddings
    return {
        word.token: {role: tensor.numpy() for role, tensor in word.vectors.items()}
        for word in words
    }


def same(found: Any, expected: Tensor) -> bool:
    rows = torch.atleast_2d(expected)
    return bool(np.array_equal(np.atleast_2d(found), rows.numpy()))


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(weightport.ConversionError) as error:
        weightport.convert(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- files ----------------------------------------------------------------------------------------


def test_every_form_is_read_bit_for_bit(files: dict[str, tuple[Path, Held]]) -> None:
    assert len(files) >= 20
    for name, (path, expected) in files.items():
        found = held(path)
        assert list(found) == list(expected), name
        for word, kinds in expected.items():
            assert found[word].keys() == kinds.keys(), name
            for role, tensor in kinds.items():
                assert same(found[word][role], tensor), (name, role)


def holds(form: str, words: Held) -> bool:
    """Whether a form has a place for words."""
    if form == "diffusers" or form == "a1111":
        return all(len(kinds) == 1 for kinds in words.values()) and (
            len(words) == 1 or form == "diffusers"
        )
    kinds = next(iter(words.values()))
    roles = {role for role in kinds if role.endswith("_out")} if form == "text-encoders" else ()
    return len(words) == 1 and not roles and 1024 not in widths(kinds)


def widths(kinds: dict[str, Tensor]) -> set[int]:
    return {tensor.shape[-1] for tensor in kinds.values()}


def test_every_form_is_written_bit_for_bit(
    files: dict[str, tuple[Path, Held]], tmp_path: Path
) -> None:
    """What a form has no place for is refused by name, and leaves nothing behind."""
    for name, (path, expected) in files.items():
        for form, suffix in FORMS:
            output = tmp_path / f"out{suffix}"
            if not holds(form, expected):
                assert str(path) in refused(path, output, to=form)
                assert not output.exists()
                continue
            weightport.convert(path, output, to=form, sync=False)  # type: ignore[arg-type]
            found = held(output)
            for word, kinds in expected.items():
                mine = found.get(word) or next(iter(found.values()))
                for tensor in kinds.values():
                    assert any(same(one, tensor) for one in mine.values()), (name, form, suffix)
            output.unlink()


def test_torch_and_pillow_read_what_is_written(
    files: dict[str, tuple[Path, Held]], tmp_path: Path
) -> None:
    path, expected = files["one.bin"]
    tensor = expected["<cat>"][""]
    weightport.convert(path, tmp_path / "<cat>.pt", to="a1111")
    content = torch.load(tmp_path / "<cat>.pt", weights_only=True)
    assert torch.equal(content["string_to_param"]["*"], tensor[None])
    assert content["name"] == "<cat>"
    assert content["string_to_token"] == {"*": 265}
    weightport.convert(tmp_path / "<cat>.pt", tmp_path / "back.bin")
    assert torch.equal(torch.load(tmp_path / "back.bin", weights_only=True)["<cat>"], tensor[None])
    weightport.convert(files["half.safetensors"][0], tmp_path / "half.bin")
    half = torch.load(tmp_path / "half.bin", weights_only=True)["<cat>"]
    assert half.dtype == torch.float16
    assert torch.equal(half, files["half.safetensors"][1]["<cat>"][""])
    weightport.convert(path, tmp_path / "cat.png", to="a1111")
    with Image.open(tmp_path / "cat.png") as image:
        image.load()
        assert "sd-ti-embedding" in image.info
    weightport.convert(files["a1111.pt"][0], tmp_path / "my-style.safetensors", to="a1111")
    with safe_open(tmp_path / "my-style.safetensors", "pt") as file:
        assert file.metadata()["name"] == "my-style"
        assert file.metadata()["sd_checkpoint_name"] == "v1-5-pruned"
    assert weightport.inspect(tmp_path / "<cat>.pt").embedding is not None


def test_vectors_are_cast_where_that_is_asked_for(
    files: dict[str, tuple[Path, Held]], tmp_path: Path
) -> None:
    path, expected = files["vectors.bin"]
    weightport.convert(path, tmp_path / "half.bin", dtype="float16")
    half = torch.load(tmp_path / "half.bin", weights_only=True)["<cat>"]
    assert torch.equal(half, expected["<cat>"][""].half())
    torch.save({"<cat>": torch.full((1, 768), 1e6)}, tmp_path / "large.bin")
    for name in ("out.bin", "out.safetensors"):
        message = refused(tmp_path / "large.bin", tmp_path / name, dtype="float16")
        assert "holds NaN or Inf" in message


def test_words_are_renamed(files: dict[str, tuple[Path, Held]], tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    found = weightport.convert(files["gal-style.pt"][0], output, placeholder_tokens=["<tom>"])
    assert list(load_file(output)) == ["<tom>"]
    assert not any("names no word" in note for note in found.notes)
    message = refused(files["several.bin"][0], output, placeholder_tokens=["<a>"], overwrite=True)
    assert "holds 2 words, but 1 are named" in message


def test_inspection_tells_base_words_and_widths(files: dict[str, tuple[Path, Held]]) -> None:
    style = weightport.inspect(files["a1111.pt"][0]).embedding
    assert style is not None
    assert style.families == ("Stable Diffusion 1.x",)
    assert style.words[0].token == "my-style"
    assert style.words[0].vectors == (("", 3, 768, "F32"),)
    assert style.metadata["sd_checkpoint_name"] == "v1-5-pruned"
    pair = weightport.inspect(files["pair.safetensors"][0]).embedding
    assert pair is not None
    assert pair.families == ("Stable Diffusion XL",)
    assert any("names no word" in fact for fact in pair.evidence)
    second = weightport.inspect(files["sd2.bin"][0]).embedding
    assert second is not None
    assert "Stable Diffusion 2.x" in second.families


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"emb_params": torch.zeros(1, 2, 768)}, "`emb_params` has shape [1, 2, 768]"),
        ({"emb_params": torch.zeros(0, 768)}, "is no vectors"),
        ({"emb_params": torch.zeros(2, 768, dtype=torch.int64)}, "holds I64"),
        ({"emb_params": torch.full((2, 768), torch.nan)}, "holds NaN or Inf"),
        ({"bundle_emb.a.what": torch.zeros(2, 768)}, "does not end as vectors"),
        ({"text_encoders_0": torch.zeros(1, 768), "clip_l": torch.ones(1, 768)}, "a second set"),
    ],
)
def test_faulty_files_are_refused_by_name(
    state: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(state, path)
    assert message in refused(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_pictures_are_read_in_bounds(tmp_path: Path) -> None:
    write_chunk(tmp_path / "whole.png", vectors())
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    assert "ends too early" in refused(tmp_path / "cut.png", tmp_path / "out.bin")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "plain.png")
    assert "an image, not a checkpoint" in refused(tmp_path / "plain.png", tmp_path / "out")
    write_pixels(tmp_path / "pixels.png", vectors())
    for method in range(5):  # as encoders filter rows
        with Image.open(tmp_path / "pixels.png") as image:
            image.convert("RGBA" if method % 2 else "RGB").save(
                tmp_path / "again.png", compress_level=method * 2
            )
        assert same(held(tmp_path / "again.png")["my-style"][""], vectors())


def test_a_model_is_not_taught_by_being_one(
    files: dict[str, tuple[Path, Held]], sd1_repo: Path, tmp_path: Path
) -> None:
    path = files["a1111.pt"][0]
    assert "new words for a model" in refused([sd1_repo, path], tmp_path / "out")


def test_tokens_are_grouped_as_they_are_spelled() -> None:
    tokens = [*spelled("<a>", 3), *spelled("<b>", 1), *spelled("<b>_2", 2)]
    assert grouped(tokens) == {"<a>": 3, "<b>": 1, "<b>_2": 2}


# --- in files of LoRA -----------------------------------------------------------------------------


def test_embeddings_go_into_a_lora_and_out_of_it(
    files: dict[str, tuple[Path, Held]], tmp_path: Path
) -> None:
    model = stock_model("sd1", "text_encoder")
    lora = tmp_path / "lora.safetensors"
    save_file(kohya_state({"lora_te": model}, only=("layers.0.self_attn",)), lora)
    both = tmp_path / "both.safetensors"
    words = [files["vectors.safetensors"][0], files["left.safetensors"][0]]
    weightport.convert(lora, both, to="kohya", embedding=words, family="sd1")
    state = load_file(both)
    assert torch.equal(state["bundle_emb.<cat>.string_to_param.*"], vectors())
    assert torch.equal(state["bundle_emb.left.clip_l"], vectors())
    assert state.keys() > load_file(lora).keys()
    inspected = weightport.inspect(both)
    assert inspected.adapter is not None
    weightport.convert(both, tmp_path / "out.safetensors", extract_embeddings=True)
    out = load_file(tmp_path / "out.safetensors")
    assert {"<cat>", "left"} == out.keys()
    assert torch.equal(out["<cat>"], vectors())
    assert "has no place" in refused(
        lora, tmp_path / "peft.safetensors", to="peft", embedding=words
    )


def test_a_lora_is_baked_and_its_words_taught(plain: Path, tmp_path: Path) -> None:
    encoder = CLIPTextModel.from_pretrained(plain / "text_encoder")
    state = kohya_state({"lora_te": encoder}, only=("layers.0.self_attn",))
    both = tmp_path / "both.safetensors"
    save_file(state | {"bundle_emb.<cat>.string_to_param.*": vectors(2, 64)}, both)
    message = refused(plain, tmp_path / "out", lora=[str(both)])
    assert f"--embedding {both} teaches it" in message
    made = weightport.convert(
        plain, tmp_path / "out", lora=[str(both)], embedding=[both], sync=False
    )
    assert made.report["adapters"][0]["left_out"] == []
    assert torch.equal(load_file(tmp_path / "out" / TEXT)[TABLE][-2:], vectors(2, 64))


# --- in models ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(repo_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The narrow text encoder of SD 1.x with its tokenizer."""
    repo = tmp_path_factory.mktemp("plain") / "repo"
    weightport.convert(repo_of("sd1"), repo, component="text_encoder", sync=False)
    return repo


@pytest.mark.parametrize("tokenizer", ["classic", "whole"])
def test_a_taught_repo_is_what_diffusers_makes_of_it(
    tokenizer: str, plain: Path, tmp_path: Path
) -> None:
    if tokenizer == "whole":  # as transformers 5 saves it, with a token that was there before
        theirs = CLIPTokenizer.from_pretrained(plain / "tokenizer")
        theirs.save_pretrained(tmp_path / "base" / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(plain / "text_encoder")
        encoder.save_pretrained(tmp_path / "base" / "text_encoder")
        (tmp_path / "base" / "model_index.json").write_text("{}")
        assert (tmp_path / "base" / "tokenizer" / "tokenizer.json").is_file()
        plain = tmp_path / "base"
    save_file({"<cat>": vectors(3, 64)}, tmp_path / "cat.safetensors")
    torch.save(a1111(vectors(1, 64, 1), "dog-style"), tmp_path / "dog.pt")
    words = [tmp_path / "cat.safetensors", tmp_path / "dog.pt"]
    made = weightport.convert(plain, tmp_path / "out", embedding=words, sync=False)
    expected = Theirs(plain)
    for path in words:
        expected.load_textual_inversion(str(path))
    ours = Theirs(tmp_path / "out")
    table = ours.text_encoder.get_input_embeddings().weight
    assert torch.equal(table, expected.text_encoder.get_input_embeddings().weight)
    assert ours.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    prompt = "a <cat> <cat>_1 <cat>_2 with dog-style, 12"
    ids = expected.tokenizer(prompt).input_ids
    assert ours.tokenizer(prompt).input_ids == ids
    assert OurTokenizer.from_pretrained(tmp_path / "out" / "tokenizer").encode(prompt) == ids
    entry, second = made.report["embeddings"]
    assert entry["tokens"]["text_encoder"] == {"<cat>": 49408, "<cat>_1": 49409, "<cat>_2": 49410}
    assert second["tokens"]["text_encoder"] == {"dog-style": 49411}
    assert len(entry["files"]["cat.safetensors"]) == 64
    weightport.convert(tmp_path / "out", tmp_path / "back.safetensors", extract_embeddings=True)
    back = load_file(tmp_path / "back.safetensors")
    assert torch.equal(back["<cat>"], vectors(3, 64))
    assert torch.equal(back["dog-style"], vectors(1, 64, 1))


def test_keras_rows_and_back(plain: Path, tmp_path: Path) -> None:
    save_file({"<cat>": vectors(2, 64)}, tmp_path / "cat.safetensors")
    keras = tmp_path / "words.weights.h5"
    weightport.convert(plain, keras, to="kerascv", embedding=[tmp_path / "cat.safetensors"])
    back = tmp_path / "back.safetensors"
    weightport.convert(
        keras, back, extract_embeddings=True, placeholder_tokens=["<cat>=2"], family="sd1"
    )
    assert torch.equal(load_file(back)["<cat>"], vectors(2, 64))
    weightport.convert(
        keras, back, extract_embeddings=True, overwrite=True, placeholder_tokens=["<a>", "<b>"]
    )
    assert torch.equal(load_file(back)["<b>"], vectors(2, 64)[1:])
    repo = tmp_path / "repo"
    weightport.convert(keras, repo, placeholder_tokens=["<cat>=2"], sync=False)
    added = json.loads((repo / "tokenizer" / "added_tokens.json").read_text())
    assert added == {"<cat>": 49408, "<cat>_1": 49409}
    message = refused(keras, back, extract_embeddings=True, placeholder_tokens=["<cat>=3"])
    assert "name exactly 2" in message
    message = refused(repo, back, extract_embeddings=True, placeholder_tokens=["<cat>=2"])
    assert "names the added tokens" in message
    message = refused(plain, back, extract_embeddings=True, overwrite=True)
    assert "no token rows beyond" in message


def test_both_text_encoders_of_sdxl(repo_of: Callable[[str], Path], tmp_path: Path) -> None:
    pair = tmp_path / "<s>.safetensors"
    save_file({"clip_l": vectors(2, 64), "clip_g": vectors(2, 128, 1)}, pair)
    repo = repo_of("sdxl")
    weightport.convert(repo, tmp_path / "out", embedding=[pair], sync=False)
    for folder in ("tokenizer", "tokenizer_2"):
        tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "out" / folder)
        assert tokenizer.convert_tokens_to_ids("<s>_1") == 49409
    second = tmp_path / "out" / "text_encoder_2"
    assert json.loads((second / "config.json").read_text())["eos_token_id"] == 49407
    assert torch.equal(load_file(second / "model.safetensors")[TABLE][-2:], vectors(2, 128, 1))
    back = tmp_path / "back.safetensors"
    weightport.convert(tmp_path / "out", back, to="clip", extract_embeddings=True)
    assert torch.equal(load_file(back)["clip_l"], vectors(2, 64))
    assert torch.equal(load_file(back)["clip_g"], vectors(2, 128, 1))


def test_words_that_do_not_fit_are_refused(plain: Path, tmp_path: Path) -> None:
    pair = tmp_path / "<s>.safetensors"
    save_file({"clip_l": vectors(2, 64), "clip_g": vectors(2, 128, 1)}, pair)
    message = refused(plain, tmp_path / "out", embedding=[pair])
    assert "`clip_g` of `<s>` fit no text encoder" in message
    made = weightport.convert(
        plain, tmp_path / "out", embedding=[pair], ignore_unmatched=True, sync=False
    )
    assert made.report["embeddings"][0]["left_out"] == ["<s> clip_g"]
    wide = tmp_path / "wide.safetensors"
    save_file({"<w>": vectors(1, 48)}, wide)
    message = refused(plain, tmp_path / "no", embedding=[wide], ignore_unmatched=True)
    assert "its text encoders have 64 channels" in message
    for word in ("cat</w>", "two words", "<s>"):
        path = tmp_path / "word.safetensors"
        save_file({word: vectors(1, 64)}, path)
        words = [path, path] if word == "<s>" else [path]
        message = refused(plain, tmp_path / "no", embedding=words)
        assert f"`{word}`" in message
        assert "--placeholder-token" in message
    assert not (tmp_path / "no").exists()
